"""Rows of token batches: divided into groups, and without repetitions."""

from collections.abc import Iterable, Sequence

import torch

from gradpruner.encoding import Batch


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
