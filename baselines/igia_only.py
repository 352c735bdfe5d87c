"""GradPruner without merging: the paper's "w/o Merging" (Tables 3 and 4, Figures 5 and 8), at the same budget."""

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.grad_pruner import GradPruner
from gradpruner.method import Method


@dataclass(frozen=True)
class IgiaOnly(GradPruner):
    """GradPruner that discards the pruned layers; the two methods share one importance run."""

    name: ClassVar[str] = "igia_only"

    merge_count: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError if the settings ask for a merge."""
        super().__post_init__()
        if self.merge_count or self.merged_layers:
            raise ValueError(
                f"igia_only merges nothing, got merge_count={self.merge_count} and merged_layers={self.merged_layers}. "
                "Use method=gradpruner, or set method.merge_count=0."
            )

    @property
    def measured_as(self) -> type[Method]:
        """Returns `GradPruner`, whose importance run this method shares."""
        return GradPruner
