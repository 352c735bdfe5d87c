"""Find the largest number of layers that can be pruned with the answers still likely enough, before any training.

Beyond the paper. One importance run ranks the layers, and bisection finds how many of the lowest to prune. For each
number tried, the model is pruned, merged and repaired as the method says, on rows of the training split; other rows of
that split measure how likely their answers are. Bisection assumes that answers never become likelier when more layers
are pruned.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gradpruner.batch_rows import distinct_rows, split_rows
from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_nll
from gradpruner.plan import PruningPlan
from gradpruner.progress import Steps
from gradpruner.surgery import sharing_copy

Repair = Callable[[PreTrainedModel, PreTrainedModel, PruningPlan, Iterable[Batch]], Any]
HELD_OUT = 5  # every fifth row measures how likely the answers are


@dataclass(frozen=True)
class Search:
    """Result of the search.

    Attributes:
        num_pruned_layers: number of layers to prune.
        dense: answer NLL of the dense model, nats per token.
        limit: highest answer NLL allowed.
        curve: number of pruned layers -> answer NLL of the pruned model, for the numbers that were tried.
    """

    num_pruned_layers: int
    dense: float
    limit: float
    curve: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready form."""
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
    """Returns the largest number of layers up to `most` with an NLL of at most `limit`, and the NLLs that were tried.

    Args:
        nll: returns the NLL of the model without that many layers; bisection assumes that it rises with the number.
        limit: nats per token.
        most: largest number to try, 1 or more.
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
    repair: Repair | None,
    tolerance: float,
    most: int,
) -> Search:
    """Finds how many layers can be pruned.

    Args:
        model: the dense model; unchanged.
        batches: rows of the training split, dicts of `input_ids`, `attention_mask`, `labels`, each (B, T); a row that
            occurs again counts once.
        prune: prunes that many layers of a model, in place, and returns the plan.
        repair: repairs the pruned model in place, given it, the dense model, the plan and rows; None: no repair.
        tolerance: how far the NLL may rise, as a fraction of the dense model's NLL.
        most: largest number of layers that may be pruned.

    Raises:
        ValueError: if there are too few rows, or even one layer is too many.
    """
    fitted, held_out = _split(batches)
    dense = answer_nll(model, held_out)
    limit = (1.0 + tolerance) * dense

    with Steps("sparsity=auto", "cut") as steps:

        def nll(num_pruned_layers: int) -> float:
            candidate = sharing_copy(model)
            plan = prune(candidate, num_pruned_layers)
            if repair is not None:
                repair(candidate, model, plan, fitted)
            steps.advance()
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
    """Returns batches of distinct rows for fits, and batches of other rows for the likelihood."""
    distinct = distinct_rows(batches)
    num_rows = sum(len(batch["input_ids"]) for batch in distinct)
    if num_rows < 2 * HELD_OUT:
        raise ValueError(
            f"sparsity=auto needs {2 * HELD_OUT} distinct training rows or more, got {num_rows}. Give it more, or set "
            "sparsity to a number."
        )
    return split_rows(distinct, HELD_OUT, HELD_OUT - 1)
