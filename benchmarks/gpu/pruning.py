"""Checks of pruning: importance on bfloat16 weights, merge and repair on the device, models spread over devices."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpu.common import DTYPES, Finding, Scale, judged, make_model, random_rows
from gradpruner.encoding import Batch, training_batches
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.hidden_states import answer_nll
from gradpruner.igia import layer_importance
from gradpruner.models.architectures import decoder_layers
from gradpruner.repair import repair
from gradpruner.runtime import default_device
from gradpruner.surgery import sharing_copy

METHOD = GradPruner(num_pruned_layers=2, merge_count=2, steps=5, batch_size=4, lora_rank=4, learning_rate=1e-3)
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of layer importance, to float32 on the same weights
MAX_ERROR = 1e-3  # of weights that merge and repair change, to those of the CPU


def check_importance(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Runs importance steps on bfloat16 and on float32 weights: equal scores, and the weights unchanged."""
    batches = _batches(scale)
    scores: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, name = make_model(scale.pruned, dtype), DTYPES[dtype]
        METHOD.measure(model, batches, folder / name)
        scores[dtype] = layer_importance(EarlyGradients.load(folder / name).energies)
        fresh = make_model(scale.pruned, dtype)
        yield judged(_error(model, fresh) == 0.0 and _is_at_home(model, dtype), f"{name}: weights are unchanged")
    exact, rounded = scores[torch.float32], scores[torch.bfloat16]
    difference = float(((rounded - exact).abs() / exact).max())
    yield judged(
        bool(exact.all()) and difference <= MAX_DIFFERENCE[torch.bfloat16],
        f"layer importance of bfloat16 weights is up to {difference:.2%} from float32's (at most "
        f"{MAX_DIFFERENCE[torch.bfloat16]:.0%})",
    )


def check_merge_and_repair(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Prunes, merges and repairs on the device and on the CPU, in float32; then on the device in bfloat16."""
    batches, device = _batches(scale), default_device()
    METHOD.measure(make_model(scale.pruned, torch.float32), batches, folder / "measured")
    there, here = (
        _prune(make_model(scale.pruned, torch.float32).to(place), batches, folder / "measured")
        for place in (device, torch.device("cpu"))
    )
    error = _error(there, here)
    yield judged(
        error <= MAX_ERROR and _is_at_home(there, torch.float32),
        f"weights merged and repaired on {device.type} are {error:.1e} from those of the CPU (at most {MAX_ERROR:.0e})",
    )
    low = _prune(make_model(scale.pruned, torch.bfloat16), batches, folder / "measured")
    loss, expected = answer_nll(low, batches), answer_nll(there, batches)
    yield judged(
        abs(loss / expected - 1) <= 0.02 and _is_at_home(low, torch.bfloat16),
        f"merged and repaired in bfloat16, the loss is {loss:.4f}, in float32 {expected:.4f} (at most 2 % apart)",
    )


def check_device_map(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Spreads a model over a GPU and the host (in the rehearsal over host and disk) with `device_map="auto"`.

    Half of the layers lie on the second place, from which accelerate fetches them when they run. Such a model computes
    what a whole one does. Pruning it must do so too, or be refused with the numbers of the layers that are away.
    """
    batches, whole = _batches(scale), make_model(scale.pruned, torch.float32)
    whole.save_pretrained(folder / "model")
    layers = decoder_layers(whole)
    room = _bytes(whole) - _bytes(layers) // 2 - _bytes(whole.lm_head)
    first: int | str = 0 if default_device().type == "cuda" else "cpu"
    room += _bytes(layers[0])  # accelerate leaves room for a layer that it fetches
    spread = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        device_map="auto",
        max_memory={first: room} | ({"cpu": 2**34} if first == 0 else {}),
        offload_folder=folder / "offload",
    ).eval()
    away = [i for i, layer in enumerate(decoder_layers(spread)) if any(value.is_meta for value in layer.parameters())]
    places = sorted({str(place) for place in spread.hf_device_map.values()})
    yield judged(
        0 < len(away) < len(layers), f"device_map=auto spreads the model over {', '.join(places)}; away: {away}"
    )
    loss, expected = answer_nll(spread, batches), answer_nll(whole, batches)
    yield judged(abs(loss / expected - 1) <= 1e-4, f"the loss of the spread model is {loss:.5f}, whole {expected:.5f}")
    METHOD.measure(whole, batches, folder / "whole")
    try:
        METHOD.measure(spread, batches, folder / "spread")
    except ValueError as error:
        yield judged(f"layers {away}" in str(error), f"the importance run refuses the spread model: {error}")
        return
    of_whole, of_spread = (
        layer_importance(EarlyGradients.load(folder / name).energies) for name in ("whole", "spread")
    )
    difference = float(((of_spread - of_whole).abs() / of_whole).max())
    yield judged(
        difference <= MAX_DIFFERENCE[torch.float32],
        f"layer importance of the spread model is up to {difference:.1e} from the whole one's",
    )


def _prune(dense: PreTrainedModel, batches: Sequence[Batch], measured: Path) -> PreTrainedModel:
    compressed = METHOD.prune(sharing_copy(dense), measured)
    repair(compressed.model, dense, compressed.plan, batches)
    return compressed.model


def _batches(scale: Scale) -> list[Batch]:
    rows = random_rows(scale.pruned, 20, 24, 8)
    return list(training_batches(rows, METHOD.batch_size, METHOD.batch_size * 5, 1, seed=0))


def _error(one: nn.Module, other: nn.Module) -> float:
    """Returns the largest difference of two weights, as a fraction of the norm of the weight."""
    pairs = [
        [value.detach().cpu() for value in both] for both in zip(one.parameters(), other.parameters(), strict=True)
    ]
    return max(float((own - theirs).norm() / theirs.norm()) for own, theirs in pairs)


def _is_at_home(model: nn.Module, dtype: torch.dtype) -> bool:
    """Returns whether all weights have the dtype and are on the default device."""
    return {(value.device.type, value.dtype) for value in model.parameters()} == {(default_device().type, dtype)}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
