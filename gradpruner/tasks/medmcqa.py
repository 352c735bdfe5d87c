"""MedMCQA: four-option questions of Indian medical entrance examinations (Pal et al., arXiv:2203.14371).

Source: `openlifescienceai/medmcqa`; licence Apache-2.0 on the Hub, MIT in the authors' repository. 182,822 train and
4,183 validation rows; the official test split (6,150 rows) has no labels, so validation is the test split here. The
paper draws 40,000 random training rows (Appendix C.1) and reports BERTScore and ROUGE-L; it does not say what the
prompt and the reference are.

Our values do not compare with the paper's (`paper_comparable`). Here the prompt lists the options, and the reference is
the text of the right one. Picking one at random then has a ROUGE-L of 0.38 and a BERTScore of at least 0.87 (1 for the
right option, and the 0.83 of unrelated sentences for the others), so a similarity of at least 0.62, and more because
options resemble one another. The paper has 0.50 to 0.64 after fine-tuning models of 7 and 8 billion parameters, and
0.43 for Llama-3.2-1B: its task cannot have been this one. `target=open_answer` asks for the text without options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task, check_target, lettered
from gradpruner.tasks.columns import take_label, take_text

OPTIONS = ("opa", "opb", "opc", "opd")
TARGETS = ("text", "letter", "open_answer")


@dataclass(frozen=True, kw_only=True)
class MedMcqa(Task):
    """Prompt field: `{question}`. Train 182,822 rows; test is the official validation split, 4,183 rows.

    Attributes:
        target: `text`, the text of the right option; `letter`, its letter, A to D; `open_answer`, the text, of a
            question without choices, whatever `show_options` says. Some questions make no sense then ("Which of the
            following is true?").
    """

    name: ClassVar[str] = "medmcqa"
    hub_id: ClassVar[str] = "openlifescienceai/medmcqa"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)
    paper_comparable: ClassVar[bool] = False

    source: str = "hub"
    target: str = "text"

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        check_target(self, self.target, TARGETS)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{id, question, opa, opb, opc, opd, cop}`; cop is 0 to 3 (1 to 4 in the authors' own files)."""
        choices = tuple(take_text(columns, name) for name in OPTIONS)
        label = take_label(columns, "cop", ("0", "1", "2", "3"))
        fields, row_id = {"question": take_text(columns, "question")}, take_text(columns, "id")
        if self.target == "open_answer":
            return Parsed(fields, answer=choices[label], id=row_id)
        parsed = Parsed(fields, choices, label, id=row_id)
        return lettered(parsed) if self.target == "letter" else parsed
