"""Repair the damage of pruned layers before any training, in closed form: `least_squares`, or `judged` by answers."""

from collections.abc import Iterable

from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.checks import check_choice
from gradpruner.encoding import Batch
from gradpruner.plan import PruningPlan
from gradpruner.repair.judged import JudgedFit, judged_repair
from gradpruner.repair.least_squares import Fit, repair_by_least_squares
from gradpruner.repair.maps import TOWARDS
from gradpruner.repair.states import NORMED_MODEL_TYPES, PLAIN_MODEL_TYPES

__all__ = ["JUDGED", "LEAST_SQUARES", "NO_REPAIR", "REPAIRS", "Fit", "JudgedFit", "check_repairable", "repair"]
NO_REPAIR, LEAST_SQUARES, JUDGED = "none", "least_squares", "judged"
REPAIRS = (NO_REPAIR, LEAST_SQUARES, JUDGED)


def check_repairable(config: PreTrainedConfig, kind: str = LEAST_SQUARES) -> None:
    """Refuses architectures that a repair cannot change in place.

    Args:
        config: config of the dense model.
        kind: one of `REPAIRS`.

    Raises:
        ValueError: if the model type is not known to work with this repair.
    """
    known = PLAIN_MODEL_TYPES if kind == LEAST_SQUARES else (*PLAIN_MODEL_TYPES, *NORMED_MODEL_TYPES)
    if config.model_type in known:
        return
    reason = "folds a map into down_proj, whose output must reach the residual stream as it is"
    if kind == JUDGED:
        reason = "changes what layers add to the residual stream"
    raise ValueError(
        f"repair={kind} {reason}; known for {', '.join(known)}, got model type {config.model_type!r}. Set "
        "method.repair=none, or choose such a model."
    )


def repair(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[Batch],
    towards: str = "identity",
    kind: str = LEAST_SQUARES,
    refit: bool = False,
) -> list[Fit] | list[JudgedFit]:
    """Repairs the pruned model in place.

    Args:
        model: the pruned model; may share weights with `dense`, see `surgery.sharing_copy`.
        dense: the dense model; unchanged.
        plan: the plan that was applied to `model`.
        batches: calibration rows, dicts of `input_ids`, `attention_mask` and, for `judged`, `labels`, each (B, T).
        towards: what a large lambda of `least_squares` pulls the map towards, one of `maps.TOWARDS`.
        kind: `least_squares` or `judged`.
        refit: with `judged`, also refit the kept layers behind the first cut.

    Returns:
        One result per run of pruned layers.

    Raises:
        ValueError: if the architecture is not supported, or there are too few rows.
    """
    check_choice("repair", kind, REPAIRS[1:])
    check_choice("towards", towards, TOWARDS)
    check_repairable(model.config, kind)
    rows = list(batches)
    if kind == JUDGED:
        return judged_repair(model, dense, plan, rows, refit)
    return repair_by_least_squares(model, dense, plan, rows, towards)
