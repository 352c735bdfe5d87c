"""Repair the damage of pruned layers in closed form, before any training: one linear map per run of pruned layers.

Beyond the paper; related: ReplaceMe (arXiv:2505.02819). For a run of consecutive pruned layers, let M be the MLP output
of the kept layer before it, Y the residual stream that M is added to, and Z the state that enters the next kept layer
in the dense model. The map T of `maps` with the least error ||M T + Y - Z||^2 is folded into the down_proj of that kept
layer (W becomes T' W), so the checkpoint keeps its standard architecture. Runs are fitted in order of depth, each on
the model repaired so far. The target is always the dense model's state, so that a later map also corrects the error
that remains from earlier runs. Lambda is chosen on rows held out of the fit. A fit is not applied if it does not lower
their error, or if dropping costs no more than rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.batch_rows import by_length, split_rows
from gradpruner.encoding import Batch
from gradpruner.plan import PruningPlan
from gradpruner.progress import track
from gradpruner.repair.maps import best_ridge, fold, solve
from gradpruner.repair.states import RunStates, Tokens, down_proj, pruned_runs

HELD_OUT = 5  # every fifth row is held out


@dataclass(frozen=True)
class Fit:
    """Result for one run.

    Attributes:
        absorber: layer whose down_proj the map is for.
        last: last layer of the run.
        num_tokens: number of tokens in the fit.
        ridge: the chosen lambda, as a fraction of the mean eigenvalue of M'M.
        error_dropped: squared error on held-out tokens if the run is only dropped, as a fraction of ||Z - Y||^2.
        error_repaired: the same with the map.
        applied: whether the map was folded in.
    """

    absorber: int
    last: int
    num_tokens: int
    ridge: float
    error_dropped: float
    error_repaired: float
    applied: bool


@torch.no_grad()
def repair_by_least_squares(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Batch],
    towards: str = "identity",
) -> list[Fit]:
    """Folds a map for every run of pruned layers into the pruned model, in place.

    Args:
        model: the pruned model.
        dense: the dense model; unchanged.
        plan: the plan that was applied to `model`.
        batches: calibration rows, dicts of `input_ids` and `attention_mask`, each (B, T).
        towards: what a large lambda pulls T towards, one of `maps.TOWARDS`.

    Returns:
        One `Fit` per run.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    num_rows = sum(len(batch["input_ids"]) for batch in batches)
    if num_rows < 2:
        raise ValueError(
            f"repair=least_squares fits on some rows and chooses lambda on others, got {num_rows} rows. Give it more."
        )
    every = min(HELD_OUT, num_rows)
    groups = split_rows(batches, every, every - 1)
    to_fit, to_choose = (RunStates(model, dense, plan, by_length(rows)) for rows in groups)
    fits = []
    for run in track(pruned_runs(plan), "repair", "run"):
        solution = solve(_pairs(to_fit.read(run)), towards)
        ridge, repaired, dropped = best_ridge(solution, _pairs(to_choose.read(run)))
        rounding = torch.finfo(model.dtype).eps ** 2  # an error below this is not due to the dropped layers
        applied = repaired < dropped and dropped > rounding
        if applied:
            fold(down_proj(model, plan.kept_layers.index(run.absorber)), solution, ridge)
        fits.append(Fit(run.absorber, run.last, solution.num_tokens, ridge, dropped, min(repaired, dropped), applied))
    return fits


def _pairs(states: Iterator[Tokens]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((tokens.outputs, tokens.missing) for tokens in states)
