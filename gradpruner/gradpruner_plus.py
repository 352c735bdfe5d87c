"""GradPruner+: the recipe that we recommend, built from GradPruner's own parts and what goes beyond the paper."""

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.checks import AUTO
from gradpruner.grad_pruner import LEAST_SQUARES, GradPruner
from gradpruner.method import Method


@dataclass(frozen=True)
class GradPrunerPlus(GradPruner):
    """GradPruner with other defaults: closed-form repair in place of merging, and as many steps as the set needs."""

    name: ClassVar[str] = "gradpruner_plus"

    merge_count: int = 0
    merge_rule: str = "none"
    repair: str = LEAST_SQUARES
    steps: int | str | None = AUTO

    @property
    def measured_as(self) -> type[Method]:
        """GradPruner's importance run."""
        return GradPruner
