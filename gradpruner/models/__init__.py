"""Models before and after pruning: which one to load, how it is laid out, and what it costs.

Records name the class that is re-exported here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpruner.models.spec import ModelSpec

__all__ = ["ModelSpec"]


def __getattr__(name: str) -> Any:
    """Imports on first use: loading models takes 60 MB of libraries that `checkpoints.streaming` does without."""
    if name == "ModelSpec":
        from gradpruner.models.spec import ModelSpec

        return ModelSpec
    raise AttributeError(f"module 'gradpruner.models' has no attribute {name!r}")
