r"""A user's own data: files, folders or datasets of the Hub, whose column names are settings.

`python -m experiments.run dataset=jsonl dataset.train_file=train.jsonl dataset.test_file=test.jsonl
"dataset.prompt='Q: {question}\nA:'" dataset.answer_field=answer`
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.checks import guess
from gradpruner.files import user_path
from gradpruner.tasks.answers import ANSWER_KINDS, read_label, warn_of_odd_answers
from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import DataError, RowError, as_text, check_text, find, take, take_id, take_options
from gradpruner.tasks.conversations import read_turns
from gradpruner.tasks.local_files import read_folder, read_local
from gradpruner.tasks.sources import SourceRow, read_hub
from gradpruner.tasks.template import Template

HUB = "hf://datasets/"  # as `datasets` and pandas write it
CHOICES = ("choices", "choices_field", "option_fields")  # settings that say where choices are
COLUMNS_OF_PROMPTS = ("answer_field", *CHOICES, "long_field", "prompt_with_options")
PLAIN_NAMES = ("train", "training", "data")  # of files, which do not name a dataset

logger = logging.getLogger(__name__)


def name_of(name: str | None, train_file: str) -> str:
    """Returns the name of a dataset: the one given, else that of its file, or of the folder of a `train.jsonl`."""
    if name is None:
        parts = [part for part in train_file.removeprefix(HUB).replace("\\", "/").split("/") if part]
        names = [part.partition("@")[0].partition(".")[0] for part in parts]
        name = next((each for each in reversed(names) if each and each not in PLAIN_NAMES), names[-1])
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "jsonl"


@dataclass(frozen=True, kw_only=True)
class JsonLines(Task):
    """Task with open answers, with choices if a setting names their columns, or without a prompt with conversations.

    Every column is a prompt field. Names of columns may lead into nested ones, as in `columns.find`.

    Attributes:
        source: always `local`.
        name: name of the dataset, for folders and tables; None: that of `train_file`, see `name_of`.
        train_file: a file of the train split, in any format of `local_files.read_local`; a folder as on the Hub; or
            `hf://datasets/OWNER/NAME`, with `@REVISION` behind it for another than the newest.
        test_file: the same of the test split; a folder or dataset may be that of `train_file`. None: the test rows are
            those of `validation_fraction`, or of another dataset.
        train_split: name of the train split in a folder or a dataset of the Hub.
        test_split: name of the test split there.
        subset: configuration of a folder or a dataset that has several.
        messages_field: column with the turns of a conversation, see `conversations.read_turns`.
        answer_field: column with the answer: free text, or with choices what `answer_as` says.
        choices: choices of every row, such as the labels of a classification.
        choices_field: column with the list of choices; without one of these three, answers are open.
        option_fields: columns with one choice each; the last ones may be empty.
        answer_as: how the answer names a choice, see `answers.read_label`.
        long_field: column to shorten at its end when a prompt is too long; None: such rows are refused.
        id_field: column with an id, unique within a file; None to number the rows.
    """

    sources: ClassVar[tuple[str, ...]] = ("local",)
    prompt_fields: ClassVar[tuple[str, ...] | None] = None

    source: str = "local"
    prompt: str | None = None
    choice: str = " {choice}"
    name: str | None = None  # type: ignore[assignment, misc]  # of a dataset that is ours it is the class's
    train_file: str
    test_file: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    subset: str | None = None
    messages_field: str | None = None
    answer_field: str | None = None
    choices: tuple[str, ...] | None = None
    choices_field: str | None = None
    option_fields: tuple[str, ...] | None = None
    answer_as: str = "auto"
    long_field: str | None = None
    id_field: str | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        object.__setattr__(self, "name", name_of(self.name, self.train_file))
        if self.answer_as not in ANSWER_KINDS:
            raise DataError(
                f"There is no such way to name a choice, got dataset.answer_as={self.answer_as!r}"
                f"{guess(str(self.answer_as), ANSWER_KINDS)}. Choose from: {', '.join(ANSWER_KINDS)}."
            )
        if self.prompt is None:
            self._check_conversation()
            return
        if self.answer_field is None or self.messages_field is not None:
            raise DataError(
                "dataset.prompt needs dataset.answer_field, and conversations need neither, got dataset.answer_field="
                f"{self.answer_field!r} and dataset.messages_field={self.messages_field!r}. Name the column with the "
                "answer, or leave dataset.prompt null."
            )
        given = [f"dataset.{name}={getattr(self, name)!r}" for name in CHOICES if getattr(self, name) is not None]
        if len(given) > 1:
            raise DataError(
                "Choices are the same for all rows, in one column or in several, got "
                f"{' and '.join(given)}. Set all but one of them to null."
            )
        if self.answer_as != "auto" and not self._has_choices:
            raise DataError(
                f"dataset.answer_as says how an answer names a choice, got {self.answer_as!r} with "
                "dataset.choices_field=null. Set dataset.choices, choices_field or option_fields, or answer_as=auto."
            )
        if self.prompt_with_options is not None and not self._has_choices:
            raise DataError(
                "dataset.prompt_with_options lists the choices, got it with dataset.choices_field=null. "
                "Set dataset.choices_field, or dataset.prompt_with_options=null."
            )
        for setting in ("prompt", "prompt_with_options"):
            text = getattr(self, setting)
            if self.long_field is not None and text is not None and self.long_field not in Template(text).fields:
                raise DataError(
                    f"dataset.long_field must be a field of dataset.{setting}, got {self.long_field!r} and {text!r}. "
                    "Write it as in the prompt, or leave it null."
                )

    def _check_conversation(self) -> None:
        given = [name for name in COLUMNS_OF_PROMPTS if getattr(self, name) is not None]
        if given:
            raise DataError(
                f"dataset.{given[0]} belongs to dataset.prompt, got {getattr(self, given[0])!r} and "
                f"dataset.prompt=null. Set dataset.prompt, or dataset.{given[0]}=null if rows are conversations."
            )

    @property
    def _has_choices(self) -> bool:
        return any(getattr(self, name) is not None for name in CHOICES)

    def check_source(self) -> None:
        """Refuses the settings of other sources, and empty names.

        Raises:
            DataError: naming the setting to change.
        """
        if self.source != "local" or self.path is not None or self.revision is not None:
            raise DataError(
                f"dataset=jsonl reads files of yours, got source={self.source!r}, path={self.path!r}, "
                f"revision={self.revision!r}. Set dataset.train_file and dataset.test_file, and leave these alone."
            )
        for setting in ("train_file", "test_file", "train_split", "test_split"):
            kind = "a path" if setting.endswith("file") else "the name of a split"
            self._check_name(setting, kind, optional=setting == "test_file")
        for setting in ("subset", "messages_field", "answer_field", "choices_field", "long_field", "id_field"):
            self._check_name(setting, "a column name" if setting.endswith("field") else "a name", optional=True)
        if self.train_file == self.test_file and (not self._has_splits("train") or self.train_split == self.test_split):
            logger.warning("train_file and test_file are both %s: scores will be too good", self.train_file)

    def _check_name(self, setting: str, kind: str, optional: bool) -> None:
        value = getattr(self, setting)
        if not (value is None and optional) and not (isinstance(value, str) and value):
            raise DataError(
                f"dataset.{setting} must be {kind}, got {value!r}. "
                f"Set dataset.{setting}{' or leave it null' if optional else ''}."
            )

    @property
    def context_field(self) -> str | None:
        """The column that `long_field` names."""
        return self.long_field

    def _has_splits(self, split: str) -> bool:
        file = (self.train_file if split == "train" else self.test_file) or ""
        return file.startswith(HUB) or user_path(file).is_dir()

    def rows(self, split: str) -> Iterator[SourceRow]:
        """Yields the rows of a split.

        Raises:
            DataError: if it cannot be read.
        """
        file, setting = (self.train_file, "train_split") if split == "train" else (self.test_file, "test_split")
        if file is None:
            raise DataError(
                "dataset=jsonl needs rows to test on, got dataset.test_file=null. Set dataset.test_file, or "
                "dataset.validation_fraction=0.1 to hold a tenth of the training rows out of training."
            )
        name = getattr(self, setting)
        if not self._has_splits(split):
            if name != split or self.subset is not None:
                raise DataError(
                    f"A file has no splits and no subsets, got dataset.{setting}={name!r} and dataset.subset="
                    f"{self.subset!r} with {file}. Leave them as they are, or give a folder."
                )
            return read_local(file)
        if not file.startswith(HUB):
            return read_folder(user_path(file), name, self.subset)
        hub_id, _, revision = file.removeprefix(HUB).partition("@")
        if hub_id.count("/") != 1:
            raise DataError(
                f"A dataset of the Hub is {HUB}OWNER/NAME, got {file!r}. Give its name, and name split and subset by "
                f"dataset.{setting} and dataset.subset."
            )
        advice = f"name a file or a folder instead, or another dataset.{setting} or dataset.subset"
        return read_hub(hub_id, self.subset, name, revision or None, advice=advice)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads the columns that the settings name; the prompt template may use every column."""
        row_id = None if self.id_field is None else take_id(columns, self.id_field)
        if self.prompt is None:
            return Parsed({}, turns=read_turns(columns, self.messages_field), id=row_id)
        assert self.answer_field is not None  # checked with the settings
        answer, what = take(columns, self.answer_field), f"column {self.answer_field!r}"
        if not self._has_choices:
            return Parsed(columns, answer=check_text(as_text(answer, what), what), id=row_id)
        choices = self._options(columns)
        label, answer_as = read_label(answer, choices, self.answer_as, f"answer {what}")
        return Parsed(columns, choices, label, id=row_id, answer_as=answer_as)

    def _options(self, columns: Mapping[str, Any]) -> tuple[str, ...]:
        if self.choices is not None:
            return self.choices
        if self.option_fields is None:
            assert self.choices_field is not None
            return take_options(columns, self.choices_field)
        cells = [
            (name, find(columns, name, f"column {name!r} is missing; columns found")) for name in self.option_fields
        ]
        while cells and cells[-1][1] in (None, ""):  # questions may have fewer options than others
            cells.pop()
        for name, cell in cells:
            if cell is None:
                raise RowError(f"column {name!r} is null, and later options are not")
        return tuple(check_text(as_text(cell, f"column {name!r}"), f"column {name!r}") for name, cell in cells)

    def review(self, split: str, rows: Sequence[Parsed]) -> None:
        """Warns of answers that look as if they were read in another way than meant."""
        warn_of_odd_answers(rows, self.answer_as, f"{self.name} {split}")
