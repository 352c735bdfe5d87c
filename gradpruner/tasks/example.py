"""`Example`s, which tasks produce, and the fingerprint by which caches recognise them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One turn of a conversation: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


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
class ChatExample(Example):
    """A conversation, for a model's chat template. `prompt` and `answer` are those of the last turn, as plain text.

    Attributes:
        turns: all turns; the last one is the assistant's.
    """

    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Parsed:
    """Contents of one row, before the templates are filled in.

    Attributes:
        fields: values for the prompt template, by name.
        choices: texts of the choices; empty for open answers.
        label: 0-based position of the answer among the choices; None for open answers.
        answer: text of an open answer; None if there are choices.
        id: the row's own id; None to number the rows.
        turns: a whole conversation, in place of all others but `id`; its last turn is the assistant's.
        answer_as: how the label was written, as in `answers.ANSWER_KINDS`; None where that is not a question.
        listed: texts that the prompt lists as options, where the choices are only their letters.
    """

    fields: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    label: int | None = None
    answer: str | None = None
    id: str | None = None
    turns: tuple[Turn, ...] = ()
    answer_as: str | None = None
    listed: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Texts that a prompt may list as options."""
        return self.listed or self.choices


@dataclass(frozen=True)
class Rendered:
    """An example, and what its prompt was made from.

    Attributes:
        example: the example.
        template: text of the prompt's template; None for a conversation.
        fields: values for the template, by name.
    """

    example: Example
    template: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(examples: Iterable[Example]) -> str:
    """Returns the SHA-256, in hex, of the examples as canonical JSON: equal for equal content in equal order."""
    digest = hashlib.sha256()
    for example in examples:
        text = json.dumps(vars(example), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
