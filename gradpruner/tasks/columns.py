"""Errors of the data layer, and typed access to the columns of one row.

A reader of rows (`parse` of a task) asks for a column and gets it, or a `RowError` that says what is wrong. `Task.load`
adds the place (file and line) and reports all bad rows at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class DataError(ValueError):
    """A dataset, its settings or its files cannot be used."""


class RowError(ValueError):
    """One row cannot be used; the message is the reason, without the place."""


def take(columns: Mapping[str, Any], name: str) -> Any:
    """Returns a column of any type except null.

    Raises:
        RowError: if the column is missing (the message lists the columns found) or null.
    """
    if name not in columns:
        raise RowError(f"column {name!r} is missing; columns found: {', '.join(map(str, columns)) or 'none'}")
    if columns[name] is None:
        raise RowError(f"column {name!r} is null")
    return columns[name]


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
