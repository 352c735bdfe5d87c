"""APT's self-distillation: an earlier state of the model teaches the model that is being pruned.

    L = mu L_distill + (1 - mu) L_answers,   L_distill = 0.9 L_layer + 0.1 T^2 KL(teacher || student)

mu goes from 0 to 1 while the model is pruned. L_layer compares one of the teacher's layers in each quarter of the
depth, drawn anew every step, with the same layer of the student after a map Tr, and is the sum of the four mean squared
differences. States are first divided by their root mean square; otherwise LLaMA's few huge channels would dominate. KL
is the mean over tokens, prompts included: the code, whose LLaMA runs go to its sequence-to-sequence trainer, divides
its sum by rows and sequence length. That trainer lacks the factor 10 that the one for RoBERTa has. All of this is
computed in float32: bfloat16 gives NaN.

Deviation: padding counts neither in L_layer nor in KL.
"""

import itertools
import random

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gradpruner.encoding import IGNORED, Batch
from gradpruner.files import content_hash
from gradpruner.finetune.distill import kl_divergence
from gradpruner.hidden_states import decode, head_logits, sum_over_tokens, watch_layers

QUARTERS = 4


class StateMap(nn.Module):
    """The map Tr(x) = x + s B A x, at first the identity because B is zero.

    Args:
        width: channels of the residual stream.
        rank: rows of A.
        scaling: s.
    """

    def __init__(self, width: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.b.weight)
        self.scaling = scaling

    def forward(self, states: Tensor) -> Tensor:
        """Maps states (tokens, width) in float32."""
        mapped: Tensor = states + self.scaling * self.b(self.a(states))
        return mapped


def drawn_layers(num_layers: int, seed: int, step: int) -> list[int]:
    """Draws one layer in each quarter of the depth, seeded by the step so that a resumed run draws the same layers."""
    draw = random.Random(content_hash([seed, step]))
    bounds = [num_layers * quarter // QUARTERS for quarter in range(QUARTERS + 1)]
    return [draw.randrange(first, end) for first, end in itertools.pairwise(bounds) if first < end]


def layer_loss(student: Tensor, teacher: Tensor, state_map: StateMap) -> Tensor:
    """Returns the mean squared difference of normalized states, (tokens, d) each, float32."""
    return functional.mse_loss(state_map(_normalized(student)), _normalized(teacher))


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    *,
    mu: float,
    layers: list[int],
    hidden: Tensor,
    state_map: StateMap,
    layer_weight: float,
    logit_weight: float,
    temperature: float,
) -> tuple[Tensor, int]:
    """Returns the loss of a batch, in the form that `finetune.run.finetune` takes.

    Args:
        student: the model in training.
        teacher: see `teacher.Teacher`.
        batch: `input_ids`, `attention_mask`, `labels`, each (B, T).
        mu: weight of the distillation, in [0, 1].
        layers: layers whose states are compared.
        hidden: channels of the teacher's residual stream that the student has, (d',) int64 positions.
        state_map: Tr, of width d'.
        layer_weight: weight of L_layer.
        logit_weight: weight of the divergence.
        temperature: T.

    Returns:
        The loss times the number of answer tokens, and this number.
    """
    real = batch["attention_mask"].bool()  # (B, T)
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # (B, T): the next token, if it counts
    num_tokens, num_real = int((following != IGNORED).sum()), int(real.sum())
    states: dict[str, list[Tensor]] = {"teacher": [], "student": []}

    def last_states(model: PreTrainedModel, whose: str) -> Tensor:
        def note(layer: int, before: Tensor, after: Tensor) -> None:
            if layer in layers:
                states[whose].append(after[real])

        with watch_layers(model, note):
            last = decode(model, batch)
            return last[real.to(last.device)]  # (tokens, d)

    def of_chunk(own: Tensor, other: Tensor, targets: Tensor) -> Tensor:
        logits = head_logits(student, own)
        with torch.no_grad():
            teacher_logits = head_logits(teacher, other)
        answers = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        divergence = kl_divergence(teacher_logits, logits, temperature) / num_real * num_tokens
        return (1 - mu) * answers + mu * logit_weight * divergence

    with torch.no_grad():
        teacher_last = last_states(teacher, "teacher")
    student_last = last_states(student, "student")
    targets = following[real].to(student_last.device)
    total = sum_over_tokens(of_chunk, student.config.vocab_size, student_last, teacher_last, targets)
    pairs = zip(states["student"], states["teacher"], strict=True)
    compared = torch.stack([layer_loss(own, other[:, hidden], state_map) for own, other in pairs]).sum()
    return total + mu * layer_weight * compared * num_tokens, num_tokens


def _normalized(states: Tensor) -> Tensor:
    states = states.float()
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
