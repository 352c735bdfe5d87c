"""PubMedQA: questions about biomedical abstracts, answered by their conclusion (Jin et al., arXiv:1909.06146).

Source: `qiaojin/PubMedQA`, configuration `pqa_labeled`, 1,000 rows in one split; licence MIT. The official division
into 500 for training and 500 for testing is not on the Hub; `pubmedqa_train_ids.txt` holds it. The paper speaks of
"19717 scientific publications [...] of diabetes" (Appendix C.1), which describes another dataset of that name; its
scores (0.59 to 0.61 by BERTScore and ROUGE-L) fit answers of a sentence or two, as `target=long_answer` asks for, not a
yes or no.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task, check_target
from gradpruner.tasks.columns import RowError, check_text, take, take_id, take_label, take_text, take_texts
from gradpruner.tasks.sources import SourceRow

TARGETS = ("long_answer", "final_decision")
DECISIONS = ("yes", "no", "maybe")


@dataclass(frozen=True, kw_only=True)
class PubMedQa(Task):
    """Prompt fields: `{context}` (the abstract without its conclusion) and `{question}`. Train 500 and test 500 rows.

    Attributes:
        target: `long_answer`, the conclusion in words (open answers), or `final_decision`, yes, no or maybe (choices).
    """

    name: ClassVar[str] = "pubmedqa"
    hub_id: ClassVar[str] = "qiaojin/PubMedQA"
    hub_config: ClassVar[str | None] = "pqa_labeled"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "train"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("context", "question")

    source: str = "hub"
    target: str = "long_answer"

    def __post_init__(self) -> None:
        """Checks the settings."""
        super().__post_init__()
        check_target(self, self.target, TARGETS)

    @property
    def context_field(self) -> str | None:
        """The abstract."""
        return "context"

    def rows(self, split: str) -> Iterator[SourceRow]:
        """Yields the rows of a split; the Hub's only split is divided by the official list of `pubid`s."""
        for row in super().rows(split):
            if self.source != "hub" or (str(row.columns.get("pubid")) in _train_ids()) == (split == "train"):
                yield row

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{pubid, question, context: {contexts, ...}, long_answer, final_decision}`."""
        nested = take(columns, "context")
        if not isinstance(nested, Mapping):
            raise RowError(f"column 'context' must be an object with a list contexts, got {type(nested).__name__}")
        context = "\n".join(take_texts(nested, "contexts", "column 'context.contexts'"))
        fields = {
            "context": check_text(context, "column 'context.contexts'"),  # the list may be empty
            "question": take_text(columns, "question"),
        }
        row_id = take_id(columns, "pubid")
        if self.target == "long_answer":
            return Parsed(fields, answer=take_text(columns, "long_answer"), id=row_id)
        return Parsed(fields, DECISIONS, take_label(columns, "final_decision", DECISIONS), id=row_id)


@lru_cache(maxsize=1)
def _train_ids() -> frozenset[str]:
    """Returns the `pubid`s of the official training rows, as text."""
    return frozenset(Path(__file__).with_name("pubmedqa_train_ids.txt").read_text().split())
