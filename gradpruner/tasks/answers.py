"""Answers to multiple-choice questions, as people write them: the text of an option, its letter, or its number."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gradpruner.tasks.columns import RowError
from gradpruner.tasks.example import Parsed

TEXT, LETTER, FROM_0, FROM_1 = "text", "letter", "index_from_0", "index_from_1"
ANSWER_KINDS = ("auto", TEXT, LETTER, FROM_0, FROM_1)
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")  # B, b, (B), B. and B:
_NUMBER = re.compile(r"[+-]?\d+(\.0+)?")  # a column of integers with gaps is written as 1.0, 2.0, ...

logger = logging.getLogger(__name__)


def read_label(value: Any, choices: Sequence[str], answer_as: str, what: str) -> tuple[int, str]:
    """Returns the 0-based position of the answer, and how it was written.

    `auto` takes text that equals one option for that option, else a letter for a letter, and integers and other digits
    for an index that counts from 0. An integer is refused where it is also an option, but not the one at that index.

    Args:
        value: the answer of a row.
        choices: texts of the options.
        answer_as: one of `ANSWER_KINDS`.
        what: names the column in messages.

    Raises:
        RowError: if no option is meant, or more than one may be.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and (isinstance(value, int) or answer_as != "auto")):
        raise RowError(f"{what} must be the index (an integer) or the text of a choice, got {type(value).__name__}")
    text = str(value).strip()
    matches = _matches(str(value), choices)
    if answer_as == TEXT or (answer_as == "auto" and isinstance(value, str) and matches):
        return _as_text(value, matches, choices, what), TEXT
    if answer_as == LETTER or (answer_as == "auto" and isinstance(value, str) and not _NUMBER.fullmatch(text)):
        return _as_letter(value, choices, what, must_be=answer_as == LETTER), LETTER
    index = _as_index(value, choices, 1 if answer_as == FROM_1 else 0, what)
    if answer_as == "auto" and matches and matches != [index]:
        raise RowError(
            f"{what} is {value!r}, which is the option {choices[matches[0]]!r} or the index of {choices[index]!r}; set "
            "dataset.answer_as=text or index_from_0"
        )
    return index, FROM_1 if answer_as == FROM_1 else FROM_0


def _matches(text: str, choices: Sequence[str]) -> list[int]:
    """Returns the positions of the options that equal a text or, if none does, that do so without outer spaces."""
    exact = [index for index, choice in enumerate(choices) if choice == text]
    return exact or [index for index, choice in enumerate(choices) if choice.strip() == text.strip()]


def _as_text(value: Any, matches: list[int], choices: Sequence[str], what: str) -> int:
    if len(matches) != 1:
        found = "none" if not matches else len(matches)
        raise RowError(f"{what} is the text {str(value)!r}, which {found} of the choices {list(choices)} equal")
    return matches[0]


def _as_letter(value: Any, choices: Sequence[str], what: str, must_be: bool) -> int:
    letter = _LETTER.fullmatch(str(value).strip())
    index = ord(letter[1].upper()) - ord("A") if letter else -1
    if 0 <= index < len(choices):
        return index
    last = chr(ord("A") + min(len(choices), 26) - 1)
    if must_be:
        raise RowError(f"{what} is {value!r}, which is not a letter from A to {last}")
    hint = f"; as a letter it is not one from A to {last}" if letter else ""
    raise RowError(f"{what} is the text {value!r}, which none of the choices {list(choices)} equal{hint}")


def _as_index(value: Any, choices: Sequence[str], first: int, what: str) -> int:
    if not _NUMBER.fullmatch(str(value).strip()):
        raise RowError(f"{what} is {value!r}, which is not an index, a whole number from {first} on")
    index = int(float(str(value))) - first
    if not 0 <= index < len(choices):
        other = {0: "; where 1 is the first, set dataset.answer_as=index_from_1"}.get(first, "")
        if first == 1 and index == -1:
            other = "; where 0 is the first, set dataset.answer_as=index_from_0"
        raise RowError(
            f"{what} is the index {value}, out of range for {len(choices)} choices ({first} is the first){other}"
        )
    return index


def warn_of_odd_answers(rows: Sequence[Parsed], answer_as: str, where: str) -> None:
    """Warns if answers are written in several ways, or if indices never name the first or the last option.

    Args:
        rows: all rows of a split.
        answer_as: the setting that they were read by.
        where: names the split in messages.
    """
    kinds = Counter(row.answer_as for row in rows if row.answer_as is not None)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} as {kind}" for kind, count in kinds.most_common())
        logger.warning(
            "%s: answers are read in %d ways (%s). If they are all of one kind, set dataset.answer_as to it.",
            *(where, len(kinds), counts),
        )
    for kind, other in ((FROM_0, FROM_1), (FROM_1, FROM_0)):
        own = [(row.label, len(row.choices)) for row in rows if row.answer_as == kind and row.label is not None]
        if not own or len(own) < 2 * max(size for _, size in own):  # too few to tell
            continue
        unnamed = [
            name
            for name, is_named in (
                ("first", any(label == 0 for label, _ in own)),
                ("last", any(label == size - 1 for label, size in own)),
            )
            if not is_named
        ]
        if unnamed:
            logger.warning(
                "%s: none of %d answers names the %s option. They are read as %s (dataset.answer_as=%s); if they "
                "count from %s, set dataset.answer_as=%s.",
                *(where, len(own), " or the ".join(unnamed), kind, answer_as, other[-1], other),
            )
