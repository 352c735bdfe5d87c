"""Progress of a run: a line in the log for each stage that ends, and on a terminal one that shows the current stage.

The time that is left comes from the speed of the current stage, and for later stages from the speed so far and the
work of each by `gradpruner.pipeline.work`. It is an estimate: stages whose work is not counted are not in it.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.sweep import place_in_sweep
from gradpruner.pipeline.work import PlannedStage
from gradpruner.progress import Steps, listening

logger = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2
WITH_STEPS = "{desc} |{bar:20}| {n_fmt}/{total_fmt} {unit}{postfix}"
WITHOUT_STEPS = "{desc}{postfix}"


class RunProgress:
    """Follows the stages of the arms of a run.

    Args:
        arms: name of each arm and its stages, in order.
        prefix: what to say first, such as the run's place in its sweep.
    """

    def __init__(self, arms: Sequence[tuple[str, Sequence[PlannedStage]]], prefix: str = "") -> None:
        self._arms, self._prefix = arms, prefix
        self._waiting = [(arm, stage) for arm, (_, stages) in enumerate(arms) for stage in stages]
        self._numbers = {(arm, stage): number for number, (arm, stage) in enumerate(self._waiting, start=1)}
        self._arm = 0
        self._now: PlannedStage | None = None
        self._steps: Steps | None = None
        self._began = self._drawn = 0.0
        self._stepped_from = 0.0  # when the current loop began
        self._done_flops = self._done_seconds = 0.0
        self._bar: tqdm[Any] | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the progress of what this process runs in this context."""
        if not getattr(sys.stderr, "isatty", bool)():
            with listening(self):
                yield
            return
        with (
            tqdm(bar_format=WITHOUT_STEPS, leave=False, dynamic_ncols=True, file=sys.stderr) as self._bar,
            logging_redirect_tqdm(tqdm_class=tqdm),  # so that lines of the log stand above the bar
            listening(self),
        ):
            yield

    def begin_arm(self, arm: int) -> None:
        """Says which arm runs now; stages of those before it are not waited for."""
        self._arm = arm
        self._waiting = [each for each in self._waiting if each[0] >= arm]

    def stage_begins(self, name: str, stage_id: str) -> None:
        """Notes the start of a stage."""
        self._now, self._steps, self._began = self._planned(name, stage_id), None, time.monotonic()
        self._draw()

    def stage_ends(self, name: str, stage_id: str, seconds: float | None) -> None:
        """Logs how long a stage took, or that it is cached; not the latter for what stands behind a teacher."""
        stage = self._planned(name, stage_id)
        if seconds is not None and stage.flops:
            self._done_flops, self._done_seconds = self._done_flops + stage.flops, self._done_seconds + seconds
        self._now = self._steps = None
        self._waiting = [each for each in self._waiting if each != (self._arm, stage)]
        if seconds is not None or (self._arm, stage) in self._numbers:
            took = "is cached" if seconds is None else f"took {seconds:.1f} s"
            logger.info("%s %s%s", self._place(stage), took, f", {left}" if (left := self._describe_left()) else "")
        self._draw()

    def steps_change(self, steps: Steps) -> None:
        """Shows the steps of a loop."""
        if steps is not self._steps:
            self._steps, self._stepped_from = steps, time.monotonic()
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw()

    def seconds_left(self) -> float | None:
        """Returns how long the rest of the run will take, or None while nothing is known of its speed."""
        if not self._waiting:
            return None
        waiting = [stage for _, stage in self._waiting if stage is not self._now and not stage.is_cached]
        rest = sum(stage.flops for stage in waiting)
        own, speed = 0.0, None
        if self._done_flops:
            speed = self._done_seconds / self._done_flops
        if self._now is not None:
            elapsed, steps = time.monotonic() - self._began, self._steps
            if steps is not None and steps.total and steps.done > steps.first:
                per_step = (time.monotonic() - self._stepped_from) / (steps.done - steps.first)
                own = per_step * (steps.total - steps.done)
                if speed is None and self._now.flops:
                    speed = per_step * steps.total / self._now.flops
            elif speed is not None:
                own = max(0.0, self._now.flops * speed - elapsed)
        if speed is None:
            return own if rest == 0 and own else None
        return own + rest * speed

    def _planned(self, name: str, stage_id: str) -> PlannedStage:
        """Returns the stage of the plan with this id, or of this name if the plan has no id for it."""
        for arm, stage in self._waiting:
            if arm == self._arm and (stage.id == stage_id or (stage.id is None and stage.label == name)):
                return stage
        return PlannedStage(name, stage_id, 0.0, False)

    def _place(self, stage: PlannedStage) -> str:
        number = self._numbers.get((self._arm, stage), "-")
        return f"{self._prefix}[{number}/{len(self._numbers)}] {self._arms[self._arm][0]}: {stage.label}"

    def _describe_left(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f"{describe_seconds(left)} left"

    def _draw(self) -> None:
        if self._bar is None:
            return
        self._drawn, bar, steps = time.monotonic(), self._bar, self._steps
        notes = [self._describe_left() or "time left: not known yet"]
        if steps is not None:
            bar.total, bar.n, bar.unit = steps.total, steps.done, steps.unit
            notes = [steps.note, *notes] if steps.note else notes
        bar.bar_format = WITHOUT_STEPS if steps is None or not steps.total else WITH_STEPS
        bar.set_description_str(self._place(self._now) if self._now else self._prefix + "between stages", refresh=False)
        bar.set_postfix_str(", ".join(notes), refresh=False)
        bar.refresh()


def describe_seconds(seconds: float) -> str:
    """Returns a time as roughly as it is known: in tens of seconds, minutes, or hours."""
    if seconds < 5:
        return "a few seconds"
    if seconds < 55:
        return f"about {10 * max(1, round(seconds / 10))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def run_progress(arms: Sequence[tuple[str, Sequence[PlannedStage]]]) -> RunProgress:
    """Returns the progress of a run, which names its place if it belongs to a sweep."""
    place = place_in_sweep()
    return RunProgress(arms, f"run {place[0]} of {place[1]} " if place else "")
