"""The dense model, with nothing pruned: the reference in every table."""

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """A method that leaves the model unchanged."""

    name: ClassVar[str] = "dense"
