"""Rows of a user's own files in any of several formats, and of folders of these as on the Hub."""

import json
import logging
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradpruner.files import user_path
from gradpruner.tasks.columns import DataError
from gradpruner.tasks.file_content import compression_of, damaged, kind_of, marked_encoding, open_content
from gradpruner.tasks.json_files import read_json
from gradpruner.tasks.sources import SourceRow
from gradpruner.tasks.table_files import read_csv, read_table

KIND_NAMES = {"json": "JSON", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow"}

logger = logging.getLogger(__name__)


def read_local(file: str | Path) -> Iterator[SourceRow]:
    """Yields the rows of a file: JSON (one object per line, or one array), CSV, TSV, Parquet or Arrow.

    gzip, bzip2, xz and Zstandard are unpacked. Text is UTF-8, or UTF-16 with a byte order mark; blank lines are
    skipped. Columns of a CSV file are separated by commas or, where its first line has none, by tabs, semicolons or
    bars.

    Raises:
        DataError: if the file is missing, empty, damaged, or of another kind.
    """
    path = user_path(file)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"A data file is missing: {found} was found at {path.absolute()}. Put a file with one JSON object a line "
            "there, or change dataset.path (a folder with train.jsonl and test.jsonl), with dataset=jsonl "
            "dataset.train_file and dataset.test_file."
        )
    if path.stat().st_size == 0:
        raise DataError(f"A data file is empty: {path.absolute()} has 0 bytes. Write one JSON object a line into it.")
    try:
        with open_content(path) as stream:
            head: bytes = stream.read(4096)
        kind, packed = kind_of(path, head), compression_of(path)
        if kind != "json" or packed:
            logger.info("%s is read as %s%s", path, KIND_NAMES[kind], f" in {packed}" if packed else "")
        if kind == "json":
            yield from read_json(path, marked_encoding(head) or json.detect_encoding(head))
        elif kind == "csv":
            yield from read_csv(path, head)
        else:
            yield from read_table(path, kind)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of an unpacker
            raise DataError(
                f"A data file cannot be opened: {path.absolute()}, got {error.strerror}. Check its permissions and its "
                "disk."
            ) from error
        raise damaged(path, error) from error


def read_folder(folder: Path, split: str, subset: str | None = None) -> Iterator[SourceRow]:
    """Yields the rows of one split of a folder: one that `save_to_disk` wrote, or one laid out as on the Hub.

    Args:
        folder: for example with `data/train-00000-of-00001.parquet`, or with `train.csv` and `test.csv`.
        split: name of the split in this folder.
        subset: configuration of a folder that has several.

    Raises:
        DataError: if the folder holds no data, or no such split, or no such subset.
    """
    import datasets

    is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found: Any = (
            datasets.load_from_disk(str(folder))
            if is_saved
            else datasets.load_dataset_builder(str(folder), subset).config.data_files
        )
    except Exception as error:  # the classes differ with the version of datasets
        reason = " ".join(str(error).split())
        raise DataError(
            f"A data folder cannot be read: {folder.absolute()}, got {type(error).__name__}: {reason}. Set "
            "dataset.train_file and dataset.test_file to files in it, or dataset.subset to one of its subsets."
        ) from error
    if isinstance(found, datasets.Dataset):
        yield from (SourceRow(f"{folder}: row {index}", dict(row)) for index, row in enumerate(found, start=1))
        return
    splits = {str(name): part for name, part in (found or {}).items()}
    if split not in splits:
        raise DataError(
            f"{folder.absolute()} has no split {split!r}, found {', '.join(splits) or 'none'}. Set "
            "dataset.train_split or dataset.test_split to one of these."
        )
    if is_saved:
        rows = enumerate(splits[split], start=1)
        yield from (SourceRow(f"{folder}/{split}: row {index}", dict(row)) for index, row in rows)
        return
    for file in splits[split]:
        yield from read_local(file)
