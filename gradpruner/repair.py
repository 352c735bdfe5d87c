"""Repair the damage of pruned layers in closed form, before any training: one linear map per run of pruned layers.

Beyond the paper; related: ReplaceMe (arXiv:2505.02819). For a run of consecutive pruned layers, let M be the MLP output
of the kept layer before it, Y the residual stream that M is added to, and Z the state that enters the next kept layer
in the dense model, all (tokens, d). The ridge problem

    T = argmin ||M T + Y - Z||^2 + lambda ||T - T_0||^2,   T_0 = I (default) or 0

is solved, and T is folded into the down_proj of that kept layer (W becomes T' W), so the checkpoint keeps its standard
architecture. With T_0 = I, a large lambda amounts to plain dropping. Runs are fitted in order of depth, each on the
model repaired so far. The target is always the dense model's state, so that a later map also corrects the error that
remains from earlier runs. Sums are kept in float64: two (d, d) matrices per run, never activations of more than one
batch. Padding and the first token of a row, an outlier in most models, are excluded. Lambda is chosen on rows held out
of the fit. A fit is not applied if it does not lower their error, or if dropping costs no more than rounding.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from gradpruner.checks import check_choice
from gradpruner.encoding import Batch
from gradpruner.files import write_json
from gradpruner.hidden_states import decode, watch_layers
from gradpruner.models.architectures import decoder_layers, linear_sublayers
from gradpruner.plan import PruningPlan, preceding_kept_layer
from gradpruner.surgery import only_layers

REPAIRS = ("none", "least_squares")
TOWARDS = ("identity", "zero")
# Their layers add the output of down_proj to the residual stream unchanged; in Gemma and OLMo 2 a norm comes between.
REPAIRABLE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
DOWN_PROJ = "mlp.down_proj"
WEIGHTS_FILE, FITS_FILE = "repair.safetensors", "repair.json"
# Fractions of the mean eigenvalue of M'M; the largest ones change next to nothing.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
BLOCK = 256  # columns of a matrix processed at a time, so that no third matrix is needed
HELD_OUT = 5  # every fifth row is held out


@dataclass(frozen=True)
class PrunedRun:
    """Run of consecutive pruned layers; numbers are 0-based positions in the dense model.

    Attributes:
        absorber: the kept layer before the run.
        last: last layer of the run, whose output is the target.
    """

    absorber: int
    last: int


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


def check_repairable(config: PreTrainedConfig) -> None:
    """Refuses architectures that change the output of down_proj before the residual stream.

    Raises:
        ValueError: if the model type is not one of `REPAIRABLE_MODEL_TYPES`.
    """
    if config.model_type not in REPAIRABLE_MODEL_TYPES:
        raise ValueError(
            "repair=least_squares folds a map into down_proj, whose output must reach the residual stream as it is; "
            f"known for {', '.join(REPAIRABLE_MODEL_TYPES)}, got model type {config.model_type!r}. Set "
            "method.repair=none, or choose such a model."
        )


def pruned_runs(plan: PruningPlan) -> list[PrunedRun]:
    """Returns the runs of a plan that have a kept layer before them, in order of depth."""
    runs = []
    for layer in plan.pruned_layers:
        absorber = preceding_kept_layer(layer, plan.pruned_layers)
        if absorber is not None and layer + 1 not in plan.pruned_layers:
            runs.append(PrunedRun(absorber, layer))
    return runs


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[Batch],
    towards: str = "identity",
) -> list[Fit]:
    """Folds a map for every run of pruned layers into the pruned model, in place.

    Args:
        model: the pruned model; may share weights with `dense`, see `surgery.sharing_copy`.
        dense: the dense model; unchanged.
        plan: the plan that was applied to `model`.
        batches: calibration rows, dicts of `input_ids` and `attention_mask`, each (B, T); all are read for every run.
        towards: what a large lambda pulls T towards, one of `TOWARDS`.

    Returns:
        One `Fit` per run.

    Raises:
        ValueError: if the architecture is not supported, or there are fewer than two rows.
    """
    check_choice("towards", towards, TOWARDS)
    check_repairable(model.config)
    rows = list(batches)
    num_rows = sum(len(batch["input_ids"]) for batch in rows)
    if num_rows < 2:
        raise ValueError(
            f"repair=least_squares fits on some rows and chooses lambda on others, got {num_rows} rows. Give it more."
        )
    fits = []
    for run in tqdm(pruned_runs(plan), desc="repair", unit="run"):
        states = _States(model, dense, plan, run, rows, min(HELD_OUT, num_rows))
        solution = solve(states.fitted(), towards)
        ridge, repaired, dropped = best_ridge(solution, states.held_out())
        rounding = torch.finfo(model.dtype).eps ** 2  # an error below this is not due to the dropped layers
        applied = repaired < dropped and dropped > rounding
        if applied:
            fold(_down_proj(model, plan, run.absorber), solution, ridge)
        fits.append(Fit(run.absorber, run.last, solution.num_tokens, ridge, dropped, min(repaired, dropped), applied))
    return fits


def fold(linear: nn.Linear, solution: "Solution", ridge: float) -> None:
    """Multiplies the output y of a linear sublayer by the map of a lambda: y becomes y T.

    Replaces the tensors instead of writing to them, so that a model that shares them keeps the old ones.
    """
    weight = torch.empty_like(linear.weight)
    for before, after in zip(torch.split(linear.weight, BLOCK, dim=1), torch.split(weight, BLOCK, dim=1), strict=True):
        after.copy_(solution.apply(before.T.double(), ridge).T)
    linear.weight.data = weight
    if linear.bias is not None:
        linear.bias.data = solution.apply(linear.bias.double(), ridge).to(linear.bias.dtype)


@dataclass(frozen=True)
class Solution:
    """Ridge problem of one run, solved for every lambda: M'M = V diag(e) V'.

    Attributes:
        vectors: V, (d, d) float64.
        values: e, (d,) float64.
        projected: V' M' R, (d, d) float64, with R = Z - Y - M T_0.
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


def solve(pairs: Iterable[tuple[Tensor, Tensor]], towards: str = "identity") -> Solution:
    """Sums M'M and M'R over pairs of M and Z - Y, (tokens, d) each, and decomposes M'M."""
    gram: Tensor | None = None
    cross, num_tokens = torch.zeros(0), 0
    for outputs, missing in pairs:
        outputs, missing = outputs.double(), missing.double()
        rest = missing - outputs if towards == "identity" else missing
        if gram is None:
            gram = torch.zeros(outputs.shape[1], outputs.shape[1], dtype=torch.float64, device=outputs.device)
            cross = torch.zeros_like(gram)
        gram.addmm_(outputs.T, outputs)
        cross.addmm_(outputs.T, rest)
        num_tokens += len(outputs)
    assert gram is not None
    values, vectors = torch.linalg.eigh(gram)
    del gram
    for columns in torch.split(cross, BLOCK, dim=1):
        columns.copy_(vectors.T @ columns)
    return Solution(vectors, values.clamp_min(0.0), cross, towards, num_tokens)


def best_ridge(solution: Solution, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Returns the lambda with the least error on tokens held out of the fit.

    Args:
        solution: solution of the fit.
        pairs: M and Z - Y of the held-out tokens, (tokens, d) each.

    Returns:
        The lambda, its squared error and that of T = I (plain dropping); the errors as fractions of ||Z - Y||^2.
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


def save_repair(model: PreTrainedModel, plan: PruningPlan, fits: Sequence[Fit], directory: Path) -> None:
    """Writes the down_proj of every repaired layer, and the fits."""
    tensors = {
        f"{layer}.{name}": value.detach().cpu().contiguous()
        for layer in (fit.absorber for fit in fits if fit.applied)
        for name, value in _down_proj(model, plan, layer).named_parameters()
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    write_json(directory / FITS_FILE, [asdict(fit) for fit in fits])


@torch.no_grad()
def load_repair(model: PreTrainedModel, plan: PruningPlan, directory: Path) -> list[dict[str, Any]]:
    """Loads the output of `save_repair` into the pruned model; returns the fits."""
    for name, value in load_file(directory / WEIGHTS_FILE).items():
        layer, _, parameter = name.partition(".")
        _down_proj(model, plan, int(layer)).get_parameter(parameter).copy_(value)
    return read_fits(directory)


def read_fits(directory: Path) -> list[dict[str, Any]]:
    """Reads the fits that `save_repair` wrote."""
    fits: list[dict[str, Any]] = json.loads((directory / FITS_FILE).read_text())
    return fits


def _down_proj(model: PreTrainedModel, plan: PruningPlan, layer: int) -> nn.Linear:
    """Returns the pruned model's `down_proj` for dense layer `layer`, which must be kept."""
    return linear_sublayers(decoder_layers(model)[plan.kept_layers.index(layer)])[DOWN_PROJ]


class _States:
    """M and Z - Y of a run, batch by batch.

    Args:
        model: the pruned model, with all earlier runs repaired.
        dense: the dense model.
        plan: the plan that was applied to `model`.
        run: the run to read.
        batches: all rows.
        held_out: every `held_out`-th row is held out of the fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        plan: PruningPlan,
        run: PrunedRun,
        batches: list[Batch],
        held_out: int,
    ) -> None:
        self._model, self._dense, self._run = model, dense, run
        self._batches, self._held_out = batches, held_out
        self.position = plan.kept_layers.index(run.absorber)  # of the absorber in the pruned model

    def fitted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (M, Z - Y) for the rows of the fit."""
        return self._pairs(held_out=False)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (M, Z - Y) for the held-out rows."""
        return self._pairs(held_out=True)

    def _pairs(self, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
        row = 0
        for batch in self._batches:
            numbers = torch.arange(row, row + len(batch["input_ids"]))
            row += len(numbers)
            chosen = (numbers % self._held_out == self._held_out - 1) == held_out
            if bool(chosen.any()):
                yield self._of({name: values[chosen] for name, values in batch.items()})

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        down_proj = linear_sublayers(decoder_layers(self._model)[self.position])[DOWN_PROJ]
        device = down_proj.weight.device  # of M, of the sums and of the map; the target may come from another one
        mask = batch["attention_mask"].to(device)
        tokens = mask.bool() & (mask.cumsum(-1) > 1)  # neither padding nor the first token of a row
        target = _output(self._dense, self._run.last, batch).to(device)[tokens]
        outputs: list[Tensor] = []
        handle = down_proj.register_forward_hook(lambda module, inputs, output: outputs.append(output[tokens]))
        try:
            after = _output(self._model, self.position, batch).to(device)[tokens]
        finally:
            handle.remove()
        return outputs[0], target - (after - outputs[0])


def _output(model: PreTrainedModel, layer: int, batch: Batch) -> Tensor:
    """Returns the raw output of a layer, (B, T, d); later layers are not run."""
    seen: list[Tensor] = []

    def note(index: int, before: Tensor, after: Tensor) -> None:
        if index == layer:
            seen.append(after)

    with only_layers(model, tuple(range(layer + 1))), watch_layers(model, note):
        decode(model, batch)
    return seen[0]
