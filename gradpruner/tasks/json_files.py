"""Rows of a JSON file: one object per line, or one array of objects."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradpruner.tasks.columns import DataError
from gradpruner.tasks.file_content import damaged, open_content
from gradpruner.tasks.sources import SourceRow

logger = logging.getLogger(__name__)


def read_json(path: Path, encoding: str) -> Iterator[SourceRow]:
    """Yields the rows of a file with one object per line, one by one, or of a file that is one array.

    Raises:
        DataError: if a file over several lines is an array that is not valid, or a single object.
    """
    lines = _json_lines(path, encoding)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    try:
        is_array = isinstance(json.loads(line.decode("utf-8-sig")), list)
        is_whole = is_array  # one line is the whole array, unless more lines follow
    except (ValueError, RecursionError):
        is_array, is_whole = line.decode("utf-8-sig", "replace").lstrip().startswith("["), True
    if is_whole and (document := _read_document(path, encoding, is_array)) is not None:
        logger.info("%s is read as a JSON array", path)
        for index, columns in enumerate(document, start=1):
            yield _row(columns, f"{path}: row {index}")
        return
    yield _decode_line(line, f"{path}:{number}")
    for number, line in lines:
        if line.strip():
            yield _decode_line(line, f"{path}:{number}")


def _json_lines(path: Path, encoding: str) -> Iterator[tuple[int, bytes]]:
    """Yields the numbered lines of a file as UTF-8."""
    with open_content(path) as stream:
        if encoding.startswith("utf-8"):  # as bytes, so that a badly encoded line is reported by its number
            yield from ((number, line.rstrip(b"\r\n")) for number, line in enumerate(stream, start=1))
            return
        try:
            with io.TextIOWrapper(stream, encoding, newline="\n") as text:
                yield from ((number, line.rstrip("\r\n").encode()) for number, line in enumerate(text, start=1))
        except UnicodeError as error:
            raise damaged(path, error) from error


def _read_document(path: Path, encoding: str, is_array: bool) -> list[Any] | None:
    """Returns the items of a file that is one JSON array; None if its lines are documents of their own.

    Raises:
        DataError: if it is meant to be an array and is not valid, or is one object over several lines.
    """
    lines = [line for _, line in _json_lines(path, encoding)]
    try:
        text = b"\n".join(lines).decode("utf-8-sig")
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if not is_array or error.msg == "Extra data":
            return None
        is_comma = text[: error.pos].rstrip().endswith(",") and text[error.pos : error.pos + 1] in "]}"
        raise DataError(
            f"A data file is not a valid JSON array: {path.absolute()}: {error}"
            f"{', after a comma that is one too many' if is_comma else ''}. Correct it there, or write one "
            "JSON object a line."
        ) from error
    except (ValueError, RecursionError):  # badly encoded: the lines say where
        return None
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or len(lines) == 1:
        return None
    lists = [name for name, value in document.items() if isinstance(value, list)]
    raise DataError(
        f"A data file has no rows: {path.absolute()} is one JSON object with {', '.join(document)}. Give its rows "
        f"as an array: `jq '.{lists[0] if lists else 'NAME'}' {path.name} > rows.json`."
    )


def _decode_line(line: bytes, where: str) -> SourceRow:
    try:
        columns = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]  # not line[...]: a byte order mark is not counted
        problem = f"not UTF-8: byte 0x{byte:02x} at position {error.start} of the line"
        return SourceRow(where, problem=problem + "; `iconv -f latin1 -t utf-8` converts a file from Latin-1")
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python converts
        is_comma = line.rstrip().endswith(b"},") and str(error).startswith("Extra data")
        hint = "; a line must not end in a comma" if is_comma else ""
        hint = "; an object must be on one line" if line.strip() == b"{" else hint
        return SourceRow(where, problem=f"not valid JSON: {error}{hint}")
    return _row(columns, where)


def _row(columns: Any, where: str) -> SourceRow:
    if not isinstance(columns, dict):
        return SourceRow(where, problem=f"must be a JSON object with named columns, got {type(columns).__name__}")
    return SourceRow(where, columns)
