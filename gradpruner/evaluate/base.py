"""The interface of an evaluation, and how its predictions are written to disk.

An `Evaluation` turns examples into `Question`s (tokens), answers them batch by batch, and measures the answers. The
batches are fixed beforehand, and every batch is written when it is done: an interrupted evaluation continues with the
next batch and ends with the same file.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner import processes
from gradpruner.encoding import Encoder
from gradpruner.files import write_jsonl
from gradpruner.progress import Steps
from gradpruner.tasks import DataError, Example, Task

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.jsonl"
JOURNAL_FILE = "predictions.partial.jsonl"


@dataclass(frozen=True)
class Question:
    """One tokenized test example.

    Attributes:
        example: the test example.
        prompt: tokens of the prompt, shortened if necessary.
        completions: tokens of the texts to score: the options, or the reference answer.
    """

    example: Example
    prompt: list[int]
    completions: list[list[int]]

    @property
    def length(self) -> int:
        """Number of tokens in the prompt and all completions."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Evaluation(ABC):
    """Base of all ways to evaluate. Creating one is cheap and checks its values.

    Attributes:
        batch_size: questions per batch; changes speed and memory, not results.

    Raises:
        ValueError: on values that cannot work.
    """

    name: ClassVar[str]

    batch_size: int = 16

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}. Raise evaluation.batch_size.")

    def resolve(self, task: Task, examples: Sequence[Example]) -> Self:
        """Returns a checked copy with everything that depends on task and machine definite; downloads nothing."""
        return self

    def for_dtype(self, dtype: torch.dtype) -> Self:
        """Returns a copy for checkpoints of this dtype, in which a dtype that the settings leave open is definite."""
        return self

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Fetches what `measure` will need, so that a failure comes before the work, not after it."""

    @abstractmethod
    def questions(self, examples: Sequence[Example], encoder: Encoder) -> list[Question]:
        """Tokenizes the examples.

        Raises:
            DataError: if a prompt does not fit.
        """

    @abstractmethod
    def predict(self, model: PreTrainedModel, encoder: Encoder, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """Answers a batch and returns one JSON-ready dict per question, with its `id`."""

    @abstractmethod
    def prediction_settings(self) -> dict[str, Any]:
        """Returns the settings that decide what `predict` returns; part of its cache key."""

    @abstractmethod
    def measure(
        self, predictions: Sequence[dict[str, Any]], examples: Sequence[Example]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Returns the metrics with their standard errors, and the predictions with their scores."""

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the settings that decide what `measure` returns for given predictions; part of its cache key."""
        return {}


def encode_questions(
    examples: Sequence[Example],
    completions: Sequence[Sequence[str]],
    encoder: Encoder,
    reserve: int | None = None,
) -> list[Question]:
    """Tokenizes test examples; see `Encoder.encode`.

    Raises:
        DataError: if a prompt does not fit: skipping test rows would change what is measured.
    """
    encoded = encoder.encode(examples, completions, reserve)
    unfit = [example.id for example, row in zip(examples, encoded, strict=True) if row is None]
    if unfit:
        raise DataError(
            f"{len(unfit)} of {len(examples)} test rows do not fit into dataset.max_length={encoder.max_length} tokens "
            f"with their answer, got the ids {', '.join(unfit[:5])}{', ...' if len(unfit) > 5 else ''}. Raise "
            "dataset.max_length; only the context of a prompt is ever shortened."
        )
    return [
        Question(example, row.prompt, row.completions)
        for example, row in zip(examples, encoded, strict=True)
        if row is not None
    ]


def predict_all(
    load_model: Callable[[], PreTrainedModel],
    evaluation: Evaluation,
    encoder: Encoder,
    questions: Sequence[Question],
    directory: Path,
) -> Path:
    """Answers every question and writes `predictions.jsonl`, in the order of the questions.

    Args:
        load_model: returns the model in evaluation mode; called only if questions are still unanswered.
        evaluation: how to answer.
        encoder: the encoder that made the questions.
        questions: the questions to answer.
        directory: folder to write to; batches that an interrupted call finished there are not answered again, whatever
            its number of processes. Of several processes, each answers every n-th batch, and rank 0 puts all together.
    """
    lengths = [question.length for question in questions]
    order = sorted(
        range(len(questions)), key=lambda index: (-lengths[index], index)
    )  # longest first: memory shows at once
    batches = [order[start : start + evaluation.batch_size] for start in range(0, len(order), evaluation.batch_size)]
    ids = [[questions[index].example.id for index in batch] for batch in batches]
    done = _whole_batches(directory, ids)
    own = range(processes.rank(), len(batches), processes.count())
    missing = [index for index in own if index not in done]
    if done:
        logger.info("Going on after %d of %d batches in %s", len(done), len(batches), directory)
    model = load_model() if missing else None
    with (
        Steps(
            "evaluate",
            "row",
            total=sum(len(batches[index]) for index in own),
            done=sum(len(batches[index]) for index in own if index in done),
        ) as steps,
        (directory / _journal(processes.rank())).open("a", encoding="utf-8") as stream,
    ):
        for index in missing:
            assert model is not None
            with torch.inference_mode():
                rows = evaluation.predict(model, encoder, [questions[question] for question in batches[index]])
            stream.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
            stream.flush()
            done[index] = rows
            steps.advance(len(rows))
    path = directory / PREDICTIONS_FILE
    processes.wait_for_all()
    if processes.is_main():
        done |= _whole_batches(directory, ids) if processes.count() > 1 else {}
        in_order: dict[int, dict[str, Any]] = {}
        for index, batch in enumerate(batches):
            in_order.update(zip(batch, done[index], strict=True))
        write_jsonl(path, [in_order[index] for index in range(len(questions))])
        for journal in directory.glob(_journal("*")):
            journal.unlink()
    processes.wait_for_all()
    return path


def _journal(rank: int | str) -> str:
    """Returns the name of a process's journal; rank `*` gives a pattern for all."""
    return JOURNAL_FILE if rank == 0 else JOURNAL_FILE.replace(".partial", f".partial{rank}")


def _whole_batches(directory: Path, expected: list[list[str]]) -> dict[int, list[dict[str, Any]]]:
    """Returns the batches that are complete in the journals, by index; truncates this process's journal after them."""
    starts: dict[str, list[int]] = {}  # batches by their first id
    for index, ids in enumerate(expected):
        starts.setdefault(ids[0], []).append(index)
    done: dict[int, list[dict[str, Any]]] = {}
    for journal in sorted(directory.glob(_journal("*"))):
        lines, size = journal.read_bytes().splitlines(keepends=True), 0
        while lines:
            try:
                first = json.loads(lines[0])["id"]
                index = next(index for index in starts.get(first, []) if index not in done)
                own, lines = lines[: len(expected[index])], lines[len(expected[index]) :]
                rows = [json.loads(line) for line in own]
            except (ValueError, StopIteration):  # a torn line, half a character, or a batch of other rows
                break
            if [row["id"] for row in rows] != expected[index] or not own[-1].endswith(b"\n"):
                break
            done[index] = rows
            size += sum(map(len, own))
        if journal.name == _journal(processes.rank()):
            os.truncate(journal, size)
    return done


def pad(
    rows: Sequence[Sequence[int]], device: torch.device, left: bool, pad_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Pads rows and returns token ids and attention mask, both (B, T) int64; padding is masked."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, columns] = torch.tensor(row)
        mask[index, columns] = 1
    return ids.to(device), mask.to(device)
