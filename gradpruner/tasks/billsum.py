"""BillSum: summaries of US Congressional and California bills (Kornilova and Eidelman, D19-5406).

Source: `FiscalNote/billsum`; licence CC0-1.0. 18,949 train and 3,269 test rows of US bills (1,237 California bills are
in a separate split, `ca_test`, which is not read). The paper counts BillSum among the financial datasets but does not
give the prompt, the length at which bills are cut, or the split (Appendix C.1). A bill has 9,500 characters on average;
with `max_length=2048`, as in the YAML, two thirds of the bills in our sample were shortened at their end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import take_text


@dataclass(frozen=True, kw_only=True)
class BillSum(Task):
    """Prompt field: `{text}`, shortened where it is too long. Train 18,949 and test 3,269 rows, open answers."""

    name: ClassVar[str] = "billsum"
    hub_id: ClassVar[str] = "FiscalNote/billsum"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("text",)

    source: str = "hub"

    @property
    def context_field(self) -> str | None:
        """The bill."""
        return "text"

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{text, summary}`; the title is not used."""
        return Parsed({"text": take_text(columns, "text")}, answer=take_text(columns, "summary"))
