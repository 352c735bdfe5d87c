"""GradPruner: prune and merge the layers of a language model that a task does not need, guided by early gradients.

Library use:

    from gradpruner import GradPruner
    compressed = GradPruner(num_pruned_layers=12, merge_count=3).compress(model, batches)
    compressed.model.save_pretrained("pruned")
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpruner.grad_pruner import GradPruner
    from gradpruner.method import Compressed
    from gradpruner.plan import PruningPlan

__all__ = ["Compressed", "GradPruner", "PruningPlan"]
__version__ = "0.1.0"

# peft imports bitsandbytes and torchao wherever they are installed, and they warn about kernels that are missing.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Imports a name on first use: `gradpruner.merge` and `gradpruner.plan` alone must not import transformers."""
    if name == "GradPruner":
        from gradpruner.grad_pruner import GradPruner

        return GradPruner
    if name == "Compressed":
        from gradpruner.method import Compressed

        return Compressed
    if name == "PruningPlan":
        from gradpruner.plan import PruningPlan

        return PruningPlan
    raise AttributeError(f"module 'gradpruner' has no attribute {name!r}")
