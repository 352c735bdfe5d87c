"""From rendered examples to token batches: the loss mask, truncation, and left padding."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradpruner.tasks import DataError, Example

logger = logging.getLogger(__name__)

IGNORED = -100  # label without loss, as torch's cross_entropy and transformers have it
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingRow:
    """One tokenized training example.

    Attributes:
        input_ids: prompt, answer and end-of-sequence.
        num_answer_tokens: how many at the end carry loss.
    """

    input_ids: tuple[int, ...]
    num_answer_tokens: int


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of every prompt and of what its completion adds to them.

    Prompt and completion are encoded as one text and split where the prompt alone ends, as lm-evaluation-harness does:
    encoding them apart would give the completion other tokens than it has in running text. Spaces at the end of a
    prompt go to the completion, where BPE vocabularies keep them.

    Args:
        tokenizer: any Hugging Face tokenizer; its own special tokens (such as a BOS) are added.
        prompts: rendered prompts.
        completions: one completion for each prompt.

    Returns:
        (prompt ids, completion ids) for each pair; neither is empty unless the completion text is.
    """
    stripped = [prompt.rstrip(" ") for prompt in prompts]
    moved = [
        prompt[len(short) :] + completion
        for prompt, short, completion in zip(prompts, stripped, completions, strict=True)
    ]
    if not prompts:
        return []
    alone = tokenizer(stripped).input_ids
    whole = tokenizer([short + completion for short, completion in zip(stripped, moved, strict=True)]).input_ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    pairs = []
    for prompt_ids, ids in zip(alone, whole, strict=True):
        # Something must come before the first answer token for the model to predict it.
        pairs.append((ids[: len(prompt_ids)], ids[len(prompt_ids) :]) if prompt_ids else ([start], ids))
    return pairs


def encode_training_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TrainingRow]:
    """Tokenizes examples for completion-only training.

    A row over `max_length` loses tokens from the front of its prompt, never from its answer; a row whose answer alone
    does not fit is left out. Both are counted in the log.

    Raises:
        DataError: if no row fits.
    """
    pairs = split_tokens(tokenizer, [e.prompt for e in examples], [e.answer for e in examples])
    rows, num_truncated = [], 0
    for prompt_ids, answer_ids in pairs:
        answer = [*answer_ids, tokenizer.eos_token_id]
        room = max_length - len(answer)
        if room < 1:
            continue
        num_truncated += len(prompt_ids) > room
        rows.append(TrainingRow((*prompt_ids[-room:], *answer), len(answer)))
    if num_truncated:
        logger.warning("%d of %d prompts were cut at the front to fit %d tokens", num_truncated, len(rows), max_length)
    if len(rows) < len(examples):
        logger.warning("%d rows left out: answer over %d tokens", len(examples) - len(rows), max_length)
    if not rows:
        raise DataError(
            f"No training row fits into dataset.max_length={max_length} tokens: all {len(examples)} answers alone are "
            "longer. Raise dataset.max_length."
        )
    return rows


def collate(rows: Sequence[TrainingRow], pad_token_id: int) -> Batch:
    """Pads on the left, so that answers end together and only the last columns need logits.

    Returns:
        `input_ids`, `attention_mask` and `labels` (-100 = no loss), each (B, T) int64.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        input_ids[index, -len(ids) :] = ids
        attention_mask[index, -len(ids) :] = 1
        labels[index, -row.num_answer_tokens :] = ids[-row.num_answer_tokens :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted over real tokens only, (B, T): a row means the same however far it is padded."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)


def training_batches(
    rows: Sequence[TrainingRow], batch_size: int, num_batches: int, pad_token_id: int, seed: int
) -> Iterator[Batch]:
    """`num_batches` batches in the seeded order of a training run, going round again when the rows run out."""
    order: list[int] = []
    shuffler = random.Random(seed)
    for _ in range(num_batches):
        while len(order) < batch_size:
            order.extend(shuffler.sample(range(len(rows)), len(rows)))
        yield collate([rows[index] for index in order[:batch_size]], pad_token_id)
        del order[:batch_size]
