"""Losses of a fine-tune beyond the likelihood of the answers: the prompt's own tokens, and a teacher's predictions.

For a row with A answer tokens and P prompt tokens after its first token:

    L = sum over answers of [(1 - b) CE + b KL(tuned || student)] + w A / P sum over the prompt of l

divided by the answer tokens of the whole batch. The prompt of a row weighs w times as much as its answer, however long
it is, and nothing depends on how rows are batched. l is the cross-entropy of the token (`all_tokens`) or
KL(dense || student) (`distill`); `tuned` is the dense model after its own fine-tune on the task. KL is that of the
teacher's likeliest tokens and of all others as one, at most that over the whole vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.finetune.order import ROW
from gradpruner.finetune.teacher import ANSWERS, PROMPT, Predictions, Teacher, predicted, rest_log_prob
from gradpruner.hidden_states import ToLogits, decode, sum_over_tokens, within_head


@dataclass(frozen=True)
class SignalLoss:
    """Loss of a batch, as `run.finetune` takes it.

    Attributes:
        prompt_weight: w.
        dense: teacher on the prompt; None: the prompt's own tokens.
        tuned: teacher on the answers, or None.
        tuned_fraction: b; only with `tuned`.
    """

    prompt_weight: float = 1.0
    dense: Teacher | None = None
    tuned: Teacher | None = None
    tuned_fraction: float = 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Returns the loss summed over answer tokens, and their number."""
        model: PreTrainedModel = student  # or a PEFT model, which passes attributes on
        states = decode(model, batch)[:, :-1]  # (B, T - 1, d)
        answers, prompt = (predicted(batch, tokens).to(states.device) for tokens in (ANSWERS, PROMPT))
        total = within_head(
            model,
            states,
            lambda given, to_logits: self._total(
                partial(_sum, to_logits, model.config.vocab_size, given), batch, answers, prompt
            ),
        )
        return total, int(answers.sum())

    def _total(self, summed: Callable[..., Tensor], batch: Batch, answers: Tensor, prompt: Tensor) -> Tensor:
        targets = batch["input_ids"][:, 1:].to(answers.device)
        total = summed(targets, answers, None, 1.0 - self.tuned_fraction)
        if self.tuned is not None and self.tuned_fraction:
            total = total + summed(targets, answers, self.tuned.of_rows(batch[ROW]), self.tuned_fraction)
        if self.prompt_weight:
            per_token = self.prompt_weight * answers.sum(1) / prompt.sum(1).clamp_min(1)  # (B,)
            weights = per_token[:, None].expand_as(prompt)
            teacher = None if self.dense is None else self.dense.of_rows(batch[ROW])
            total = total + summed(targets, prompt, teacher, weights)
        return total


def _sum(
    to_logits: ToLogits,
    vocab_size: int,
    states: Tensor,
    targets: Tensor,
    chosen: Tensor,
    teacher: Predictions | None,
    weights: Tensor | float,
) -> Tensor:
    """Returns the weighted sum over the chosen positions of cross-entropy, or of KL where there is a teacher.

    With no position chosen it is 0 and still depends on every weight: other processes wait for their gradients.
    """
    picked = states[chosen]  # (n, d)
    per_token = weights[chosen] if isinstance(weights, Tensor) else picked.new_full((len(picked),), weights)
    function: Callable[..., Tensor]
    if teacher is None:
        function, columns = _cross_entropy, (targets[chosen],)
    else:
        function = _kl_divergence
        columns = tuple(each.to(states.device) for each in (teacher.ids, teacher.log_probs, teacher.rest))  # type: ignore[assignment]
    return sum_over_tokens(
        lambda chunk, weight, *rest: (function(to_logits(chunk), *rest) * weight).sum(),
        vocab_size,
        picked,
        per_token.float(),
        *columns,
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def _kl_divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor) -> Tensor:
    """Returns KL(teacher || student) of each token, (n,), over the teacher's likeliest tokens and all others as one.

    Args:
        logits: of the student, (n, V).
        ids: the teacher's likeliest tokens, (n, k).
        log_probs: their log-probabilities, (n, k).
        rest: log-probability of all others, (n,).
    """
    own = logits.float().log_softmax(-1).gather(-1, ids)  # (n, k)
    divergence = (log_probs.exp() * (log_probs - own)).sum(-1)
    if ids.shape[1] == logits.shape[1]:
        return divergence
    return divergence + rest.exp() * (rest - rest_log_prob(logits, ids))
