"""A smaller dense model, fine-tuned in place of the pruned one: the paper's row FT(Llama3.2-3B)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.method import Method
from gradpruner.models.spec import ModelSpec


@dataclass(frozen=True)
class SmallDense(Method):
    """The smaller model, unchanged. Ratios in the record are relative to the dense model that `model` names.

    Attributes:
        path: the smaller model, as in `ModelSpec.path`.
        revision: Hub branch, tag or commit.
        config: config values of a `random:` model.
    """

    name: ClassVar[str] = "small_dense"

    path: str
    revision: str | None = None
    config: dict[str, Any] | None = None

    def base_model(self, model: ModelSpec) -> ModelSpec:
        """Returns the smaller model, with the dense one's dtype, attention and chat template."""
        return dataclasses.replace(model, path=self.path, revision=self.revision, config=self.config)

    def variant(self) -> str:
        """Returns the name of the smaller model."""
        return ModelSpec(self.path).name
