r"""A user's own data: two JSON Lines files, whose column names are settings.

`python -m experiments.run dataset=jsonl dataset.train_file=train.jsonl dataset.test_file=test.jsonl
"dataset.prompt='Q: {question}\nA:'" dataset.answer_field=answer`
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import DataError, RowError, take, take_id, take_text, take_texts
from gradpruner.tasks.sources import SourceRow, read_local
from gradpruner.tasks.template import Template

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JsonLines(Task):
    """Task with open answers, or choices if `choices_field` is set. Every column is a prompt field, `{a.b}` if nested.

    Attributes:
        source: always `local`.
        train_file: path of the train split.
        test_file: path of the test split.
        answer_field: column with the answer: free text; with choices the 0-based index (an integer) or text of one.
        choices_field: column with the list of choices; None for open answers.
        long_field: column to shorten at its end when a prompt is too long; None: such rows are refused.
        id_field: column with an id, unique within a file; None to number the rows.
    """

    name: ClassVar[str] = "jsonl"
    sources: ClassVar[tuple[str, ...]] = ("local",)
    prompt_fields: ClassVar[tuple[str, ...] | None] = None

    source: str = "local"
    choice: str = " {choice}"
    train_file: str
    test_file: str
    answer_field: str
    choices_field: str | None = None
    long_field: str | None = None
    id_field: str | None = None

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        if self.prompt_with_options is not None and self.choices_field is None:
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

    def check_source(self) -> None:
        """Refuses the settings of other sources, and empty names.

        Raises:
            DataError: naming the setting to change.
        """
        if self.source != "local" or self.path is not None or self.revision is not None:
            raise DataError(
                f"dataset=jsonl reads two files of yours, got source={self.source!r}, path={self.path!r}, "
                f"revision={self.revision!r}. Set dataset.train_file and dataset.test_file, and leave these alone."
            )
        for setting in ("train_file", "test_file", "answer_field", "choices_field", "long_field", "id_field"):
            value = getattr(self, setting)
            optional = setting in ("choices_field", "long_field", "id_field")
            kind = "a path" if setting.endswith("file") else "a column name"
            if not (value is None and optional) and not (isinstance(value, str) and value):
                raise DataError(
                    f"dataset.{setting} must be {kind}, got {value!r}. "
                    f"Set dataset.{setting}{' or leave it null' if optional else ''}."
                )
        if self.train_file == self.test_file:
            logger.warning("train_file and test_file are both %s: scores will be too good", self.train_file)

    @property
    def context_field(self) -> str | None:
        """The column that `long_field` names."""
        return self.long_field

    def rows(self, split: str) -> Iterator[SourceRow]:
        """Yields the rows of the split's file.

        Raises:
            DataError: if the file is missing or empty.
        """
        return read_local(Path(self.train_file if split == "train" else self.test_file))

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads the columns that the settings name; the prompt template may use every column."""
        row_id = None if self.id_field is None else take_id(columns, self.id_field)
        if self.choices_field is None:
            return Parsed(columns, answer=take_text(columns, self.answer_field), id=row_id)
        choices = take_texts(columns, self.choices_field)
        return Parsed(columns, choices, self._find_label(columns, choices), id=row_id)

    def _find_label(self, columns: Mapping[str, Any], choices: tuple[str, ...]) -> int:
        value = take(columns, self.answer_field)
        what = f"answer column {self.answer_field!r}"
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise RowError(f"{what} must be the index (an integer) or the text of a choice, got {type(value).__name__}")
        if isinstance(value, int):
            if not 0 <= value < len(choices):
                raise RowError(f"{what} is the index {value}, out of range for {len(choices)} choices (0 is the first)")
            return value
        if choices.count(value) != 1:
            found = "none" if value not in choices else f"{choices.count(value)}"
            hint = "; an index must be an integer, without quotes" if value.strip().isdigit() else ""
            raise RowError(f"{what} is the text {value!r}, which {found} of the choices {list(choices)} equal{hint}")
        return choices.index(value)
