"""Atomic writes (a reader sees the whole old file or the whole new one) and hashes of JSON-ready data."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_HASHED_BYTES = 4 * 2**30  # above this, hashing weights would take longer than a small run


def user_path(text: str | Path) -> Path:
    """Returns a path with `~` and `~user` expanded, which a shell does not do in `KEY=~/...`."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises where there is no such user


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` through a temporary file in the same folder, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON; a NaN becomes an error rather than invalid JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a file that `write_jsonl` wrote."""
    # Bytes, because text may hold U+2028 and other characters that str.splitlines takes for the end of a line.
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def content_hash(data: Any) -> str:
    """Returns 20 hex digits that identify JSON-ready data, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def hash_files(paths: Iterable[Path]) -> str:
    """Returns 64 hex digits that identify files by name and content, or above 4 GB in all, by name, size and time."""
    files = sorted(paths)
    digest = hashlib.sha256()
    hash_content = sum(file.stat().st_size for file in files) <= MAX_HASHED_BYTES
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name}:{stat.st_size}:".encode())
        if hash_content:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()


def slug(text: str) -> str:
    """Returns a text as part of a file name: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
