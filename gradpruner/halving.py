"""Successive halving: candidates train for a few steps, the better half trains anew for more, until one is left.

Jamieson and Talwalkar, arXiv:1502.07943. What a cut costs before training need not be what it costs after training; a
short LoRA fine-tune of each candidate tells more than its likelihood as it is, at the cost of its steps.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from gradpruner.batch_rows import training_rows
from gradpruner.encoding import Batch
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.hidden_states import answer_nll

T = TypeVar("T")


@dataclass(frozen=True)
class HalvingSettings:
    """How candidates are tried.

    Attributes:
        steps: optimizer steps of each round. With n rounds 2^n candidates begin, and half of them end with each round.
        learning_rate: peak rate of each short fine-tune, whose schedule is the usual one.
        batch_size: rows per step.
        seed: of adapters and of the order of rows, the same for all candidates.
    """

    steps: tuple[int, ...]
    learning_rate: float
    batch_size: int
    seed: int

    @property
    def num_candidates(self) -> int:
        """Candidates of the first round."""
        return 1 << len(self.steps)


def halve(
    candidates: Sequence[T],
    make: Callable[[T], PreTrainedModel],
    training: Sequence[Batch],
    choosing: Sequence[Batch],
    settings: HalvingSettings,
) -> list[tuple[T, tuple[float, ...]]]:
    """Returns the candidates, the best first, each with its answer NLL after every round that it took part in.

    Args:
        candidates: at most as many as `settings.num_candidates`; of equal ones the first wins.
        make: returns the model of a candidate, whose weights nobody else trains.
        training: rows to train on, dicts of `input_ids`, `attention_mask`, `labels`, each (B, T).
        choosing: rows that decide.
        settings: rounds.
    """
    rows = training_rows(training)
    scores: list[list[float]] = [[] for _ in candidates]
    places = list(range(len(candidates)))
    for steps in settings.steps:
        spec = TrainingSpec(
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            micro_batch_size=settings.batch_size,
            max_steps=steps,
            save_steps=steps,
        )
        for number, place in enumerate(places, start=1):
            model = make(candidates[place])
            with tempfile.TemporaryDirectory() as folder:
                description = f"candidate {number} of {len(places)}, {steps} steps"
                finetune(model, rows, 0, spec, Path(folder), settings.seed, description=description)
            scores[place].append(answer_nll(model.eval(), choosing))  # with its adapters, which are added in place
        places = sorted(places, key=lambda place: (scores[place][-1], place))[: max(1, len(places) // 2)]
    order = sorted(range(len(candidates)), key=lambda place: (-len(scores[place]), scores[place][-1:], place))
    return [(candidates[place], tuple(scores[place])) for place in order]
