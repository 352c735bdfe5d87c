"""GradPruner+: our recommended recipe, built from GradPruner's own parts and our extensions."""

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.checks import AUTO
from gradpruner.grad_pruner import GradPruner
from gradpruner.method import Method
from gradpruner.repair import LEAST_SQUARES


@dataclass(frozen=True)
class GradPrunerPlus(GradPruner):
    """GradPruner with other defaults: repair instead of merging, and importance steps until the pruned set settles."""

    name: ClassVar[str] = "gradpruner_plus"

    merge_count: int = 0
    merge_rule: str = "none"
    repair: str = LEAST_SQUARES
    steps: int | str | None = AUTO

    @property
    def measured_as(self) -> type[Method]:
        """GradPruner, whose importance run this method shares."""
        return GradPruner
