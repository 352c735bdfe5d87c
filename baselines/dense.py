"""The dense model: nothing is pruned. The reference of every table."""

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """Leaves the model as it is."""

    name: ClassVar[str] = "dense"
