r"""Strict text templates for prompts and completions.

`Template("Question: {question}\nAnswer:").render({"question": "Why?"})`. A field is the name of a column in any script,
with dots and indices that lead into nested values (`columns.find`), and nothing else: unlike `str.format` there are no
attributes, conversions or format specifications. `{{` and `}}` are literal braces. Braces in the values are kept. A
`\n` that a shell passed on as two characters becomes a line break.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gradpruner.checks import guess
from gradpruner.tasks.columns import DataError, as_text, find

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A checked template.

    Attributes:
        text: the template as written.

    Raises:
        DataError: if a brace is unbalanced or a field has no name.
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

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """The literal texts (False) and the names of fields (True), in order."""
        return _split(self.text)

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
            values: strings, numbers and booleans by name, or nested mappings and lists of these.

        Raises:
            RowError: if a name is missing (the message lists the known ones) or its value is of another type.
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
    return as_text(find(values, name, f"template field {{{name}}} is unknown; known"), f"template field {{{name}}}")


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
        elif not token.group(1).strip():
            raise DataError(
                f"A template field must be the name of a column, got {token.group()!r} in {text!r}. "
                "Write {{ and }} for literal braces."
            )
        else:
            parts.append((token.group(1), True))
    parts.append((text[end:].replace("\\n", "\n"), False))
    return tuple(parts)
