"""Work of the stages of a run in floating-point operations, from its config and rows alone: rough, but in proportion.

Losses, metrics, files and the loading of models are not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.auto_sparsity import HELD_OUT
from gradpruner.checks import AUTO
from gradpruner.depth_method import DepthMethod
from gradpruner.encoding import TrainingRow
from gradpruner.evaluate.generate import Generation
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradpruner_plus import GradPrunerPlus
from gradpruner.models.counting import ModelCounts, count_model
from gradpruner.pipeline.setup import Setup
from gradpruner.repair import JUDGED, LEAST_SQUARES

# Forward passes of the dense model over the repair's rows, about, with three cuts.
REPAIR_PASSES = {LEAST_SQUARES: 2.0, JUDGED: 4.0}
REFIT_PASSES = 0.15  # more of them for each kept layer that is refitted
FITTED, CHOOSING = 0.7, 0.2  # parts of the repair's rows, see `repair.judged`
NUM_CRITERIA = 4  # sets of layers that compete before any is edited, see `candidates`


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


def choice_flops(method: GradPrunerPlus, dense: ModelCounts, pruned: ModelCounts, rows: Sequence[TrainingRow]) -> float:
    """Returns the operations of the choice among candidates, without that of repairing some of them.

    Args:
        method: with a definite number of layers, or the most that `sparsity=auto` may prune.
        dense: counts of the dense model.
        pruned: counts of the pruned model.
        rows: the training rows.
    """
    length, positions = tokens_per_row(rows)
    num_rows = min(method.repair_rows, len(rows))
    one_dense, one_pruned = (counts.flops(1, length, logit_positions=positions) for counts in (dense, pruned))
    found = (FITTED + CHOOSING) * num_rows * one_dense  # criteria, and the dense model's own likelihood
    found += CHOOSING * num_rows * (NUM_CRITERIA + method.num_edits) * one_pruned
    if method.greedy_width:
        num_layers = len(dense.layers)
        again = num_layers - len(pruned.layers) - 1
        found += CHOOSING * num_rows * (num_layers + again * method.greedy_width) * (one_dense + one_pruned) / 2
    for number, steps in enumerate(method.halving):
        num_candidates = 2 ** (len(method.halving) - number)
        trained = pruned.training_flops(steps * method.halving_batch_size, length, positions, TrainingSpec.lora_rank)
        found += num_candidates * (trained + CHOOSING * num_rows * one_pruned)
    return found


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
        if isinstance(method, GradPrunerPlus) and method.candidates:
            found["decide"] = choice_flops(method, start, pruned, rows)
    elif (calibration := method.calibration()) is not None:
        times = len(start.layers) if method.measures_per_layer else 1
        found["measure"] = times * calibration.count(len(rows)) * one_row
    if isinstance(method, DepthMethod) and (repair := method.repair_calibration()) is not None:
        passes = REPAIR_PASSES[method.repair_kind] + (REFIT_PASSES * len(pruned.layers) if method.repair_refit else 0)
        found["repair"] = passes * repair.count(len(rows)) * one_row
        if isinstance(method, GradPrunerPlus) and method.candidates and method.repair_kind == JUDGED:
            found["decide"] += method.num_repaired * found["repair"]
    if isinstance(method, GradPruner) and method.sparsity == AUTO:
        tried = 1 + math.ceil(math.log2(len(start.layers) - len(pruned.layers)))
        scored = min(method.repair_rows, len(rows)) / HELD_OUT * one_row
        found["decide"] = found.get("decide", 0.0) + tried * (found.get("repair", 0.0) + scored)
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
