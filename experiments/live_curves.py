"""Losses of training runs, handed on at every step. A file of its own: it imports the Trainer's libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

from gradpruner.finetune.run import CHECKPOINTS_FOLDER

OnStep = Callable[[str, dict[str, float]], None]  # takes the stage that trains, and what the Trainer logs of a step


@contextmanager
def live_curves(on_step: OnStep) -> Iterator[None]:
    """Calls `on_step` for every step of all trainers that are made in this context."""
    callback = _LiveCurves(on_step)
    trainer.DEFAULT_CALLBACKS.append(callback)  # as the Trainer's own integrations (`report_to`) do
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(callback)


class _LiveCurves(TrainerCallback):
    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None and "loss" in logs:
            self._on_step(_section(Path(args.output_dir)), {**logs, "step": state.global_step})


def _section(folder: Path) -> str:
    """Returns the stage that trains, by the folder of its checkpoints; the importance run keeps none."""
    return folder.parent.parent.name if folder.name == CHECKPOINTS_FOLDER else "importance"
