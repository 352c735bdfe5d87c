"""The repaired weights on disk: those tensors that the repair replaced, and its fits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from gradpruner.files import write_json
from gradpruner.repair.judged import JudgedFit
from gradpruner.repair.least_squares import Fit

WEIGHTS_FILE, FITS_FILE = "repair.safetensors", "repair.json"


def current_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors of a model by name. A repair replaces tensors, so these stay as they are."""
    return {name: weight.data for name, weight in model.named_parameters()}


def save_repair(
    model: PreTrainedModel, before: Mapping[str, Tensor], fits: Sequence[Fit | JudgedFit], directory: Path
) -> None:
    """Writes the weights that the repair replaced, and the fits.

    Args:
        model: the repaired model.
        before: `current_weights` of the model before the repair.
        fits: what the repair did.
        directory: where to write.
    """
    tensors = {
        name: weight.detach().cpu().contiguous()
        for name, weight in model.named_parameters()
        if weight.data_ptr() != before[name].data_ptr()
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    write_json(directory / FITS_FILE, [asdict(fit) for fit in fits])


@torch.no_grad()
def load_repair(model: PreTrainedModel, directory: Path) -> list[dict[str, Any]]:
    """Loads the output of `save_repair` into the pruned model; returns the fits."""
    for name, value in load_file(directory / WEIGHTS_FILE).items():
        model.get_parameter(name).copy_(value)
    return read_fits(directory)


def read_fits(directory: Path) -> list[dict[str, Any]]:
    """Reads the fits that `save_repair` wrote."""
    fits: list[dict[str, Any]] = json.loads((directory / FITS_FILE).read_text())
    return fits
