"""The paper's equations (GradPruner, arXiv:2601.19503) as slow Python loops over float64.

These functions check `gradpruner`, so this file must not import it. Matrices are nested lists, or tensors that are
read entry by entry.
"""

from typing import Any

import torch
from torch import Tensor

Matrix = list[list[float]]


def matrix(values: Any) -> Matrix:
    """Returns a tensor or nested lists as nested lists of Python floats."""
    return torch.as_tensor(values).double().tolist()


def product(left: Any, right: Any) -> Matrix:
    """Returns left @ right."""
    left, right = matrix(left), matrix(right)
    return [
        [sum(left[row][k] * right[k][column] for k in range(len(right))) for column in range(len(right[0]))]
        for row in range(len(left))
    ]


def igia(factors: list[tuple[Any, Any]], weights: list[float] | None = None) -> Matrix:
    """Returns 1/t * the sum over steps of the entrywise squared simulated gradient (Eq. 3); optionally weighted."""
    weights = weights or [1.0] * len(factors)
    steps = [product(left, right) for left, right in factors]
    return [
        [
            sum(weight * step[row][column] ** 2 for weight, step in zip(weights, steps, strict=True)) / len(steps)
            for column in range(len(steps[0][0]))
        ]
        for row in range(len(steps[0]))
    ]


def total(values: Matrix) -> float:
    """Returns the sum of all entries."""
    return sum(sum(row) for row in values)


def energy(left: Any, right: Any) -> float:
    """Returns the squared Frobenius norm of left @ right, computed from the full product."""
    return sum(entry**2 for row in product(left, right) for entry in row)


def layer_importance(energies: Any, score: str = "sumsq", weighting: str = "energy") -> list[float]:
    """Returns Eq. 4 from squared norms energies[step][layer][sublayer]; `frobenius`: the authors' code divided by t."""
    steps = torch.as_tensor(energies).double().tolist()
    num_layers = len(steps[0])
    importance = [0.0] * num_layers
    for step in steps:
        scores = [sum(value if score == "sumsq" else value**0.5 for value in layer) for layer in step]
        if weighting == "normalized":
            scale = sum(scores)
            scores = [value / scale if scale > 0 else 0.0 for value in scores]
        for layer in range(num_layers):
            importance[layer] += scores[layer] / len(steps)
    return importance


def mask(values: Any, density: float) -> list[list[bool]]:
    """Marks the int(numel * density) largest entries (Section 3.2); ties go to the lowest flat index."""
    values = matrix(values)
    columns = len(values[0])
    flat = [entry for row in values for entry in row]
    ranking = sorted(range(len(flat)), key=lambda index: (-flat[index], index))
    chosen = set(ranking[: int(len(flat) * density)])
    return [[row * columns + column in chosen for column in range(columns)] for row in range(len(values))]


def sign(value: float) -> int:
    """Returns -1, 0 or 1."""
    return (value > 0) - (value < 0)


def merge(kept: Any, pruned: list[Any], igias: list[Any], density: float, rule: str, kept_igia: Any = None) -> Matrix:
    """Merges by Eq. 5 (`sign_sum`), Eq. 6 (`sign_average`), Appendix B.2 (`fisher`) or the ablation of Figure 7.

    Signs are always compared with the original kept entry, however many layers are merged.
    """
    kept, pruned = matrix(kept), [matrix(weight) for weight in pruned]
    masks = [mask(values, density) for values in igias]
    scores = [matrix(values) for values in igias]
    kept_scores = matrix(kept_igia) if kept_igia is not None else None
    merged = [list(row) for row in kept]
    for row in range(len(kept)):
        for column in range(len(kept[0])):
            own = kept[row][column]
            values, weights = [own], [1.0 if kept_scores is None else kept_scores[row][column]]
            for weight, chosen, score in zip(pruned, masks, scores, strict=True):
                other = weight[row][column]
                if not chosen[row][column]:
                    continue
                if rule != "weighted_average" and (sign(other) == 0 or sign(other) != sign(own)):
                    continue
                values.append(other)
                weights.append(score[row][column] if rule == "fisher" else 1.0)
            if rule == "sign_sum":
                merged[row][column] = sum(values)
            elif rule in ("sign_average", "weighted_average"):
                merged[row][column] = sum(values) / len(values)
            elif rule == "fisher" and sum(weights[1:]) > 0:
                merged[row][column] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return merged


def close(actual: Tensor, expected: Any, rtol: float = 1e-6) -> None:
    """Fails unless a tensor agrees with an oracle's result, relative to the largest expected entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=rtol * scale)
