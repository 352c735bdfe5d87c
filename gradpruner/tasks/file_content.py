"""What a data file holds: unpacking, the kind of its content, its encoding, and what is wrong with it."""

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gradpruner.tasks.columns import DataError

# First bytes of a compressed file -> the name of the compression.
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
# First bytes of files that hold no rows -> what they are, and what to do.
FOREIGN = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "Unpack it, or save the sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "Save the sheet as CSV"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file that it stands for", "Run `git lfs pull`"),
    b"<!DOCTYPE": ("a web page", "Download the file itself"),
    b"<html": ("a web page", "Download the file itself"),
    b"SQLite format 3": ("an SQLite database", "Export the table as CSV"),
}
SUFFIXES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv", ".tab"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".arrow": "arrow",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def compression_of(path: Path) -> str | None:
    """Returns the name of a file's compression, by its first bytes; None if it is not compressed."""
    with path.open("rb") as stream:
        start = stream.read(8)
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def open_content(path: Path) -> BinaryIO:
    """Opens a file for reading its content, unpacked if it is compressed."""
    openers: dict[str, Callable[[Path], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "Zstandard": _open_zstd,
    }
    packed = compression_of(path)
    opened: BinaryIO = path.open("rb") if packed is None else openers[packed](path)
    return opened


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow  # takes a while to import, and other files do not need it

    unpacked: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(unpacked)


def kind_of(path: Path, head: bytes) -> str:
    """Returns `json`, `csv`, `parquet` or `arrow`, by the first bytes of the content and by the file's name."""
    for magic, (what, advice) in FOREIGN.items():
        if head.lower().startswith(magic.lower()):
            raise DataError(f"A data file is of another kind: {path.absolute()} is {what}. {advice}.")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED_SUFFIXES]
    named = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if head.startswith((b"PAR1", b"ARROW1")):
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    if named == "parquet":
        raise damaged(path, "its content is not Parquet")
    if named == "arrow":
        return named
    start = head.decode(marked_encoding(head) or json.detect_encoding(head), "replace").lstrip()
    if start.startswith(("{", "[")) and (named != "csv" or start[1:].lstrip().startswith(('"', "{"))):
        return "json"
    if named == "csv":
        return named
    first = start.split("\n")[0].rstrip()[:80]
    if not first and named == "json":
        return named  # blank lines only, which have no rows
    raise DataError(
        f"A data file is not what its name says: {path.absolute()} does not begin like JSON, its first line is "
        f"{first!r}. If it is CSV, let its name end in .csv; else write one JSON object a line."
    )


def marked_encoding(head: bytes) -> str | None:
    """Returns the encoding that a byte order mark gives; None without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def damaged(path: Path, error: Exception | str) -> DataError:
    """Returns the error for a file whose content breaks the rules of its kind."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return DataError(f"A data file is damaged: {path.absolute()} cannot be read ({reason}). Copy or download it again.")
