"""Log-likelihood of every option, with the prompt computed once for all options of a question.

The prompts of a batch are read in one pass; its key-value cache is then repeated for the options, whose few tokens are
read in a second pass. A question with four options so costs its prompt once instead of four times, and results do not
depend on what else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.encoding import Encoder, position_ids
from gradpruner.evaluate.base import Evaluation, Question, encode_questions, pad
from gradpruner.evaluate.metrics import likelihood_metrics
from gradpruner.tasks import Example


@dataclass(frozen=True)
class Likelihood(Evaluation):
    """Scores the options of every example, or the reference answer of an example without options.

    A prediction has `id`, `label`, `log_likelihoods` (summed over an option's tokens, in nats), `num_tokens` and
    `num_characters` of each option (delimiter not counted), `prediction` (argmax) and `prediction_norm` (argmax per
    character; both None without options), `answer_nll` (summed over the reference answer) and `answer_tokens`.
    """

    name: ClassVar[str] = "likelihood"

    def questions(self, examples: Sequence[Example], encoder: Encoder) -> list[Question]:
        """Prompts and options; a prompt leaves room for the longest option."""
        return encode_questions(examples, [example.choices or (example.answer,) for example in examples], encoder)

    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Scores a batch."""
        scores = score_completions(model, batch)
        return [_prediction(question, own) for question, own in zip(batch, scores, strict=True)]

    def prediction_settings(self) -> dict[str, Any]:
        """Only the batch size, which moves the last digits."""
        return {"batch_size": self.batch_size}

    def measure(
        self, predictions: Sequence[dict[str, Any]], examples: Sequence[Example]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """See `metrics.likelihood_metrics`."""
        return likelihood_metrics(predictions), list(predictions)


@torch.inference_mode()
def score_completions(model: PreTrainedModel, batch: Sequence[Question]) -> list[list[float]]:
    """Summed log-likelihood, in nats, of every completion of every question."""
    prompts, prompt_mask = pad([question.prompt for question in batch], model.device, left=True)  # (B, P)
    first = model(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=position_ids(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    options = [option for question in batch for option in question.completions]
    owner = torch.tensor(
        [row for row, question in enumerate(batch) for _ in question.completions], device=model.device
    )  # (N,)
    tokens, token_mask = pad(options, model.device, left=False)  # (N, O)
    log_likelihoods = torch.zeros(tokens.shape, dtype=torch.float64, device=model.device)  # (N, O)
    log_likelihoods[:, :1] = _log_likelihood(first.logits[owner], tokens[:, :1])
    if tokens.shape[1] > 1:
        cache = first.past_key_values
        cache.batch_select_indices(owner)
        inputs, input_mask = tokens[:, :-1], token_mask[:, :-1]  # (N, O - 1)
        start = prompt_mask.sum(dim=1)[owner, None]  # (N, 1): position of an option's first token
        logits = model(
            input_ids=inputs,
            attention_mask=torch.cat([prompt_mask[owner], input_mask], dim=1),
            position_ids=start + torch.arange(inputs.shape[1], device=model.device),
            past_key_values=cache,
        ).logits  # (N, O - 1, V)
        log_likelihoods[:, 1:] = _log_likelihood(logits, tokens[:, 1:])
    sums = iter((log_likelihoods * token_mask).sum(dim=1).tolist())
    return [[next(sums) for _ in question.completions] for question in batch]


def _log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihood of every token, (N, O) float64; row by row, so that no second (N, O, V) tensor is made."""
    return torch.stack(
        [
            torch.log_softmax(row.float(), dim=-1).gather(-1, ids[:, None]).squeeze(-1).double()
            for row, ids in zip(logits, tokens, strict=True)
        ]
    )


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
    """Index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=lambda index: (values[index], -index))
