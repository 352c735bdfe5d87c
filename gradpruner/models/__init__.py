"""Models before and after pruning: which one to load, how it is laid out, and what it costs.

Records name the class that is re-exported here.
"""

from gradpruner.models.spec import ModelSpec

__all__ = ["ModelSpec"]
