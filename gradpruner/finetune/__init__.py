"""LoRA and full fine-tuning on the Hugging Face Trainer.

`spec` holds the settings, `run` trains, `trainer` is the base of every training run here, `distill` is the loss of
learning from the dense model. Records name the class that is re-exported here.
"""

from gradpruner.finetune.spec import TrainingSpec

__all__ = ["TrainingSpec"]
