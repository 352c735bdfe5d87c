"""FinGPT sentiment: is a piece of financial news negative, neutral or positive? (Yang et al., arXiv:2306.06031).

Source: `FinGPT/fingpt-sentiment-train`, 76,772 rows in one split, compiled from Financial PhraseBank, FiQA, Twitter
financial news and news labelled by a language model; the Hub states no licence for the whole; its parts are under CC
BY-NC-SA 3.0, MIT and unstated ones. The paper draws 40,000 random training rows of "76,000" (Appendix C.1) and does not
say which rows it tests on. Here a tenth of the texts is held out by a hash of the text, so that a text that occurs
several times is never on both sides.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.tasks.base import Parsed, Task
from gradpruner.tasks.columns import RowError, check_text, take_label, take_text
from gradpruner.tasks.sources import SourceRow

HELD_OUT_EVERY = 10  # one of ten texts is a test text
_OPTIONS = re.compile(r"\{([^{}]+/[^{}]+)\}")


@dataclass(frozen=True, kw_only=True)
class FinGpt(Task):
    """Prompt fields: `{instruction}`, which names the options, and `{input}`. 76,772 rows, a tenth for testing."""

    name: ClassVar[str] = "fingpt"
    hub_id: ClassVar[str] = "FinGPT/fingpt-sentiment-train"
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "train"}
    sources: ClassVar[tuple[str, ...]] = ("hub", "local")
    prompt_fields: ClassVar[tuple[str, ...] | None] = ("instruction", "input")

    source: str = "hub"

    def rows(self, split: str) -> Iterator[SourceRow]:
        """Yields the rows of a split; the Hub's only split is divided by whether a row's text is held out."""
        for row in super().rows(split):
            if self.source != "hub" or is_held_out(str(row.columns.get("input"))) == (split == "test"):
                yield row

    def parse(self, columns: Mapping[str, Any]) -> Parsed:
        """Reads `{instruction, input, output}`; the instruction ends with "choose an answer from {a/b/c}."."""
        instruction = take_text(columns, "instruction")
        found = _OPTIONS.search(instruction)
        if found is None:
            raise RowError(f"column 'instruction' must name the options as {{a/b/c}}, got {instruction!r}")
        options = tuple(check_text(text, "an option of column 'instruction'").strip() for text in found[1].split("/"))
        answer = {"output": take_text(columns, "output").strip()}
        return Parsed(
            {"instruction": instruction, "input": take_text(columns, "input")},
            options,
            take_label(answer, "output", options),
        )


def is_held_out(text: str) -> bool:
    """Returns whether a text belongs to the test split."""
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), 16) % HELD_OUT_EVERY == 0
