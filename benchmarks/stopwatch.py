"""Times of optimizer steps; work that a GPU still has in its queue is waited for."""

import time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Stopwatch(TrainerCallback):
    """Stopwatch for every optimizer step, up to after AdamW, in seconds.

    As the first of the callbacks it also counts what the others do before the step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts the clock."""
        self._start = _now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Notes the time of the step."""
        self.seconds.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
