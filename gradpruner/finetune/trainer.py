"""Base of every training run here, on top of the Hugging Face Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gradpruner import processes
from gradpruner.encoding import Batch, trim_to_answers
from gradpruner.progress import Steps

# Name of activation checkpointing in arguments and models; older transformers call it gradient checkpointing.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# Maps a batch to its loss, summed over tokens, and the number of tokens with labels after the first column. On several
# processes it stands in for the model's `forward`, so it calls parts of the model only.
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]


class DivergedError(RuntimeError):
    """The loss became NaN or infinite; the message says where and what to change."""


class CompletionTrainer(Trainer):
    """Trainer with completion-only logits, a stop at the first non-finite loss, and a count of steps."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, description: str, loss: Loss | None = None, **kwargs: Any
    ) -> None:
        _ = args.n_gpu  # computes it, so that it can be set
        args._n_gpu = 1  # with several GPUs in one process the Trainer would silently split batches
        super().__init__(model, args, **kwargs)
        self._loss = loss
        if loss is not None and processes.count() > 1:
            # Gradients are shared only if the model is called, not parts of it.
            model.forward = lambda **batch: loss(model, batch)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress(description))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the given loss, or the model's own on the columns that have labels; stops if it is not finite."""
        if self._loss is None:
            result = super().compute_loss(model, trim_to_answers(inputs), return_outputs, num_items_in_batch)
        else:
            with (
                self.accelerator.autocast()
            ):  # accelerate wraps forward alone, and these losses call parts of the model
                total, num_tokens = model(**inputs) if processes.count() > 1 else self._loss(model, inputs)
            result = total / (num_tokens if num_items_in_batch is None else num_items_in_batch)
            result = result * processes.count()  # the mean over processes follows
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            raise DivergedError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps} (learning "
                f"rate {self._get_learning_rate():.3g}). Lower the learning rate, or check the data and the weights."
            )
        return result


class _Progress(TrainerCallback):
    """Counts optimizer steps, with the current loss."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._steps: Steps | None = None
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if processes.is_main():
            self._steps = Steps(self._description, "step", state.max_steps, state.global_step).__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.advance(state.global_step - self._steps.done, self._loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps is not None:
            self._steps.__exit__()
