r"""Strict text templates for prompts and completions.

`Template("Question: {question}\nAnswer:").render({"question": "Why?"})`. A field is a plain name, or names joined by
dots, which look up nested dictionaries and nothing else: unlike `str.format` there are no attributes, indices,
conversions or format specifications. `{{` and `}}` are literal braces. Braces in the values are kept. A `\n` that a
shell passed on as two characters becomes a line break.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gradpruner.checks import guess
from gradpruner.tasks.columns import DataError, RowError, check_encodable

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True)
class Template:
    """A checked template.

    Attributes:
        text: the template as written.

    Raises:
        DataError: if a brace is unbalanced or a field is not a plain or dotted name.
    """

    text: str

    def __post_init__(self) -> None:
        """Checks the syntax."""
        if not isinstance(self.text, str):
            raise DataError(f"A template must be text, got {self.text!r}. Write it as a quoted string.")
        _split(self.text)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, dotted as written, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for name, is_field in _split(self.text) if is_field))

    @property
    def literal_prefix(self) -> str:
        """The text before the first field."""
        parts = _split(self.text)
        return "".join(part for part, _ in parts[: next((i for i, part in enumerate(parts) if part[1]), len(parts))])

    def check_fields(self, known: Iterable[str], what: str) -> None:
        """Refuses a template that uses no field or an unknown one.

        Args:
            known: names that rows will have.
            what: the setting that the template comes from, for the message.

        Raises:
            DataError: naming the known fields and the nearest one.
        """
        known = list(known)
        listed = ", ".join("{" + name + "}" for name in known)
        if not self.fields:
            raise DataError(
                f"{what} has no field, so that all rows would read the same, got {self.text!r}. "
                f"Use {listed or 'the name of a column in braces'}."
            )
        for name in self.fields:
            if name not in known:
                raise DataError(
                    f"{what} has the unknown field {{{name}}}, got {self.text!r}. Known: {listed}{guess(name, known)}."
                )

    def render(self, values: Mapping[str, Any]) -> str:
        """Fills the template in.

        Args:
            values: strings and numbers by name, or nested mappings of these.

        Raises:
            RowError: if a name is missing (the message lists the known ones) or its value is neither text nor number.
        """
        return self.render_with_spans(values)[0]

    def render_with_spans(self, values: Mapping[str, Any]) -> tuple[str, dict[str, tuple[int, int]]]:
        """Fills the template in and says where each field ended up.

        Returns:
            The text, and for each field the (start, end) of its value in the text; the last one for a field used twice.

        Raises:
            RowError: as for `render`.
        """
        text, spans = "", {}
        for part, is_field in _split(self.text):
            start = len(text)
            text += _look_up(values, part) if is_field else part
            if is_field:
                spans[part] = (start, len(text))
        return text, spans


def _look_up(values: Mapping[str, Any], name: str) -> str:
    value: Any = values
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = list(_names(values))
            raise RowError(f"template field {{{name}}} is unknown; known: {', '.join(known)}{guess(name, known)}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        found = "null" if value is None else type(value).__name__
        raise RowError(f"template field {{{name}}} must be text or a number, got {found}")
    if isinstance(value, float) and not math.isfinite(value):  # Python's JSON has NaN, for a missing number
        raise RowError(f"template field {{{name}}} must be text or a number, got {value}")
    if isinstance(value, str):
        check_encodable(value, f"template field {{{name}}}")
    return str(value)


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@lru_cache(maxsize=64)  # one entry per template, which would otherwise be parsed again for every row
def _split(text: str) -> tuple[tuple[str, bool], ...]:
    """Returns the literal texts (False) and field names (True) in order."""
    parts: list[tuple[str, bool]] = []
    end = 0
    for token in _TOKEN.finditer(text):
        parts.append((text[end : token.start()].replace("\\n", "\n"), False))
        end = token.end()
        if token.group() in ("{{", "}}"):
            parts.append((token.group()[0], False))
        elif token.group(1) is None:
            raise DataError(
                f"A template has a lone {token.group()!r} at character {token.start()}, got {text!r}. "
                "Write {{ or }} for a literal brace."
            )
        elif not _FIELD.fullmatch(token.group(1)):
            raise DataError(
                f"A template field must be a plain name or names joined by dots, got {token.group()!r} in "
                f"{text!r}. Write {{{{ and }}}} for literal braces."
            )
        else:
            parts.append((token.group(1), True))
    parts.append((text[end:].replace("\\n", "\n"), False))
    return tuple(parts)
