"""When APT acts: cuts, the windows before them in which masks move, distillation, and the learning rate.

A cubic schedule says what is kept at each cut. Until the end of the sparsity warm-up, cuts prune nothing and only grow
adapters. Masks move in a window before each cut, of at most `WINDOW` steps. At the start of a window that leads to
pruning the model is evaluated, and teaches from then on if it is better than all teachers before it. Distillation
begins at the cut after the first one that prunes.

The learning rate restarts when distillation begins and when it ends: warm-up and decay over the steps of each phase.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

WINDOW = 200  # steps in which masks move before a cut, at most


def kept_fraction(step: float, start: float, end: float, last: float) -> float:
    """Returns the value of the cubic schedule: 1 until `start`, `last` from `end` on."""
    if step >= end:
        return last
    return min(1.0, last + (1.0 - last) * ((end - step) / (end - start)) ** 3)


@dataclass(frozen=True)
class Schedule:
    """Times of APT's events, in completed optimizer steps.

    Attributes:
        start: end of the tuning before any pruning; nothing is scored before the first step.
        warm_end: end of the sparsity warm-up, before which cuts prune nothing.
        cuts: when units are pruned, ascending.
        distil_end: when distillation ends.
    """

    start: int
    warm_end: float
    cuts: tuple[int, ...]
    distil_end: int

    @classmethod
    def of(
        cls,
        num_steps: int,
        prune_start: float,
        prune_end: float,
        distil_end: float,
        num_cuts: int,
        sparsity_warmup: float = 0.0,
    ) -> Self:
        """Makes the schedule from fractions of all steps; there are fewer than `num_cuts` cuts if steps are too few."""
        start = max(1, round(prune_start * num_steps))  # nothing has a score before the first step
        length = max(0, round(prune_end * num_steps) - start)
        cuts = sorted({start + math.ceil(length * cut / num_cuts) for cut in range(1, num_cuts + 1)})
        return cls(start, start + sparsity_warmup * num_steps, tuple(cuts), round(distil_end * num_steps))

    def kept_part(self, cut: int, last: float) -> float:
        """Returns the fraction of the parameters to keep at a cut; `last` is that of the last one."""
        return kept_fraction(cut, self.warm_end, self.cuts[-1], last)

    def progress(self, step: int) -> float:
        """Returns the progress of pruning, from 0 at `start` to 1 at the last cut and after."""
        length = self.cuts[-1] - self.start
        return 1.0 if step >= self.cuts[-1] else max(0.0, (step - self.start) / length)

    def next_cut(self, step: int) -> int:
        """Returns the first cut after this step."""
        return next(cut for cut in self.cuts if cut > step)

    def window_start(self, cut: int) -> int:
        """Returns when masks start to move before a cut: at the cut before it, or `WINDOW` steps before it if later."""
        before = max((other for other in self.cuts if other < cut), default=self.start)
        return max(before, cut - WINDOW)

    @property
    def distil_start(self) -> int:
        """When distillation begins: at the cut after the first one that prunes, or the last one."""
        pruning = [cut for cut in self.cuts if cut > self.warm_end]
        return pruning[1] if len(pruning) > 1 else self.cuts[-1]


def learning_rate_factors(args: TrainingArguments, starts: tuple[int, ...], num_steps: int) -> Callable[[int], float]:
    """Returns the learning rate at a 0-based step as a fraction of its peak, with restarts.

    The first phase is the run's own schedule up to the first restart; each restart begins the same kind of schedule for
    the steps that are left until the next one.

    Args:
        args: kind of schedule, and its warm-up.
        starts: steps of the restarts, ascending.
        num_steps: optimizer steps of the run.
    """
    ends = (*starts[1:], num_steps)
    phases = [(0, _factors(args, num_steps))]
    phases += [(start, _factors(args, end - start)) for start, end in zip(starts, ends, strict=True) if 0 < start < end]

    def factor(step: int) -> float:
        start, own = next((start, own) for start, own in reversed(phases) if step >= start)
        return own(step - start)

    return factor


def _factors(args: TrainingArguments, num_steps: int) -> Callable[[int], float]:
    """Returns what the scheduler of a run of so many steps multiplies the learning rate by."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler: Any = get_scheduler(
        args.lr_scheduler_type,
        unused,
        args.get_warmup_steps(num_steps),
        num_steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
    factors: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factors
