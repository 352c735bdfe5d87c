"""Errors of the data layer, and typed access to the columns of one row.

A reader of rows (`parse` of a task) asks for a column and gets it, or a `RowError` that says what is wrong. `Task.load`
adds the place (file and line) and reports all bad rows at once.
"""

import ast
import contextlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradpruner.checks import guess

_MISSING = object()
_ITEM = re.compile(r"\[(-?\d+)\]\.?")


class DataError(ValueError):
    """A dataset, its settings or its files cannot be used."""


class RowError(ValueError):
    """One row cannot be used; the message is the reason, without the place."""


def take(columns: Mapping[str, Any], name: str) -> Any:
    """Returns a column of any type except null; see `find` for names of nested values.

    Raises:
        RowError: if the column is missing (the message lists the columns found) or null.
    """
    value = find(columns, name, f"column {name!r} is missing; columns found")
    if value is None:
        raise RowError(f"column {name!r} is null")
    return value


def find(columns: Mapping[str, Any], path: str, problem: str) -> Any:
    """Returns the value of a column, or a value in it: `doc.title`, `answers.text[0]`, `turns[-1].content`.

    A name may have spaces, dots and brackets of its own: what is a column's whole name is that column. Where no name
    fits, one fits that looks the same and has its accents composed in another way (Unicode's NFC and NFD).

    Args:
        columns: the row.
        path: name of the column, with the names and 0-based indices that lead into it.
        problem: start of the message, before the list of names.

    Raises:
        RowError: if there is no such value.
    """
    value = _follow(columns, path)
    if value is _MISSING:
        value = _follow(_composed(columns), unicodedata.normalize("NFC", path))
    if value is _MISSING:
        known = dict(_names(columns))
        listed = ", ".join(name + note for name, note in known.items())
        raise RowError(f"{problem}: {listed or 'none'}{guess(path, known)}")
    return value


def _follow(value: Any, path: str) -> Any:
    if not path:
        return value
    if isinstance(value, Mapping):
        for end in range(len(path), 0, -1):  # the longest name first
            rest = path[end:]
            if path[:end] in value and (not rest or rest[0] == "[" or (rest[0] == "." and len(rest) > 1)):
                found = _follow(value[path[:end]], rest.removeprefix("."))
                if found is not _MISSING:
                    return found
    elif isinstance(value, list | tuple) and (item := _ITEM.match(path)):
        index = int(item[1])
        if -len(value) <= index < len(value):
            return _follow(value[index], path[item.end() :])
    return _MISSING


def _composed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {unicodedata.normalize("NFC", str(key)): _composed(item) for key, item in value.items()}
    return [_composed(item) for item in value] if isinstance(value, list | tuple) else value


def _names(columns: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names of all values that are no objects, with a note where they are empty lists."""
    for key, value in columns.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " (an empty list)" if value == [] else ""


def take_text(columns: Mapping[str, Any], name: str) -> str:
    """Returns a column that holds non-blank text, unchanged.

    Raises:
        RowError: if the column is missing, null, not a string, blank, or not representable in UTF-8.
    """
    return check_text(take(columns, name), f"column {name!r}")


def take_texts(columns: Mapping[str, Any], name: str, what: str | None = None) -> tuple[str, ...]:
    """Returns a column that holds a list of non-blank strings.

    Args:
        columns: the row.
        name: column to take.
        what: name of the column in messages, if it is nested in another one.

    Raises:
        RowError: if the column is missing, null, or not a list, or if an item is not a string or is blank.
    """
    what = what or f"column {name!r}"
    value = take(columns, name)
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} must be a list of strings, got {type(value).__name__}")
    return tuple(check_text(item, f"{what}[{index}]") for index, item in enumerate(value))


def take_options(columns: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Returns a column that holds a list of options: text, numbers or booleans, or the whole list as text.

    Raises:
        RowError: as for `take_texts`, or if text is no list.
    """
    value = parse_list(take(columns, name), f"column {name!r}")
    if not isinstance(value, list | tuple):
        raise RowError(f"column {name!r} must be a list of strings, got {type(value).__name__}")
    texts = [as_text(item, f"column {name!r}[{index}]") for index, item in enumerate(value)]
    return tuple(check_text(text, f"column {name!r}[{index}]") for index, text in enumerate(texts))


def parse_list(value: Any, what: str) -> Any:
    """Returns the list that a text holds, in JSON's or Python's spelling; a cell of a CSV file holds no other lists.

    Args:
        value: the text; anything else is returned unchanged.
        what: names it in the message.

    Raises:
        RowError: if the text is no list.
    """
    if not isinstance(value, str):
        return value
    found = None
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError):
            found = found or parse(value.strip())
    if not isinstance(found, list):
        raise RowError(f"{what} must be a list, got the text {value[:80]!r}, which is no list in JSON")
    return found


def take_label(columns: Mapping[str, Any], name: str, known: Sequence[str]) -> int:
    """Returns the position of a label among the known ones.

    Args:
        columns: the row.
        name: column with the label, as text or as an integer: datasets use both for the same labels.
        known: all labels, in the order of the choices.

    Raises:
        RowError: if the column is missing, null, of another type, or not a known label.
    """
    value = take(columns, name)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError(f"column {name!r} must be text or an integer, got {type(value).__name__}")
    if str(value) not in known:
        hint = " (is this an unlabelled split?)" if value in ("", -1) else ""
        raise RowError(f"column {name!r} is {value!r}, which is not one of the labels {', '.join(known)}{hint}")
    return known.index(str(value))


def take_id(columns: Mapping[str, Any], name: str) -> str:
    """Returns a column that holds non-blank text or an integer, as text.

    Raises:
        RowError: if the column is missing, null, of another type, or blank.
    """
    value = take(columns, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, f"id column {name!r}")


def as_text(value: Any, what: str) -> str:
    """Returns text unchanged, and numbers and booleans as JSON writes them; the text may be blank.

    Raises:
        RowError: if it is anything else, such as null or NaN, or not representable in UTF-8.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise RowError(f"{what} must be text or a number, got {'null' if value is None else type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # Python's JSON has NaN, for a missing number
        raise RowError(f"{what} must be text or a number, got {value}")
    if isinstance(value, str):
        check_encodable(value, what)
    return str(value)


def check_text(value: Any, what: str) -> str:
    """Returns `value` unchanged if it is usable text.

    Raises:
        RowError: if it is not a string, blank, or not representable in UTF-8 (`what` names it in the message).
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, got {'null' if value is None else type(value).__name__}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    check_encodable(value, what)
    return value


def check_encodable(value: str, what: str) -> None:
    """Refuses text that UTF-8 cannot represent.

    Raises:
        RowError: if it holds half of a surrogate pair (`what` names it in the message).
    """
    # JSON accepts \ud800 to \udfff without a partner; they would crash a tokenizer hours later.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half of a surrogate pair, which is not valid text") from error
