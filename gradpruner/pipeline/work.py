"""Work of the stages of a run in floating-point operations, from its config and rows alone: rough, but in proportion.

Losses, metrics, files and the loading of models are not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.generate import Generation
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import ModelCounts, count_model
from gradpruner.pipeline.setup import Setup

REPAIR_PASSES = 10  # forward passes of both models over the calibration rows, about
CANDIDATE_ROWS = 600  # forward passes of one row that the scores of all candidates take, about


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run will ask for.

    Attributes:
        label: what to call it.
        id: of the stage; None where only the run finds it out.
        flops: operations that it takes, about; 0 where they are too few to count or not known.
        is_cached: whether its result is there.
    """

    label: str
    id: str | None
    flops: float
    is_cached: bool


def training_flops(
    counts: ModelCounts, training: TrainingSpec, rows: Sequence[TrainingRow], num_rows: int | None = None
) -> float:
    """Returns the operations of a fine-tune.

    Args:
        counts: of the model that is trained.
        training: how.
        rows: the training rows.
        num_rows: rows that the training sees; None: as many as `training` says.
    """
    lora_rank = training.lora_rank if training.mode == "lora" else None
    seen = num_trained_rows(training, len(rows)) if num_rows is None else num_rows
    return counts.training_flops(seen, *tokens_per_row(rows), lora_rank, training.gradient_checkpointing)


def importance_flops(setup: Setup, method: GradPruner, dense: ModelCounts) -> float:
    """Returns the operations of the importance run."""
    num_rows, recompute = method.calibration().num_rows, method.gradient_checkpointing
    return dense.training_flops(num_rows, *tokens_per_row(setup.rows), method.lora_rank, recompute)


def num_trained_rows(training: TrainingSpec, num_rows: int) -> int:
    """Returns the number of rows that a training sees; the last batch of an epoch may be short."""
    if training.max_steps is not None:
        return training.max_steps * training.batch_size
    return math.ceil(training.epochs * num_rows)


def tokens_per_row(rows: Sequence[TrainingRow]) -> tuple[int, int]:
    """Returns the mean length of a training row, and its mean number of positions with logits."""
    mean_length = math.ceil(sum(len(row.input_ids) for row in rows) / len(rows))
    mean_positions = math.ceil(1 + sum(row.num_answer_tokens for row in rows) / len(rows))
    return mean_length, min(mean_positions, mean_length)


def stage_flops(setup: Setup) -> dict[str, float]:
    """Returns the operations of the stages of a run by name, and of `predict_before`; those that are left out are few.

    `setup` need not have all these stages.
    """
    method, training, rows = setup.resolved_method, setup.training, setup.rows
    start, pruned = count_model(setup.config), count_model(setup.config, setup.shape)
    length, _ = tokens_per_row(rows)
    one_row = start.flops(1, length, logit_positions=1)
    found: dict[str, float] = {}
    if isinstance(method, GradPruner):
        found["measure"] = importance_flops(setup, method, start)
        if getattr(method, "candidates", False):
            found["measure"] += CANDIDATE_ROWS * one_row
    elif (calibration := method.calibration()) is not None:
        found["measure"] = calibration.count(len(rows)) * one_row
    if (repair := method.repair_calibration()) is not None:
        found["repair"] = 2 * REPAIR_PASSES * repair.count(len(rows)) * one_row
    if setup.recovery is not None:
        found["recover"] = training_flops(pruned, setup.recovery.training, setup.recovery_rows)
    dense = count_model(setup.dense_config)
    found["teach_prompts"] = found["teach_answers"] = len(rows) * dense.flops(1, length)
    found["tuned_dense"] = training_flops(dense, training, rows)
    found["finetune"] = training_flops(pruned, training, rows)
    tokens = sum(question.length for question in setup.questions)
    evaluation = setup.resolved_evaluation
    if isinstance(evaluation, Generation):
        tokens += len(setup.questions) * (evaluation.max_new_tokens or setup.tested_task.max_new_tokens)
    found["predict"] = found["predict_before"] = tokens / length * pruned.flops(1, length, logit_positions=1)
    return found
