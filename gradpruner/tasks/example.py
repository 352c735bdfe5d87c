"""`Example`s, which tasks produce, and the fingerprint by which caches recognise them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    r"""One rendered example.

    Attributes:
        id: unique within the split.
        prompt: text that the model is given, `"Question: ...\nAnswer:"`.
        answer: the reference completion with its leading delimiter; `choices[label]` if there are choices.
        choices: rendered completions with their leading delimiter, `" cellular telephone"`; empty for open answers.
        label: 0-based position of the answer among the choices; None for open answers.
        delimiter: text at the start of the answer and of every choice that does not belong to them, `" "`.
        context: (start, end), in characters, of the part of the prompt that may be shortened at its end when the prompt
            is too long; None if no part may be.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    delimiter: str = ""
    context: tuple[int, int] | None = None

    @property
    def reference(self) -> str:
        """The answer without its delimiter, to compare generated text with."""
        return self.answer.removeprefix(self.delimiter)


@dataclass(frozen=True)
class Parsed:
    """Contents of one row, before the templates are filled in.

    Attributes:
        fields: values for the prompt template, by name.
        choices: texts of the choices; empty for open answers.
        label: 0-based position of the answer among the choices; None for open answers.
        answer: text of an open answer; None if there are choices.
        id: the row's own id; None to number the rows.
    """

    fields: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    label: int | None = None
    answer: str | None = None
    id: str | None = None


def fingerprint(examples: Iterable[Example]) -> str:
    """Returns the SHA-256, in hex, of the examples as canonical JSON: equal for equal content in equal order."""
    digest = hashlib.sha256()
    for example in examples:
        text = json.dumps(vars(example), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
