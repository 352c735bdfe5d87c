"""GradPruner: prune and merge the layers of a language model that a task does not need, guided by early gradients.

Library use:

    import gradpruner
    compressed = gradpruner.compress(model, tokenizer, rows, sparsity=0.4)
    gradpruner.save_checkpoint(compressed.model, tokenizer, compressed.plan, "pruned")
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpruner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from gradpruner.grad_pruner import GradPruner
    from gradpruner.gradpruner_plus import GradPrunerPlus
    from gradpruner.in_memory import compress
    from gradpruner.method import Compressed
    from gradpruner.plan import PruningPlan

__all__ = [
    "Compressed",
    "GradPruner",
    "GradPrunerPlus",
    "PruningPlan",
    "compress",
    "load_checkpoint",
    "save_checkpoint",
]
__version__ = "0.1.0"

# Name -> module that has it.
HOMES = {
    "Compressed": "gradpruner.method",
    "GradPruner": "gradpruner.grad_pruner",
    "GradPrunerPlus": "gradpruner.gradpruner_plus",
    "PruningPlan": "gradpruner.plan",
    "compress": "gradpruner.in_memory",
    "load_checkpoint": "gradpruner.checkpoints.checkpoint",
    "save_checkpoint": "gradpruner.checkpoints.checkpoint",
}

# peft imports bitsandbytes and torchao wherever they are installed, and they warn about kernels that are missing.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Imports a name on first use: `gradpruner.merge` and `gradpruner.plan` alone must not import transformers."""
    if name not in HOMES:
        raise AttributeError(f"module 'gradpruner' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists the names that are imported on first use, too."""
    return sorted({*globals(), *HOMES})
