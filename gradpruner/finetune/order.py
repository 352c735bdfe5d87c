"""In which order a fine-tune sees its rows: by seed and epoch only, whatever the number of processes.

Of every `processes` micro batches in a row, accelerate gives one to each process. So an optimizer step sees the same
micro batches on any number of processes, as long as all processes get equally many of them. Rows that are missing for
that at the end of an epoch are blank ones; accelerate would train on the first rows of the epoch again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler  # type: ignore[import-untyped]
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from gradpruner import processes
from gradpruner.encoding import Batch, TrainingRow, collate
from gradpruner.finetune.spec import TrainingSpec

ROW = "row"  # column of a batch that says which training rows it holds


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Length-grouped sampler with a seed; transformers' own uses the global random state, which a resume lacks."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next order is made for."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return super().__iter__()  # type: ignore[no-any-return]


class PaddedSampler(Sampler[int]):
    """Another sampler's order, followed by blank rows.

    Args:
        order: sampler of the real rows.
        num_rows: number of real rows, which is the index of the blank row.
        num_blank: how often the blank row comes.
    """

    def __init__(self, order: Any, num_rows: int, num_blank: int) -> None:
        self._order, self._num_rows, self._num_blank = order, num_rows, num_blank

    def set_epoch(self, epoch: int) -> None:
        """Hands the epoch on."""
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from [self._num_rows] * self._num_blank

    def __len__(self) -> int:
        return self._num_rows + self._num_blank


def num_blank_rows(spec: TrainingSpec, num_rows: int) -> int:
    """Returns how many blank rows end an epoch, so that all processes get equally many micro batches."""
    return 0 if processes.count() == 1 else -num_rows % (int(spec.micro_batch_size) * processes.count())


def with_blank_row(rows: Sequence[TrainingRow], pad_token_id: int) -> list[TrainingRow]:
    """Returns the rows, and with several processes after them a row of one token without a loss."""
    blank = [TrainingRow((pad_token_id,), 1, gaps=((0, 1),))]
    return [*rows, *(blank if processes.count() > 1 else [])]


def make_sampler(spec: TrainingSpec, lengths: Sequence[int], seed: int) -> Sampler[int] | None:
    """Returns the sampler of a fine-tune; None is the Trainer's own.

    Args:
        spec: how to train; `micro_batch_size` is a number.
        lengths: tokens of each row, without the blank row.
        seed: seed of the order.
    """
    order: Any = None
    if spec.group_by_length:
        order = SeededLengthGroupedSampler(spec.batch_size, list(lengths), seed)
    if processes.count() == 1:
        return order  # type: ignore[no-any-return]
    if order is None:  # accelerate makes this of the Trainer's own sampler, from the same state
        order = SeedableRandomSampler(range(len(lengths)))
    return PaddedSampler(order, len(lengths), num_blank_rows(spec, len(lengths)))


def make_dataset(rows: Sequence[TrainingRow]) -> Dataset:
    """Returns rows as the Trainer takes them."""
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "num_answer_tokens": [row.num_answer_tokens for row in rows],
            "gaps": [[list(gap) for gap in row.gaps] for row in rows],
            "length": [len(row.input_ids) for row in rows],
            ROW: list(range(len(rows))),
        }
    )


def collate_items(items: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Returns a batch of rows of `make_dataset`, with a column that says which rows they are, (B,) int64."""
    batch = collate([read_row(item) for item in items], pad_token_id)
    return {**batch, ROW: torch.tensor([item[ROW] for item in items])}


def read_row(item: dict[str, Any]) -> TrainingRow:
    """Returns a row of `make_dataset`."""
    gaps = tuple((start, end) for start, end in item["gaps"])
    return TrainingRow(tuple(item["input_ids"]), item["num_answer_tokens"], gaps)
