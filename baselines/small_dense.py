"""Another, smaller dense model, fine-tuned in place of the pruned one: the paper's row FT(Llama3.2-3B)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.method import Method
from gradpruner.models.spec import ModelSpec


@dataclass(frozen=True)
class SmallDense(Method):
    """Leaves the smaller model as it is. Ratios in the record are to the dense model that `model` names.

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
        """The smaller model, with the dense one's dtype, attention and chat template."""
        return dataclasses.replace(model, path=self.path, revision=self.revision, config=self.config)

    def variant(self) -> str:
        """Which model."""
        return ModelSpec(self.path).name
