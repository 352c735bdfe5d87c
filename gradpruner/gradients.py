"""Saved result of the importance run. A file of its own, so that reading imports none of the training libraries."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from gradpruner.igia import Factors

RESULT_FILE = "importance.json"


@dataclass(frozen=True)
class EarlyGradients:
    """Result of the importance run, read from its folder.

    Attributes:
        directory: folder with `importance.json` and one file of factors per step.
        sublayers: names of the linear sublayers of a decoder layer.
        energies: squared Frobenius norm of the simulated gradient, (t, L, M) float64.
        losses: training loss per step.
        train_seconds: wall time of the steps.
        peak_memory_bytes: see `cost.PeakMemory`.
    """

    directory: Path
    sublayers: tuple[str, ...]
    energies: Tensor
    losses: tuple[float, ...]
    train_seconds: float
    peak_memory_bytes: int

    @classmethod
    def load(cls, directory: Path) -> "EarlyGradients":
        """Reads the folder that `record_early_gradients` wrote; factors are read only when `factors` asks for them."""
        data = json.loads((directory / RESULT_FILE).read_text())
        return cls(
            directory=directory,
            sublayers=tuple(data["sublayers"]),
            energies=torch.tensor(data["energies"], dtype=torch.float64),
            losses=tuple(data["losses"]),
            train_seconds=data["train_seconds"],
            peak_memory_bytes=data["peak_memory_bytes"],
        )

    def factors(self, layer: int, sublayer: str, device: torch.device | str = "cpu") -> list[Factors]:
        """Returns the per-step factors of one sublayer's simulated gradient, shapes (out, k) and (k, in), on `device`.

        What is computed from them is computed there: for a weight on a GPU, IGIA-Matrices take seconds, not minutes.
        """
        factors = []
        for step in range(len(self.energies)):
            with safe_open(self.directory / step_file(step), framework="pt") as tensors:
                left, right = factor_names(layer, sublayer)
                factors.append((tensors.get_tensor(left).to(device), tensors.get_tensor(right).to(device)))
        return factors


def step_file(step: int) -> str:
    """Returns the name of the file with the factors of a 0-based step."""
    return f"step-{step:05d}.safetensors"


def factor_names(layer: int, sublayer: str) -> tuple[str, str]:
    """Returns the names of the left and right factor of a sublayer in a step's file."""
    return f"layers.{layer}.{sublayer}.left", f"layers.{layer}.{sublayer}.right"
