"""The methods that GradPruner is compared with: one module per method, all on the protocol of `gradpruner.method`.

`baselines.load(folder)` loads any checkpoint that a run saved, including one whose layers differ in width.
"""

from gradpruner.checkpoints.checkpoint import load_checkpoint as load

__all__ = ["load"]
