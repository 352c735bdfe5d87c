"""The IGIA-Matrix: accumulated squared simulated gradients of the first LoRA steps, and layer importance from it.

GradPruner (arXiv:2601.19503), Section 3.1. For a weight W with adapters A (r, in) and B (out, r), step i of t gives the
simulated gradient G_i = grad_B_i @ grad_A_i (Eq. 2), F = 1/t * sum_i G_i^2 (Eq. 3), and a layer's importance is the sum
of F over all entries of all its linear sublayers (Eq. 4). Scores never form an (out, in) matrix: ||B A||_F^2 is the
inner product of two r x r Gram matrices. F itself is formed only for weights that merge, one block of rows at a time.

This file is tensors only; `importance.py` runs the training steps that produce the factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradpruner.checks import check_choice

SCORES = ("sumsq", "frobenius")
GRADIENT_ESTIMATES = ("product", "tangent")
STEP_WEIGHTINGS = ("energy", "normalized")

Factors = tuple[Tensor, Tensor]  # left (out, k), right (k, in); their product is the simulated gradient


def simulated_gradient(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, estimate: str = "product") -> Factors:
    """Factors of one step's simulated gradient of W.

    - `product`: grad_B @ grad_A (Eq. 2). Zero at the first step, because LoRA's B starts at zero and so does grad_A.
    - `tangent`: grad_B @ A + B @ grad_A, the first-order change of B @ A under a gradient step; non-zero at step 1.

    LoRA's scaling alpha / r is the same for every sublayer and omitted, as in the authors' code.

    Args:
        a: adapter A, (r, in).
        b: adapter B, (out, r).
        grad_a: gradient of A, (r, in).
        grad_b: gradient of B, (out, r).
        estimate: one of `GRADIENT_ESTIMATES`.

    Returns:
        (left, right) of shapes (out, r) and (r, in) for `product`, (out, 2r) and (2r, in) for `tangent`.

    Raises:
        ValueError: if `estimate` is unknown.
    """
    check_choice("gradient_estimate", estimate, GRADIENT_ESTIMATES)
    if estimate == "product":
        return grad_b, grad_a
    return torch.cat([grad_b, b], dim=1), torch.cat([a, grad_a], dim=0)


def squared_frobenius(grad_b: Tensor, grad_a: Tensor) -> Tensor:
    """Returns ||grad_b @ grad_a||_F^2 = <grad_b^T grad_b, grad_a grad_a^T>, without forming the (out, in) product.

    Args:
        grad_b: left factor, (out, r).
        grad_a: right factor, (r, in).

    Returns:
        float64 scalar, never negative: entries are products of small gradients and would underflow in float32.
    """
    left, right = grad_b.double(), grad_a.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp_min(0.0)  # (r, r) * (r, r)


def igia_matrix(factors: Sequence[Factors], weights: Sequence[float] | None = None, row_block: int = 1024) -> Tensor:
    """Computes F = 1/t * sum_i w_i * (left_i @ right_i)^2 (Eq. 3, where all w_i = 1).

    The products are formed `row_block` rows at a time, so that F is the only (out, in) matrix in memory.

    Args:
        factors: one (left, right) pair per step, shapes (out, k) and (k, in).
        weights: one weight per step (see `step_weights`), or None for all 1.
        row_block: rows of F formed at once.

    Returns:
        F, (out, in), float32 or wider.

    Raises:
        ValueError: if there are no factors, or not exactly one weight per step.
    """
    if not factors:
        raise ValueError("igia_matrix needs at least one step, got no factors.")
    if weights is None:
        weights = [1.0] * len(factors)
    if len(weights) != len(factors):
        raise ValueError(f"igia_matrix needs one weight a step, got {len(weights)} weights for {len(factors)} steps.")
    num_rows, num_columns = factors[0][0].shape[0], factors[0][1].shape[1]
    # An entry of F is a product of four gradients; beyond these bounds float32 would flush it to zero or overflow.
    largest = max(float(left.abs().max()) * float(right.abs().max()) for left, right in factors)
    fits = 1e-25 < largest**2 < 1e30
    dtype = torch.promote_types(factors[0][0].dtype, torch.float32) if fits else torch.float64
    igia = torch.zeros(num_rows, num_columns, dtype=dtype, device=factors[0][0].device)
    for start in range(0, num_rows, row_block):
        rows = slice(start, start + row_block)
        for weight, (left, right) in zip(weights, factors, strict=True):
            if weight == 0.0:
                continue
            gradient = left[rows].to(dtype) @ right.to(dtype)  # (block, in), Eq. 2
            igia[rows].addcmul_(gradient, gradient, value=weight / len(factors))  # Eq. 3
    return igia


def step_weights(energies: Tensor, weighting: str = "energy") -> Tensor:
    """Returns the weight of each step in the mean of Eq. 3.

    Args:
        energies: squared Frobenius norm per step, layer and sublayer, (t, L, M).
        weighting: `energy` (weight 1 for every step) or `normalized` (scales every step's sum over the model to one, so
            that a few spiky steps cannot decide alone; a step without gradient has weight 0).

    Returns:
        (t,) float64.
    """
    check_choice("step_weighting", weighting, STEP_WEIGHTINGS)
    if weighting == "energy":
        return torch.ones(energies.shape[0], dtype=torch.float64)
    totals = energies.double().sum(dim=(1, 2))  # (t,)
    return torch.where(totals > 0, 1.0 / totals, 0.0)


def step_importance(energies: Tensor, score: str = "sumsq", weighting: str = "energy") -> Tensor:
    """Returns the importance of every layer at every step; the mean over steps is the layer importance.

    - `sumsq`: sum over sublayers of ||G||_F^2 (Eq. 3 and 4).
    - `frobenius`: sum over sublayers of ||G||_F, unsquared (the authors' code, which also omits 1/t).

    Args:
        energies: squared Frobenius norm per step, layer and sublayer, (t, L, M).
        score: one of `SCORES`.
        weighting: one of `STEP_WEIGHTINGS`; `normalized` makes every step's layer scores sum to one.

    Returns:
        (t, L) float64.
    """
    check_choice("score", score, SCORES)
    check_choice("step_weighting", weighting, STEP_WEIGHTINGS)
    energies = energies.double()
    per_step = (energies if score == "sumsq" else energies.sqrt()).sum(dim=2)  # (t, L)
    if weighting == "normalized":
        totals = per_step.sum(dim=1, keepdim=True)  # (t, 1)
        per_step = torch.where(totals > 0, per_step / totals, 0.0)
    return per_step


def layer_importance(energies: Tensor, score: str = "sumsq", weighting: str = "energy") -> Tensor:
    """Returns the layer importance (Eq. 4): the mean of `step_importance` over the t steps, (L,) float64."""
    return step_importance(energies, score, weighting).mean(dim=0)
