"""Distillation: a compressed model learns to predict what the dense one predicts.

MINITRON (Muralidharan et al., arXiv:2407.14679): L = T^2 KL(p_teacher || p_student) over the whole vocabulary, mean
over tokens, no cross-entropy. Optionally alpha L_states is added, with alpha = L / L_states as a constant, so that both
terms weigh the same. Logits of teacher and student are computed for a few tokens at a time, and again in the backward
pass, because the logits of a whole batch would take most of the memory of a step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gradpruner.checks import check_choice
from gradpruner.encoding import IGNORED, Batch
from gradpruner.hidden_states import ToLogits, decode, head_logits, sum_over_tokens, watch_layers, within_head
from gradpruner.plan import PruningPlan

TOKENS = ("all", "answer")


@dataclass(frozen=True)
class Distillation:
    """Settings of the distillation from the dense model.

    Attributes:
        temperature: T, divides the logits of both models.
        tokens: `all` compares all real tokens but the first of a row, `answer` those of the answer.
        states: also compare hidden states after the kept layers.
    """

    temperature: float = 1.0
    tokens: str = "all"
    states: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        check_choice("distillation tokens", self.tokens, TOKENS)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}. MINITRON's is 1.")


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over tokens.

    Args:
        teacher_logits: (tokens, vocabulary).
        student_logits: (tokens, vocabulary).
        temperature: T.

    Returns:
        float32 scalar.
    """
    teacher, student = (
        (logits.float() / temperature).log_softmax(-1) for logits in (teacher_logits, student_logits)
    )  # (tokens, V)
    return temperature**2 * functional.kl_div(student, teacher, reduction="sum", log_target=True)


def add_states_loss(logit_loss: Tensor, states_loss: Tensor) -> Tensor:
    """Returns L + alpha L_states with the constant alpha = L / L_states; no gradient flows through alpha."""
    alpha = logit_loss.detach() / states_loss.detach().clamp_min(torch.finfo(states_loss.dtype).tiny)
    return logit_loss + alpha * states_loss


class DistillationLoss:
    """Distillation loss of a batch, as `run.finetune` takes it.

    Args:
        teacher: the dense model; it is frozen.
        settings: which tokens and states to compare.
        plan: how the student was pruned, which tells the teacher state that each student state is compared with.
    """

    def __init__(self, teacher: PreTrainedModel, settings: Distillation, plan: PruningPlan) -> None:
        self._teacher = teacher.requires_grad_(False).eval()
        self._settings, self._plan = settings, plan

    def __call__(self, student: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Returns the loss summed over tokens, and the number of tokens."""
        assert isinstance(student, PreTrainedModel)
        chosen = batch["labels"][:, 1:] != IGNORED  # (B, T - 1): positions whose next token has a label
        real = batch["attention_mask"].bool()
        with torch.no_grad(), _states(self._teacher, self._settings.states) as teacher_states:
            teacher_last = _chosen(decode(self._teacher, batch), chosen)  # (tokens, d)
        with _states(student, self._settings.states) as student_states:
            student_last = _chosen(decode(student, batch), chosen)
        total = within_head(
            student,
            student_last,
            lambda states, to_logits: sum_over_tokens(
                partial(self._chunk, to_logits), student.config.vocab_size, states, teacher_last
            ),
        )
        num_tokens = int(chosen.sum())
        if self._settings.states:
            per_token = states_loss(student_states, teacher_states, self._plan, real)
            total = add_states_loss(total / max(1, num_tokens), per_token) * num_tokens
        return total, num_tokens

    def _chunk(self, to_logits: ToLogits, student_last: Tensor, teacher_last: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = head_logits(self._teacher, teacher_last).to(student_last.device)
        return kl_divergence(teacher_logits, to_logits(student_last), self._settings.temperature)


def states_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], plan: PruningPlan, real: Tensor) -> Tensor:
    """Returns the mean squared difference of hidden states over layers, real tokens and channels.

    The output of a kept layer is compared with the input of the next kept layer in the dense model, the output of the
    last one with the dense model's last output. With a narrower residual stream, only the kept channels are compared.

    Args:
        student: output of every layer of the student, each (B, T, d).
        teacher: output of every layer of the dense model, each (B, T, d of the dense model).
        plan: how the student was pruned.
        real: True where there is no padding, (B, T) bool.
    """
    stands_for = [*(layer - 1 for layer in plan.kept_layers[1:]), plan.num_hidden_layers - 1]
    hidden = None if plan.width is None or plan.width.hidden is None else list(plan.width.hidden)
    losses = []
    for own, layer in zip(student, stands_for, strict=True):
        target = teacher[layer] if hidden is None else teacher[layer][..., hidden]
        losses.append(functional.mse_loss(own[real].float(), target[real].float()))
    return torch.stack(losses).mean()


@contextmanager
def _states(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the outputs of a model's layers during a forward pass."""
    outputs: list[Tensor] = []
    if not wanted:
        yield outputs
        return
    note: Callable[[int, Tensor, Tensor], None] = lambda layer, before, after: outputs.append(after)  # noqa: E731
    with watch_layers(model, note):
        yield outputs


def _chosen(states: Tensor, chosen: Tensor) -> Tensor:
    """Returns the states (B, T, d) at the chosen of the first T - 1 positions, (tokens, d)."""
    return states[:, :-1][chosen.to(states.device)]
