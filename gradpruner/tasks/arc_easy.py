"""ARC-Easy: grade-school science questions with three to five choices (Clark et al., arXiv:1803.05457).

Source: `allenai/ai2_arc`, configuration `ARC-Easy`; licence CC BY-SA 4.0. 2,251 train and 2,376 test rows, the official
splits. The paper reports accuracy of generated answers (Section 4.1) and does not give the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import RowError, take, take_label, take_text, take_texts


@dataclass(frozen=True, kw_only=True)
class ArcEasy(Task):
    """Prompt field: `{question}`. Train 2,251 and test 2,376 questions, the official splits."""

    name: ClassVar[str] = "arc_easy"
    hub_id: ClassVar[str] = "allenai/ai2_arc"
    hub_config: ClassVar[str | None] = "ARC-Easy"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    packaged_files: ClassVar[Mapping[str, str]] = {
        "train": "oe_eval_tasks/arc_easy/train_rc_5shot/requests.jsonl.gz",
        "test": "oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
    }
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{id, question, choices: {text, label}, answerKey}`; labels are letters, or digits in some rows."""
        question = take_text(columns, "question")
        nested = take(columns, "choices")
        if not isinstance(nested, Mapping):
            raise RowError(f"column 'choices' must be an object with lists text and label, got {type(nested).__name__}")
        texts = take_texts(nested, "text", "column 'choices.text'")
        labels = take_texts(nested, "label", "column 'choices.label'")
        if len(texts) != len(labels) or len(set(labels)) != len(labels):
            raise RowError(f"column 'choices' must have one label for each of {len(texts)} texts, got {labels}")
        answer = take_label(columns, "answerKey", labels)
        return Parsed({"question": question}, texts, answer, id=take_text(columns, "id"))

    def unpack(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        r"""Converts `{id, query: "Question: ...\nAnswer:", choices, gold}`, which does not preserve the label style."""
        labels = list("ABCDE"[: len(document["choices"])])
        return {
            "id": document["id"],
            "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }
