"""LoRA and full fine-tuning on the Hugging Face Trainer.

`spec` says how to train, `run` does it, `trainer` is what all training here shares, `distill` learns from the dense
model. Records name the class that is re-exported here.
"""

from gradpruner.finetune.spec import TrainingSpec

__all__ = ["TrainingSpec"]
