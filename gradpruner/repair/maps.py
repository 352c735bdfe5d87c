"""Linear maps of a sublayer's output: ridge regression in closed form, and folding the map into the weight.

For M (what the sublayer adds to the residual stream) and R = Z - Y (what it would have to add), (tokens, d) each:

    T = argmin ||M T - R||^2 + lambda ||T - T_0||^2,   T_0 = I (default) or 0

With T_0 = I, a large lambda changes nothing. Sums are kept in float64: two (d, d) matrices, whatever the tokens.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOWARDS = ("identity", "zero")
# Fractions of the mean eigenvalue of M'M; the largest ones change next to nothing.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
BLOCK = 256  # columns of a matrix processed at a time, so that no third matrix is needed


@dataclass(frozen=True)
class Solution:
    """Ridge problem of one run, solved for every lambda: M'M = V diag(e) V'.

    Attributes:
        vectors: V, (d, d) float64.
        values: e, (d,) float64.
        projected: V' M' (R - M T_0), (d, d) float64.
        towards: one of `TOWARDS`.
        num_tokens: number of tokens summed.
    """

    vectors: Tensor
    values: Tensor
    projected: Tensor
    towards: str
    num_tokens: int

    def apply(self, outputs: Tensor, ridge: float) -> Tensor:
        """Returns outputs times T, (..., d) float64 to the same; `ridge` is a fraction of the mean eigenvalue."""
        change = (outputs @ self.vectors / (self.values + ridge * self.values.mean())) @ self.projected
        return change + outputs if self.towards == "identity" else change


class Sums:
    """M'M and M'(R - M T_0), summed batch by batch.

    Args:
        towards: one of `TOWARDS`.
    """

    def __init__(self, towards: str = "identity") -> None:
        self._towards = towards
        self._gram: Tensor | None = None
        self._cross = torch.zeros(0)
        self._num_tokens = 0

    def add(self, outputs: Tensor, missing: Tensor) -> None:
        """Adds tokens: M and R, (tokens, d) each."""
        outputs, missing = outputs.double(), missing.double()
        rest = missing - outputs if self._towards == "identity" else missing
        if self._gram is None:
            self._gram = torch.zeros(outputs.shape[1], outputs.shape[1], dtype=torch.float64, device=outputs.device)
            self._cross = torch.zeros_like(self._gram)
        self._gram.addmm_(outputs.T, outputs)
        self._cross.addmm_(outputs.T, rest)
        self._num_tokens += len(outputs)

    def channel_scales(self, ridge: float) -> Tensor:
        """Returns the diagonal T with the least squared error, (d,) float64; lambda is `ridge` x the mean of M'M."""
        assert self._gram is not None
        squares = self._gram.diagonal()
        origin = 1.0 if self._towards == "identity" else 0.0
        return origin + self._cross.diagonal() / (squares + ridge * squares.mean())

    def solve(self) -> Solution:
        """Decomposes M'M; uses the sums up, so call it last."""
        assert self._gram is not None
        values, vectors = torch.linalg.eigh(self._gram)
        self._gram = None
        for columns in torch.split(self._cross, BLOCK, dim=1):
            columns.copy_(vectors.T @ columns)
        return Solution(vectors, values.clamp_min(0.0), self._cross, self._towards, self._num_tokens)


def solve(pairs: Iterable[tuple[Tensor, Tensor]], towards: str = "identity") -> Solution:
    """Returns the solution for pairs of M and R, (tokens, d) each."""
    sums = Sums(towards)
    for outputs, missing in pairs:
        sums.add(outputs, missing)
    return sums.solve()


def best_ridge(solution: Solution, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Returns the lambda with the least error on tokens held out of the fit.

    Args:
        solution: solution of the fit.
        pairs: M and R of the held-out tokens, (tokens, d) each.

    Returns:
        The lambda, its squared error and that of T = I (plain dropping); the errors as fractions of ||R||^2.
    """
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    dropped = nothing = 0.0
    for outputs, missing in pairs:
        outputs, missing = outputs.double(), missing.double()
        for number, ridge in enumerate(RIDGES):
            errors[number] += float((solution.apply(outputs, ridge) - missing).square().sum())
        dropped += float((outputs - missing).square().sum())
        nothing += float(missing.square().sum())
    best = int(errors.argmin())
    scale = max(nothing, math.ulp(0.0))
    return RIDGES[best], float(errors[best]) / scale, dropped / scale


def fold(linear: nn.Linear, solution: Solution, ridge: float) -> None:
    """Multiplies the output y of a linear sublayer by the map of a lambda: y becomes y T.

    Replaces the tensors instead of writing to them, so that a model that shares them keeps the old ones.
    """
    weight = torch.empty_like(linear.weight)
    for before, after in zip(torch.split(linear.weight, BLOCK, dim=1), torch.split(weight, BLOCK, dim=1), strict=True):
        after.copy_(solution.apply(before.T.double(), ridge).T)
    linear.weight.data = weight
    if linear.bias is not None:
        linear.bias.data = solution.apply(linear.bias.double(), ridge).to(linear.bias.dtype)


def scale(module: nn.Module, factors: Tensor | float) -> None:
    """Multiplies the output channels of a linear sublayer or of a norm; replaces the tensors as `fold` does.

    Args:
        module: the sublayer, or an RMS norm. Gemma's multiply by 1 + weight.
        factors: one factor, or one per channel, (d_out,) float64.
    """
    is_linear = isinstance(module, nn.Linear)
    shift = 0.0 if is_linear or not type(module).__name__.startswith("Gemma") else 1.0
    for name, parameter in module.named_parameters(recurse=False):
        rows = factors[:, None] if isinstance(factors, Tensor) and parameter.ndim > 1 else factors
        offset = shift if name == "weight" else 0.0
        parameter.data = ((parameter.double() + offset) * rows - offset).to(parameter.dtype)
