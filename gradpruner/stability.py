"""Check whether the pruned set has settled, from per-step importance and before anything is pruned.

If the model has hardly moved, every stretch of steps ranks the same layers lowest. If a few spiky steps decide, or the
adapter moves far enough to change the ranking, the sets disagree, and accuracy after pruning falls.
"""

from typing import Any

import torch
from torch import Tensor

from gradpruner.plan import lowest_layers

SETTLED_OVERLAP = 0.9  # between the final set and that of every prefix of at least three quarters of the steps
HALVES_OVERLAP = 0.8  # between the sets of the first and of the second half of the steps
NUM_RESAMPLES = 1000
RESAMPLED_OVERLAP = 0.95  # between the final set and that of resampled steps, on average
UNDECIDED = 0.05  # a layer is decided if at most this fraction of the resamples prunes it, or keeps it
SPIKE_SHARE = 0.5  # fraction of the summed importance in the largest tenth of the steps


def stability_report(step_importance: Tensor, num_pruned_layers: int) -> dict[str, Any]:
    """Compares the pruned set over growing prefixes and over halves of the steps.

    Args:
        step_importance: importance per step and layer, (t, L); see `igia.step_importance`.
        num_pruned_layers: size of the set.

    Returns:
        JSON-ready dict: `step_importance`; `prefix_overlap` (for each i, the fraction of the final set that the first i
        steps already give; null while these have no gradient); `halves_overlap`; `top_step_share` (fraction of all
        importance in the largest tenth of the steps); `pruned_probability` (see `pruned_probability`);
        `undecided_layers` (layers that some resamples prune and others keep); `warnings` (a list of sentences, empty
        if nothing is wrong).
    """
    num_steps = len(step_importance)
    totals = step_importance.sum(dim=1)  # (t,)
    prefix_overlap = [
        _overlap(step_importance[:stop], step_importance, num_pruned_layers) for stop in range(1, num_steps + 1)
    ]
    middle = (num_steps + 1) // 2
    halves_overlap = _overlap(step_importance[:middle], step_importance[middle:], num_pruned_layers)
    num_top = max(1, num_steps // 10)
    top_share = float(totals.topk(num_top).values.sum() / totals.sum()) if totals.any() else 0.0

    warnings = []
    late = [overlap for overlap in prefix_overlap[max(0, (3 * num_steps) // 4 - 1) :] if overlap is not None]
    if late and min(late) < SETTLED_OVERLAP:
        warnings.append(
            f"The pruned set has not settled: over the last quarter of the {num_steps} importance steps it agreed with "
            f"the final one on only {min(late):.0%} of the layers. Raise method.steps or method.batch_size."
        )
    if halves_overlap is not None and halves_overlap < HALVES_OVERLAP:
        warnings.append(
            f"The pruned set drifts: the two halves of the importance steps agree on only {halves_overlap:.0%} of the "
            "layers. The adapter may move too far: lower method.learning_rate, or raise method.batch_size."
        )
    if warnings and num_steps >= 10 and top_share > SPIKE_SHARE:  # a spike that changes no set is harmless
        warnings.append(
            f"{num_top} of {num_steps} importance steps hold {top_share:.0%} of the gradient energy and may decide "
            "alone. Consider method.step_weighting=normalized."
        )
    probability = pruned_probability(step_importance, num_pruned_layers)
    return {
        "pruned_probability": probability,
        "undecided_layers": [layer for layer, p in enumerate(probability) if UNDECIDED < p < 1.0 - UNDECIDED],
        "step_importance": step_importance.tolist(),
        "prefix_overlap": prefix_overlap,
        "halves_overlap": halves_overlap,
        "top_step_share": top_share,
        "warnings": warnings,
    }


def has_settled(step_importance: Tensor, num_pruned_layers: int, patience: int) -> bool:
    """Returns whether more steps are unlikely to change the pruned set; `steps=auto` stops there.

    The set must have been the same after each of the `patience` steps before this one, and resamples of the steps must
    agree with it on at least `RESAMPLED_OVERLAP` of its layers on average.

    Args:
        step_importance: importance per step and layer so far, (t, L).
        num_pruned_layers: size of the set.
        patience: number of earlier steps that must give the same set.
    """
    num_steps = len(step_importance)
    if num_steps <= patience:
        return False
    prefixes = (step_importance[:stop] for stop in range(num_steps - patience, num_steps))
    if any(_overlap(prefix, step_importance, num_pruned_layers) != 1.0 for prefix in prefixes):
        return False
    probability = pruned_probability(step_importance, num_pruned_layers)
    pruned = lowest_layers(step_importance.mean(dim=0).tolist(), num_pruned_layers)
    return sum(probability[layer] for layer in pruned) / num_pruned_layers >= RESAMPLED_OVERLAP


def pruned_probability(step_importance: Tensor, num_pruned_layers: int) -> list[float]:
    """Returns how often each layer is among the lowest when steps are drawn again with replacement (bootstrap).

    Args:
        step_importance: importance per step and layer, (t, L).
        num_pruned_layers: size of the set.

    Returns:
        One fraction in [0, 1] per layer; the same in every call.
    """
    num_steps, num_layers = step_importance.shape
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num_steps, (NUM_RESAMPLES, num_steps), generator=generator)
    weights = torch.zeros(NUM_RESAMPLES, num_steps, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = weights @ step_importance.double().cpu() / num_steps  # (R, L)
    lowest = means.sort(dim=1, stable=True).indices[:, :num_pruned_layers]
    return (torch.bincount(lowest.flatten(), minlength=num_layers) / NUM_RESAMPLES).tolist()


def _overlap(first: Tensor, second: Tensor, num_pruned_layers: int) -> float | None:
    """Returns the fraction of lowest layers that two stretches of steps share; None if a stretch has no gradient."""
    if num_pruned_layers == 0 or not first.any() or not second.any():
        return None
    sets = [set(lowest_layers(part.mean(dim=0).tolist(), num_pruned_layers)) for part in (first, second)]
    return len(sets[0] & sets[1]) / num_pruned_layers
