"""How many layers can leave? The most with which the answers stay likely enough, before anything is trained.

Beyond the paper. One importance run ranks the layers; how many of the lowest leave is found by bisection: for each
number tried the model is pruned, merged and repaired as the method says, on rows of the training split, and other rows
of it say how likely their answers are. That takes for granted that a deeper cut does not do better than a lesser one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_nll
from gradpruner.plan import PruningPlan
from gradpruner.repair import repair
from gradpruner.surgery import sharing_copy

HELD_OUT = 5  # every fifth row says how likely the answers are


@dataclass(frozen=True)
class Search:
    """What came out.

    Attributes:
        num_pruned_layers: how many layers leave.
        dense: answer NLL of the dense model, nats a token.
        limit: the highest that is allowed.
        curve: by number of layers pruned: the answer NLL of what is left; only the numbers that were tried.
    """

    num_pruned_layers: int
    dense: float
    limit: float
    curve: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        curve = {str(number): nll for number, nll in sorted(self.curve.items())}
        return {
            "num_pruned_layers": self.num_pruned_layers,
            "dense": self.dense,
            "limit": self.limit,
            "curve": curve,
        }

    def __str__(self) -> str:
        tried = ", ".join(f"{number}: {nll:.3f}" for number, nll in sorted(self.curve.items()))
        return (
            f"answer NLL by layers pruned: 0: {self.dense:.3f}, {tried}; at most {self.limit:.3f}: "
            f"{self.num_pruned_layers} leave"
        )


def largest_cut(nll: Callable[[int], float], limit: float, most: int) -> tuple[int, dict[int, float]]:
    """The largest number of layers up to `most` with an NLL of at most `limit`, by bisection, and what was tried.

    Args:
        nll: of the model without that many layers; taken to rise with it.
        limit: nats a token.
        most: 1 or more.
    """
    curve = {most: nll(most)}
    good, bad = (most, most) if curve[most] <= limit else (0, most)
    while bad - good > 1:
        middle = (good + bad) // 2
        curve[middle] = nll(middle)
        good, bad = (middle, bad) if curve[middle] <= limit else (good, middle)
    return good, curve


def search(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    prune: Callable[[PreTrainedModel, int], PruningPlan],
    *,
    repairs: bool,
    tolerance: float,
    most: int,
) -> Search:
    """Finds how many layers can leave.

    Args:
        model: the dense model; left as it was.
        batches: rows of the training split, dicts of `input_ids`, `attention_mask`, `labels`, each (B, T); one that
            comes again counts once.
        prune: takes that many layers out of a model, in place, and says which.
        repairs: repair what was pruned, see `repair.repair`.
        tolerance: how far the NLL may rise, as a part of the dense model's.
        most: the most layers that may leave.

    Raises:
        ValueError: if there are too few rows, or even one layer is too many.
    """
    fitted, held_out = _split(batches)
    dense = answer_nll(model, held_out)
    limit = (1.0 + tolerance) * dense

    with tqdm(desc="sparsity=auto", unit="cut") as bar:

        def nll(num_pruned_layers: int) -> float:
            candidate = sharing_copy(model)
            plan = prune(candidate, num_pruned_layers)
            if repairs:
                repair(candidate, model, plan, fitted)
            bar.update()
            return answer_nll(candidate, held_out)

        num_pruned_layers, curve = largest_cut(nll, limit, most)
    found = Search(num_pruned_layers, dense, limit, curve)
    if num_pruned_layers == 0:
        raise ValueError(
            f"sparsity=auto prunes what costs at most {tolerance:.0%} of likelihood, got no layer that does not: "
            f"{found}. Raise method.tolerance, or set method.repair=least_squares."
        )
    return found


def _split(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches of distinct rows for fits, and others for the likelihood."""
    seen: set[tuple[int, ...]] = set()
    fitted: list[Batch] = []
    held_out: list[Batch] = []
    for batch in batches:
        keep: list[list[int]] = [[], []]
        for row, (tokens, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            key = tuple(tokens[mask.bool()].tolist())
            if key not in seen:
                keep[len(seen) % HELD_OUT == HELD_OUT - 1].append(row)
                seen.add(key)
        for part, rows in zip((fitted, held_out), keep, strict=True):
            if rows:
                part.append({name: values[torch.tensor(rows)] for name, values in batch.items()})
    if len(seen) < 2 * HELD_OUT:
        raise ValueError(
            f"sparsity=auto needs {2 * HELD_OUT} distinct training rows or more, got {len(seen)}. Give it more, or set "
            "sparsity to a number."
        )
    return fitted, held_out
