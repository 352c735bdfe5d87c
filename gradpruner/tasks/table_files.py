"""Rows of CSV, TSV, Parquet and Arrow files.

pandas reads CSV and pyarrow reads the others, as they do for the `datasets` library, which brings both. Cells of a CSV
file remain text: `datasets` would make the number 7 of 007, and nothing of an answer `None`.
"""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from gradpruner.tasks.columns import DataError
from gradpruner.tasks.file_content import damaged, marked_encoding, open_content
from gradpruner.tasks.sources import SourceRow

SEPARATORS = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a bar"}
ROWS_AT_ONCE = 1000  # rows in memory


def read_csv(path: Path, head: bytes) -> Iterator[SourceRow]:
    """Yields the rows of a CSV or TSV file, whose first line names the columns.

    Args:
        path: the file.
        head: its first bytes, unpacked.

    Raises:
        DataError: if the text cannot be decoded, or lines have more cells than the first.
    """
    import pandas  # takes a second to import, and JSON does not need it

    encoding = marked_encoding(head) or "utf-8"
    header = head.decode(encoding, "replace").lstrip("\r\n").splitlines()[0] if head.strip() else ""
    usual = "\t" if any(suffix.lower() in (".tsv", ".tab") for suffix in path.suffixes) else ","
    separator = next((each for each in (usual, *SEPARATORS) if each in header), usual)
    number = 0
    try:
        with open_content(path) as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
            # Without `index_col`, lines with one cell more than the header would shift all columns by one.
            options = {"dtype": str, "keep_default_na": False, "index_col": False}
            chunks = pandas.read_csv(text, sep=separator, chunksize=ROWS_AT_ONCE, **options)
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", pandas.errors.ParserWarning)
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                for row in chunk.to_dict("records"):
                    number += 1
                    cells = {str(name): cell if isinstance(cell, str) else None for name, cell in row.items()}
                    yield SourceRow(f"{path}: row {number}", cells)
    except UnicodeError as error:
        raise DataError(
            f"A data file is not {encoding.upper()}: {path.absolute()}{_undecodable(path)}. Save it as UTF-8: "
            f"`iconv -f latin1 -t utf-8 {path.name}` converts it from Latin-1, with -f gbk from GBK."
        ) from error
    except (pandas.errors.ParserError, pandas.errors.ParserWarning, pandas.errors.EmptyDataError) as error:
        raise DataError(
            f"A data file is not a valid table: {path.absolute()}: {' '.join(str(error).split()).rstrip('.')}. Its "
            f"columns are separated by {SEPARATORS[separator]}; every line needs as many as the first, and text with "
            "separators, quotes or line breaks needs quotes around it."
        ) from error


def _undecodable(path: Path) -> str:
    """Returns where the first byte is that UTF-8 does not know, as `:line: byte`."""
    with open_content(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f":{number}: byte 0x{line[error.start]:02x} at position {error.start} of the line"
    return ""


def read_table(path: Path, kind: str) -> Iterator[SourceRow]:
    """Yields the rows of a `parquet` or `arrow` file.

    Raises:
        DataError: if the file is damaged.
    """
    import pyarrow
    from pyarrow import ipc, parquet

    number = 0
    try:
        with open_content(path) as stream:
            source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
            if kind == "parquet":
                batches = parquet.ParquetFile(source).iter_batches(ROWS_AT_ONCE)
            elif stream.read(6) == b"ARROW1":
                batches = iter(ipc.open_file(source).read_all().to_batches(ROWS_AT_ONCE))
            else:
                stream.seek(0)
                batches = iter(ipc.open_stream(source))
            for batch in batches:
                for columns in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path}: row {number}", columns)
    except pyarrow.ArrowException as error:
        raise damaged(path, error) from error
