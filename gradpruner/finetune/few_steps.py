"""Warning of a fine-tune with too few steps."""

import dataclasses
import logging
import math

from gradpruner.finetune.spec import TrainingSpec
from gradpruner.messages import warn_once

logger = logging.getLogger(__name__)

FEW_STEPS = 50  # optimizer steps below which a pruned model is hardly repaired
LEAST_BATCH = 4  # rows; the search for learning rates in results/README.md had this batch


def warn_of_few_steps(training: TrainingSpec, num_rows: int) -> None:
    """Warns if a fine-tune has fewer than `FEW_STEPS` optimizer steps, and says what makes more.

    Nothing is said where `max_steps` asks for a number of steps.

    Args:
        training: settings of the fine-tune.
        num_rows: training rows.
    """
    steps = training.num_steps(num_rows)
    if training.max_steps is not None or steps >= FEW_STEPS:
        return
    batch = min(training.batch_size, LEAST_BATCH)
    better = dataclasses.replace(training, batch_size=batch, micro_batch_size=batch)
    settings = []
    if batch < training.batch_size:
        settings.append(f"finetune.batch_size={batch} finetune.micro_batch_size={batch}")
    if better.num_steps(num_rows) < FEW_STEPS:
        better = dataclasses.replace(better, epochs=math.ceil(FEW_STEPS / math.ceil(num_rows / batch)))
        settings.append(f"finetune.epochs={better.epochs:g}")
    warn_once(
        logger,
        f"The fine-tune has {steps} optimizer steps ({num_rows} rows, finetune.batch_size={training.batch_size}, "
        f"finetune.epochs={training.epochs:g}). Below {FEW_STEPS} a pruned model hardly recovers what pruning cost. "
        f"{' '.join(settings)} makes {better.num_steps(num_rows)}, more rows are better still.",
    )
