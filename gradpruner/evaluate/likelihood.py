"""Log-likelihood of every option, with the prompt read once for all options of a question.

A question is packed into one row: the prompt, then all options one after another. Every option has the positions and
the attention mask that it would have directly after the prompt. No prompt is read twice, no option is padded to the
length of another, and logits are computed only where they are scored. Results do not depend on the rest of the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import Evaluation, Question, encode_questions, pad
from gradpruner.evaluate.metrics import likelihood_metrics
from gradpruner.tasks import Example

MASKED_ATTENTION = ("sdpa", "eager")  # attentions of transformers that accept a mask of any pattern
TOKENS_AT_ONCE = 1024  # including padding: enough for full speed of matrix products, with small logits


@dataclass(frozen=True)
class Likelihood(Evaluation):
    """Evaluation that scores the options of every example, or the reference answer of an example without options.

    A prediction has `id`, `label`, `log_likelihoods` (summed over an option's tokens, in nats), `num_tokens` and
    `num_characters` of each option (delimiter not counted), `prediction` (argmax) and `prediction_norm` (argmax per
    character; both None without options), `answer_nll` (summed over the reference answer) and `answer_tokens`.
    """

    name: ClassVar[str] = "likelihood"

    def questions(self, examples: Sequence[Example], encoder: Encoder) -> list[Question]:
        """Returns prompts and options; a prompt has room for the longest option."""
        return encode_questions(examples, [example.choices or (example.answer,) for example in examples], encoder)

    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Scores a batch."""
        scores = score_completions(model, batch)
        return [_prediction(question, own) for question, own in zip(batch, scores, strict=True)]

    def prediction_settings(self) -> dict[str, Any]:
        """Returns only the batch size, which changes the last digits."""
        return {"batch_size": self.batch_size}

    def measure(
        self, predictions: Sequence[dict[str, Any]], examples: Sequence[Example]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Computes `metrics.likelihood_metrics`."""
        return likelihood_metrics(predictions), list(predictions)


def score_completions(model: PreTrainedModel, batch: Sequence[Question]) -> list[list[float]]:
    """Returns the summed log-likelihood, in nats, of every completion of every question.

    Rows of similar length are read together, so that there is hardly any padding.
    """
    is_shared = _can_share(model, batch)
    rows = [
        PackedRow(question.prompt, completions)
        for question in batch
        for completions in ([question.completions] if is_shared else [[own] for own in question.completions])
    ]
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].input_ids), index))
    scores: dict[int, list[float]] = {}
    while order:
        count = max(1, TOKENS_AT_ONCE // len(rows[order[0]].input_ids))
        together, order = order[:count], order[count:]
        scores.update(zip(together, _score_rows(model, [rows[index] for index in together], is_shared), strict=True))
    every = iter([score for index in range(len(rows)) for score in scores[index]])
    return [[next(every) for _ in question.completions] for question in batch]


@dataclass(frozen=True)
class PackedRow:
    """A prompt and its completions as one sequence; the last token of a completion is predicted but not read."""

    prompt: list[int]
    completions: list[list[int]]

    @cached_property
    def input_ids(self) -> list[int]:
        """Tokens of the prompt, then of each completion without its last token."""
        return [*self.prompt, *(token for own in self.completions for token in own[:-1])]

    @property
    def branches(self) -> list[int]:
        """Branch of each token: 0 is the prompt; 1, 2, ... are the completions."""
        return [0] * len(self.prompt) + [number for number, own in enumerate(self.completions, 1) for _ in own[:-1]]

    @property
    def positions(self) -> list[int]:
        """Position of each token; every completion continues directly after the prompt."""
        after = len(self.prompt)
        return [*range(after), *(after + index for own in self.completions for index in range(len(own[:-1])))]

    @property
    def is_scored(self) -> list[int]:
        """1 for tokens that predict a completion token (the last token of the prompt and all after it), else 0."""
        return [0] * (len(self.prompt) - 1) + [1] * (len(self.input_ids) - len(self.prompt) + 1)


@torch.inference_mode()
def _score_rows(model: PreTrainedModel, rows: Sequence[PackedRow], is_shared: bool) -> list[list[float]]:
    """Returns the summed log-likelihoods of the completions in each row.

    Args:
        model: the model that reads the rows.
        rows: the rows of one forward pass.
        is_shared: whether a row may have more than one completion; see `_can_share`.
    """
    input_ids, mask = pad([row.input_ids for row in rows], model.device, left=True)  # (B, T)
    if is_shared:
        branch, _ = pad([row.branches for row in rows], model.device, left=True, pad_token_id=-1)
        mask = _branch_mask(branch, model.dtype)
    is_scored = pad([row.is_scored for row in rows], model.device, left=True)[0].bool()
    with _only(model.get_output_embeddings(), is_scored):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=pad([row.positions for row in rows], model.device, left=True)[0],
            use_cache=False,
        ).logits[0]  # (S, V): scored tokens of all rows
    parts = torch.split(logits, is_scored.sum(dim=1).tolist())
    return [_completion_scores(part, row.completions) for part, row in zip(parts, rows, strict=True)]


@contextmanager
def _only(head: nn.Module, is_wanted: Tensor) -> Iterator[None]:
    """Makes the output layer compute only the wanted positions of its (B, T) inputs until exit, as (1, S, V).

    `logits_to_keep` can only select the same columns in every row.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][is_wanted][None],))
    try:
        yield
    finally:
        hook.remove()


def _can_share(model: PreTrainedModel, batch: Sequence[Question]) -> bool:
    """Returns whether the completions of a question can share one row without attending to each other.

    Sharing needs an attention that accepts any mask, and no sliding window shorter than prompt and completion:
    transformers adds no window to a mask that it is given.
    """
    if model.config._attn_implementation not in MASKED_ATTENTION:
        return False
    window = getattr(model.config, "sliding_window", None)
    longest = max(len(question.prompt) + len(own) for question in batch for own in question.completions)
    return window is None or longest <= window


def _branch_mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask to add to attention scores, (B, 1, T, T): a token sees earlier tokens of prompt and own branch.

    Args:
        branch: (B, T): 0 is the prompt, 1, 2, ... the completions after it, -1 padding, which only padding sees.
        dtype: dtype of the model.
    """
    query, key = branch[:, :, None], branch[:, None, :]
    visible = ((key == 0) | (key == query)).tril()  # (B, T, T)
    return torch.zeros(visible.shape, dtype=dtype, device=branch.device).masked_fill_(~visible, torch.finfo(dtype).min)[
        :, None
    ]


def _completion_scores(logits: Tensor, completions: Sequence[Sequence[int]]) -> list[float]:
    """Returns the log-likelihoods of the completions in a row.

    Args:
        logits: (S, V): after the prompt's last token, then after all but the last token of each completion in turn.
        completions: tokens of each completion.
    """
    where, start = [], 1
    for own in completions:
        where += [0, *range(start, start + len(own) - 1)][: len(own)]
        start += len(own[:-1])
    tokens = [token for own in completions for token in own]
    log_likelihoods = torch.log_softmax(logits.float(), dim=-1)[where, tokens].double()
    return [part.sum().item() for part in torch.split(log_likelihoods, [len(own) for own in completions])]


def _prediction(question: Question, scores: list[float]) -> dict[str, Any]:
    example = question.example
    texts = example.choices or (example.answer,)
    characters = [len(text.removeprefix(example.delimiter)) for text in texts]
    per_character = [score / max(1, length) for score, length in zip(scores, characters, strict=True)]
    reference = example.label or 0
    return {
        "id": example.id,
        "label": example.label,
        "log_likelihoods": scores,
        "num_tokens": [len(option) for option in question.completions],
        "num_characters": characters,
        "prediction": _argmax(scores) if example.choices else None,
        "prediction_norm": _argmax(per_character) if example.choices else None,
        "answer_nll": -scores[reference],
        "answer_tokens": len(question.completions[reference]),
    }


def _argmax(values: Sequence[float]) -> int:
    """Returns the index of the largest value, the first among equals."""
    return max(range(len(values)), key=lambda index: (values[index], -index))
