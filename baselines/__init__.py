"""The methods that GradPruner is compared with; one file a method, all on the protocol of `gradpruner.method`.

`baselines.load(folder)` loads any checkpoint that a run saved, also one whose layers differ in width.
"""

from gradpruner.checkpoints.checkpoint import load_checkpoint as load

__all__ = ["load"]
