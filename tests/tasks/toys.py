"""A dataset that only has multiple-choice questions, to test what all datasets share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradpruner.tasks import Task
from gradpruner.tasks.base import Parsed
from gradpruner.tasks.columns import take_label, take_text, take_texts


@dataclass(frozen=True, kw_only=True)
class Toy(Task):
    name: ClassVar[str] = "toy"
    hub_id: ClassVar[str] = "owner/toy"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "part"}
    packaged_files: ClassVar[Mapping[str, str]] = {"train": "toy.jsonl.gz"}
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)
    missing_split: ClassVar[str] = "Test on another toy."

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        choices = take_texts(columns, "choices")
        label = take_label(columns, "label", [str(index) for index in range(len(choices))])
        return Parsed({"question": take_text(columns, "question")}, choices, label, id=columns.get("id"))


def row(**changes: Any) -> dict[str, Any]:
    return {"question": "Why?", "choices": ["a", "b"], "label": 1} | changes


def toy(folder: Path | None = None, cls: type[Toy] = Toy, **changes: Any) -> Toy:
    settings = {"source": "local", "path": str(folder), "prompt": "Q: {question}\nA:", "choice": " {choice}"}
    return cls(**(settings | changes))


def write(folder: Path, *lines: Any, name: str = "train.jsonl") -> None:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / name).write_bytes(b"\n".join(encoded) + b"\n")
