"""MedMCQA: four-option questions of Indian medical entrance examinations (Pal et al., arXiv:2203.14371).

Source: `openlifescienceai/medmcqa`; licence Apache-2.0 on the Hub, MIT in the authors' repository. 182,822 train and
4,183 validation rows; the official test split (6,150 rows) has no labels, so validation is the test split here. The
paper draws 40,000 random training rows (Appendix C.1) and reports BERTScore and ROUGE-L; it does not say whether the
options are in the prompt or what the reference is. Here the prompt lists the options, and the reference is the text of
the right one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import take_label, take_text

OPTIONS = ("opa", "opb", "opc", "opd")


@dataclass(frozen=True, kw_only=True)
class MedMcqa(Task):
    """Prompt field: `{question}`. Train 182,822 rows; test is the official validation split, 4,183 rows."""

    name: ClassVar[str] = "medmcqa"
    hub_id: ClassVar[str] = "openlifescienceai/medmcqa"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)

    source: str = "hub"

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{id, question, opa, opb, opc, opd, cop}`; cop is 0 to 3 (1 to 4 in the authors' own files)."""
        choices = tuple(take_text(columns, name) for name in OPTIONS)
        label = take_label(columns, "cop", ("0", "1", "2", "3"))
        return Parsed({"question": take_text(columns, "question")}, choices, label, id=take_text(columns, "id"))
