"""Log-likelihood of every option, with the prompt computed once for all options of a question.

The prompts of a batch are read in one pass; its key-value cache is then repeated for the options, whose few tokens are
read in a second pass. A question with four options so costs its prompt once instead of four times, and results do not
depend on what else is in the batch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpruner.encoding import position_ids, split_tokens
from gradpruner.tasks import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LikelihoodSpec:
    """How to evaluate.

    Attributes:
        batch_size: questions a batch; changes speed and memory, not results.
    """

    batch_size: int = 16

    def __post_init__(self) -> None:
        """Raises ValueError on a batch size below 1."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}. Raise evaluation.batch_size.")


@dataclass(frozen=True)
class _Question:
    index: int
    prompt: list[int]
    options: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(option) for option in self.options)


@torch.inference_mode()
def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    spec: LikelihoodSpec,
    max_length: int,
) -> list[dict[str, Any]]:
    """Scores the options of every example (or the reference answer of an example without options).

    Args:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer.
        examples: what to score.
        spec: batch size.
        max_length: tokens of prompt and longest option together; a longer prompt loses tokens at its front.

    Returns:
        One dict an example, in the given order: `id`, `label`, `log_likelihoods` (summed over an option's tokens, in
        nats), `num_tokens` and `num_characters` of each option (delimiter not counted), `prediction` (argmax) and
        `prediction_norm` (argmax per character; both None without options), `answer_nll` (summed over the reference
        answer) and `answer_tokens`.
    """
    questions = _questions(examples, tokenizer, max_length)
    order = sorted(range(len(questions)), key=lambda index: (-questions[index].length, index))  # longest first
    results: list[dict[str, Any]] = [{} for _ in examples]
    with tqdm(total=len(examples), desc="evaluate", unit="row") as bar:
        for start in range(0, len(order), spec.batch_size):
            batch = [questions[index] for index in order[start : start + spec.batch_size]]
            for question, scores in zip(batch, _score_batch(model, batch), strict=True):
                results[question.index] = _prediction(examples[question.index], question, scores)
            bar.update(len(batch))
    return results


def _questions(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[_Question]:
    options = [example.choices or (example.answer,) for example in examples]
    prompts = [example.prompt for example, texts in zip(examples, options, strict=True) for _ in texts]
    pairs = iter(split_tokens(tokenizer, prompts, [text for texts in options for text in texts]))
    questions, num_truncated = [], 0
    for index, texts in enumerate(options):
        own = [next(pairs) for _ in texts]
        prompt, choices = own[0][0], [choice for _, choice in own]
        room = max(1, max_length - max(len(choice) for choice in choices))
        num_truncated += len(prompt) > room
        questions.append(_Question(index, prompt[-room:], choices))
    if num_truncated:
        logger.warning(
            "%d of %d prompts were cut at the front to fit %d tokens", num_truncated, len(examples), max_length
        )
    return questions


def _score_batch(model: PreTrainedModel, batch: Sequence[_Question]) -> list[list[float]]:
    """Summed log-likelihood of every option of every question."""
    prompts, prompt_mask = _pad([question.prompt for question in batch], model.device, left=True)  # (B, P)
    first = model(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=position_ids(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    options = [option for question in batch for option in question.options]
    owner = torch.tensor(
        [row for row, question in enumerate(batch) for _ in question.options], device=model.device
    )  # (N,)
    tokens, token_mask = _pad(options, model.device, left=False)  # (N, O)
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
    return [[next(sums) for _ in question.options] for question in batch]


def _log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihood of every token, (N, O) float64; row by row, so that no second (N, O, V) tensor is made."""
    return torch.stack(
        [
            torch.log_softmax(row.float(), dim=-1).gather(-1, ids[:, None]).squeeze(-1).double()
            for row, ids in zip(logits, tokens, strict=True)
        ]
    )


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T) int64; padding is token 0 and masked."""
    length = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, columns] = torch.tensor(row)
        mask[index, columns] = 1
    return ids.to(device), mask.to(device)


def _prediction(example: Example, question: _Question, scores: list[float]) -> dict[str, Any]:
    texts = example.choices or (example.answer,)
    characters = [len(text.lstrip()) for text in texts]
    per_character = [score / max(1, length) for score, length in zip(scores, characters, strict=True)]
    reference = example.label or 0
    return {
        "id": example.id,
        "label": example.label,
        "log_likelihoods": scores,
        "num_tokens": [len(option) for option in question.options],
        "num_characters": characters,
        "prediction": _argmax(scores) if example.choices else None,
        "prediction_norm": _argmax(per_character) if example.choices else None,
        "answer_nll": -scores[reference],
        "answer_tokens": len(question.options[reference]),
    }


def _argmax(values: Sequence[float]) -> int:
    """Index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=lambda index: (values[index], -index))
