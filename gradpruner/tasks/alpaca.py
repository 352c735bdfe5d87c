"""Alpaca: 52,002 instructions answered by a language model, for training only (Taori et al., 2023).

Source: `tatsu-lab/alpaca`; licence CC BY-NC 4.0. One split. The paper has no pre-training data for MINITRON's
distillation and uses this dataset instead (Section 4.2). A few rows of the Hub have an empty answer and are skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import check_text, take, take_text

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True, kw_only=True)
class Alpaca(Task):
    """Prompt field: `{request}`, instruction and input in Alpaca's own template. Train 52,002 rows, open answers."""

    name: ClassVar[str] = "alpaca"
    hub_id: ClassVar[str] = "tatsu-lab/alpaca"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("request",)
    missing_split: ClassVar[str] = "Name a dataset to test on, for example dataset.test=arc_easy."

    source: str = "hub"

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{instruction, input, output}`; input may be empty."""
        instruction, more = take_text(columns, "instruction"), take(columns, "input")
        if more == "":
            request = WITHOUT_INPUT.replace("{instruction}", instruction)
        else:
            check_text(more, "column 'input'")
            head, tail = WITH_INPUT.split("{instruction}")
            request = head + instruction + tail.replace("{input}", more)
        return Parsed({"request": request}, answer=take_text(columns, "output"))
