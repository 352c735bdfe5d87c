"""Losses of training runs, handed on at every step to a function or to an integration of the Trainer's.

A file of its own: it imports the Trainer's libraries.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

from gradpruner.finetune.run import CHECKPOINTS_FOLDER

MakeIntegration = Callable[[str, TrainingArguments, int], tuple[TrainerCallback, TrainingArguments]]
OnStep = Callable[[str, dict[str, float]], None]  # takes the stage that trains, and what the Trainer logs of a step


@contextmanager
def live_curves(on_step: OnStep) -> Iterator[None]:
    """Calls `on_step` for every step of all trainers that are made in this context."""
    with _added_to_trainers(_LiveCurves(on_step)):
        yield


@contextmanager
def reported_to(make: MakeIntegration, guard: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hands what happens in trainings in this context to an integration of the Trainer's, a new one for each stage.

    Args:
        make: takes the stage, the arguments of its training and the step it starts after, and returns the callback of
            the integration and the arguments that this is to see.
        guard: returns a context that keeps errors of the integration from the training.
    """
    with _added_to_trainers(_StageCallback(make, guard)):
        yield


@contextmanager
def _added_to_trainers(callback: TrainerCallback) -> Iterator[None]:
    """Gives a callback to all trainers that are made in this context, as `report_to` gives one to a single trainer."""
    trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(callback)


class _StageCallback(TrainerCallback):
    """The callback of `reported_to`."""

    def __init__(self, make: MakeIntegration, guard: Callable[[], AbstractContextManager[None]]) -> None:
        self._make, self._guard = make, guard
        self._inner, self._args = TrainerCallback(), None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._inner = TrainerCallback()
        with self._guard():
            inner, self._args = self._make(_section(Path(args.output_dir)), args, state.global_step)
            inner.on_train_begin(self._args, state, control, **kwargs)
            self._inner = inner  # one that cannot begin hears of nothing more

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with self._guard():
            self._inner.on_log(self._args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._guard():
            self._inner.on_train_end(self._args, state, control, **kwargs)


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
