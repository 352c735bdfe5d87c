"""Rows of token batches: divided into groups, without repetitions, and in order of length."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence

from gradpruner.encoding import IGNORED, Batch, TrainingRow


def split_rows(batches: Sequence[Batch], every: int, remainder: int) -> tuple[list[Batch], list[Batch]]:
    """Returns the other rows of the batches, and those whose number leaves this remainder by `every`."""
    others: list[Batch] = []
    chosen: list[Batch] = []
    row = 0
    for batch in batches:
        numbers = torch.arange(row, row + len(batch["input_ids"]))
        row += len(numbers)
        taken = numbers % every == remainder
        for side, rows in ((others, ~taken), (chosen, taken)):
            if bool(rows.any()):
                side.append({name: values[rows] for name, values in batch.items()})
    return others, chosen


def distinct_rows(batches: Iterable[Batch], limit: int | None = None) -> list[Batch]:
    """Returns the batches without rows that came before, and with at most `limit` rows."""
    seen: set[tuple[int, ...]] = set()
    found: list[Batch] = []
    for batch in batches:
        new: list[int] = []
        for row, (tokens, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            key = tuple(tokens[mask.bool()].tolist())
            if key not in seen and (limit is None or len(seen) < limit):
                seen.add(key)
                new.append(row)
        if new:
            found.append({name: values[torch.tensor(new)] for name, values in batch.items()})
    return found


def training_rows(batches: Iterable[Batch]) -> list[TrainingRow]:
    """Returns the rows of batches as a fine-tune takes them; `encoding.collate` makes the batches again."""
    found = []
    for batch in batches:
        for row in range(len(batch["attention_mask"])):
            real = _real(batch, row)
            has_loss = (real["labels"] != IGNORED).tolist()
            first, length = has_loss.index(True), len(has_loss)
            changes = [first, *(place for place in range(first + 1, length) if has_loss[place] != has_loss[place - 1])]
            edges = [*changes, length]
            gaps = tuple((start, end) for start, end in pairwise(edges) if not has_loss[start])
            found.append(TrainingRow(tuple(real["input_ids"].tolist()), length - first, gaps))
    return found


def by_length(batches: Sequence[Batch]) -> list[Batch]:
    """Returns the rows in order of their length, in batches as large as the largest given, with the least padding.

    In random order, two of five columns of short questions are padding.
    """
    rows = [_real(batch, row) for batch in batches for row in range(len(batch["attention_mask"]))]
    rows.sort(key=lambda row: len(row["attention_mask"]))
    size = max((len(batch["attention_mask"]) for batch in batches), default=1)
    return [_padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def _real(batch: Batch, row: int) -> Batch:
    """Returns a row without its padding, (T,) each."""
    real = batch["attention_mask"][row].bool()
    return {name: values[row][real] for name, values in batch.items()}


def _padded(rows: Sequence[Batch]) -> Batch:
    """Returns rows as one batch, padded on the left as `encoding.collate` does."""
    pads = {"labels": IGNORED}  # any token will do where the mask is 0
    return {
        name: pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=pads.get(name, 0), padding_side="left"
        )
        for name in rows[0]
    }
