"""How APT's adapters grow: the more salient half gets higher ranks, several times, up to a number of parameters.

`apt` grows at its cuts. `apt_fast` prunes before the fine-tune and grows by `GrowthCallback`, in the proportions of the
code's script (3 times up to a quarter of the training).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baselines.apt.adapters import ADAPTER, adapters, factors, grow, num_adapter_parameters
from baselines.apt.schedule import Schedule
from baselines.apt.scores import DECAY
from baselines.width_pruning import highest
from gradpruner.files import content_hash

STATE_FILE = "apt_growth.safetensors"  # in a Trainer checkpoint


def rank_salience(factor: Tensor, gradient: Tensor) -> float:
    """Returns |sum_j A_rj dL/dA_rj|, averaged over the ranks r of an adapter.

    Args:
        factor: A, (rank, inputs).
        gradient: gradient of the loss, (rank, inputs).
    """
    return float((factor * gradient).sum(1).abs().mean())


def grown_ranks(
    ranks: Sequence[int], widths: Sequence[int], saliences: Sequence[float], target: float, max_rank: int
) -> list[int]:
    """Returns the ranks of adapters after the more salient ones have grown to use up the target.

    Adapters at `max_rank` are left out first; of the others, the most salient grow, as many as half of all adapters.
    r' = floor(r ((target - current) / parameters of those + 1)), as in the code; the paper has r target / current.

    Args:
        ranks: r of each adapter.
        widths: parameters per rank: inputs + outputs.
        saliences: see `rank_salience`, averaged over steps.
        target: parameters of all adapters.
        max_rank: rank beyond which no adapter grows.
    """
    able = [index for index, rank in enumerate(ranks) if rank < max_rank]
    count = min(len(able), len(ranks) // 2)
    growing = [able[place] for place in highest([saliences[index] for index in able], count)]
    current = sum(rank * width for rank, width in zip(ranks, widths, strict=True))
    of_growing = sum(ranks[index] * widths[index] for index in growing)
    grown = list(ranks)
    for index in growing:
        larger = math.floor(ranks[index] * ((target - current) / of_growing + 1))
        grown[index] = max(ranks[index], min(larger, max_rank))
    return grown


class Saliences:
    """Running salience of every adapter of a model in training.

    Args:
        model: with LoRA.
        values: saliences to start from, (adapters,), or None for 0.
    """

    def __init__(self, model: PeftModel, values: Tensor | None = None) -> None:
        self._model = model
        self._values = [0.0] * len(adapters(model)) if values is None else values.tolist()

    def update(self) -> None:
        """Adds the salience of the current gradients, which must be complete."""
        for index, layer in enumerate(adapters(self._model).values()):
            weight = factors(layer)[0].weight
            assert weight.grad is not None
            salience = rank_salience(weight.detach(), weight.grad)
            self._values[index] = DECAY * self._values[index] + (1 - DECAY) * salience

    def tensor(self) -> Tensor:
        """Returns the saliences for saving, (adapters,) float64."""
        return torch.tensor(self._values, dtype=torch.float64)

    def grow(self, target: float, max_rank: int, optimizer: Optimizer, seed: int, step: int) -> None:
        """Grows adapters to use up `target` parameters, then starts the saliences anew, as the code does."""
        own = adapters(self._model)
        ranks = [layer.r[ADAPTER] for layer in own.values()]
        widths = [num_adapter_parameters(layer) // rank for layer, rank in zip(own.values(), ranks, strict=True)]
        grown = grown_ranks(ranks, widths, self._values, target, max_rank)
        # Seeded by the step, a draw needs no generator state in the checkpoint. torch takes only 32 bits.
        generator = torch.Generator().manual_seed(int(content_hash([seed, step])[:8], 16))
        grow(self._model, dict(zip(own, grown, strict=True)), optimizer, generator)
        self._values = [0.0] * len(own)


class GrowthCallback(TrainerCallback):
    """Callback that only grows adapters.

    Args:
        growth: adapter parameters after the last growth, as a multiple of those at the start.
        max_rank: rank beyond which no adapter grows.
        times: fractions of the training steps between which adapters grow.
        num_growths: how often they grow.
        seed: seed of new ranks.
    """

    def __init__(self, growth: float, max_rank: int, times: tuple[float, float], num_growths: int, seed: int) -> None:
        self._growth, self._max_rank, self._times = growth, max_rank, times
        self._num_growths, self._seed = num_growths, seed

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Restores the saliences of a resumed run."""
        assert model is not None
        start, end = self._times
        self._schedule = Schedule.of(state.max_steps, start, end, 1.0, self._num_growths)
        own = adapters(model).values()
        # Widths do not change, so this is the number at the start, also in a resumed run whose adapters have grown.
        per_rank = sum(num_adapter_parameters(layer) // layer.r[ADAPTER] for layer in own)
        self._first = per_rank * model.peft_config[ADAPTER].r
        file = _state_file(args, state)
        if state.global_step and not file.is_file():
            raise ValueError(
                f"A checkpoint of method=apt_fast holds the salience of adapters, got none in {file}. Delete the "
                "checkpoints to train from the start."
            )
        self._saliences = Saliences(model, load_file(file)["saliences"] if state.global_step else None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scores the adapters, whose gradients are complete now."""
        if state.global_step < self._schedule.cuts[-1]:
            self._saliences.update()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Grows adapters where the schedule says so."""
        step = state.global_step
        if step in self._schedule.cuts:
            assert optimizer is not None
            target = self._first * (1 + (self._growth - 1) * self._schedule.progress(step))
            self._saliences.grow(target, self._max_rank, optimizer, self._seed, step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the saliences."""
        save_file({"saliences": self._saliences.tensor()}, _state_file(args, state))


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
