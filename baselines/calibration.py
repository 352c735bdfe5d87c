"""Calibration rows: the rows of the downstream training split that baselines use (Section 4.2)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gradpruner.checks import check_positive
from gradpruner.encoding import Batch
from gradpruner.method import Calibration, Method


@dataclass(frozen=True)
class Calibrated(Method):
    """Base of the methods that use calibration rows, each row at most once.

    Attributes:
        num_rows: training rows to use; all of them if there are fewer.
        batch_size: rows per batch; changes speed and memory, not scores, unless the method says so.
        seed: seed of the row sample.
    """

    num_rows: int = 256
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_positive(self, "num_rows", "batch_size")

    def calibration(self) -> Calibration:
        """Returns which rows of the training split to use, each at most once."""
        return Calibration(self.batch_size, self.num_rows, self.seed, once=True)

    def measurement_settings(self) -> dict[str, Any]:
        """Returns the row settings; scores serve every budget."""
        return {"num_rows": self.num_rows, "batch_size": self.batch_size, "seed": self.seed}


def checked(batches: Iterable[Batch], method: Method) -> list[Batch]:
    """Returns the batches as a list.

    Raises:
        ValueError: if there are no batches.
    """
    taken = list(batches)
    if not taken:
        raise ValueError(f"method={method.name} looks at data, got no batches. Give compress() some.")
    return taken


def real_tokens(batch: Batch, device: torch.device) -> torch.Tensor:
    """Returns a mask of the tokens that are not padding, (B, T) bool."""
    return batch["attention_mask"].to(device).bool()
