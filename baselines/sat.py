"""SAT, sparsity-accelerated training (Ma et al., 2024): omit units while training, end with the dense model.

Every forward and backward pass omits a fraction of the KV groups and MLP channels of each layer, by gathering the kept
rows and columns into smaller matrices. The fraction shrinks in steps to zero. The last training steps are dense, as is
inference. Every few steps units are scored and drawn anew, from statistics of ordinary training forwards.

Deviation: SAT's code is not public. Its abstract and public summaries describe omission, its units, the ladder, and
that there are several metrics and selection methods. Formulas, rates, rungs and refresh are ours, and so are results:
here SAT ends level with dense fine-tuning, in the GradPruner paper 3 to 5 points below. The dense tail makes up for
what omission costs. `sat_constant` has none: between the two lies the range of the schedules that the authors may have.

Weights, gradients and optimizer state keep their full size: only activations need less memory. The gradient of an
omitted weight is exactly zero, but AdamW still moves the weight by momentum and weight decay; `freeze_omitted` stops
that.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from baselines.sat_units import (
    OBSERVING_METRICS,
    SELECTION_METRICS,
    SELECTIONS,
    Block,
    ChannelStatistics,
    find_blocks,
    select_units,
)
from gradpruner.caveats import CAVEATS
from gradpruner.checks import check_choice
from gradpruner.files import content_hash
from gradpruner.method import Compressed, Method
from gradpruner.models.shape import ModelShape, check_width_supported

LADDERS = ("steps", "none")
STATE_FILE = "sat.safetensors"  # in a Trainer checkpoint
ROUNDING = 1e-9  # so that floor(0.29 * 100) is 29, whatever the last bit


@dataclass(frozen=True)
class Sat(Method):
    """Omission of KV groups and MLP channels during fine-tuning, with nothing pruned.

    With `metric` wanda or activation the first optimizer step is dense, because there are no activations before it.

    Attributes:
        omission_rate: fraction of the KV groups and of the MLP channels omitted at first; 0 is plain training.
        rungs: steps of the ladder from `omission_rate` down to 0.
        dense_tail: fraction of the training steps, at the end, that are dense.
        ladder: `steps`, or `none` for a constant rate up to the dense tail.
        metric: how units are scored, one of `SELECTION_METRICS`.
        selection: keep the highest scores (`topk`), or draw in proportion to them (`sample`), so that all units train.
        refresh: optimizer steps between selections; every rung of the ladder also selects.
        rescale: multiply the inputs of o_proj and down_proj by units / kept units.
        freeze_omitted: keep AdamW from moving weights while they are omitted; their moments still decay.
        seed: seed of the draws.
    """

    name: ClassVar[str] = "sat"

    omission_rate: float = 0.4
    rungs: int = 4
    dense_tail: float = 0.2
    ladder: str = "steps"
    metric: str = "wanda"
    selection: str = "sample"
    refresh: int = 50
    rescale: bool = False
    freeze_omitted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        for name in ("omission_rate", "dense_tail"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}. Change method.{name}.")
        for name in ("rungs", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}. Raise method.{name}.")
        check_choice("method.ladder", self.ladder, LADDERS)
        check_choice("method.metric", self.metric, SELECTION_METRICS)
        check_choice("method.selection", self.selection, SELECTIONS)

    def variant(self) -> str:
        """Returns how much is omitted and how; ladder and dense tail only if they are not the usual ones."""
        ladder = "" if self.ladder == "steps" else f"-{self.ladder}"
        tail = "" if self.dense_tail == Sat.dense_tail else f"-tail{self.dense_tail}"
        return f"omission{self.omission_rate}-{self.metric}-{self.selection}{ladder}{tail}"

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Returns the dense shape; see `Method.shape`."""
        if self.omission_rate:
            check_width_supported(config, self.name)
        return super().shape(config)

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Leaves the model unchanged; see `Method.prune`."""
        note = "SAT leaves units out in training only: the model that comes out, and its inference, is dense."
        return dataclasses.replace(super().prune(model, directory), report={"notes": [note, f"{CAVEATS[self.name]}."]})

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callback that omits units; none at rate 0."""
        return [_Omission(self)] if self.omission_rate else []

    def rate_at(self, step: int, num_steps: int) -> float:
        """Returns the omission rate rho(t) at a 0-based optimizer step.

        rho(t) = rho_0 * (n - floor(n * t / T_s)) / n for t < T_s = T * (1 - dense_tail), else 0.

        Args:
            step: t.
            num_steps: T, all optimizer steps of the run.
        """
        progress = step / (num_steps * (1.0 - self.dense_tail))  # t / T_s
        if progress >= 1.0 - ROUNDING:
            return 0.0
        rung = math.floor(self.rungs * progress + ROUNDING) if self.ladder == "steps" else 0
        return self.omission_rate * (self.rungs - rung) / self.rungs


def num_omitted(rate: float, num_units: int) -> int:
    """Returns how many of a block's units are omitted at this rate: rounded down, and at least one is kept."""
    return min(math.floor(rate * num_units + ROUNDING), num_units - 1)


class _Omission(TrainerCallback):
    """Callback that selects the units of every optimizer step and narrows the model to them."""

    one_process_because = "it omits units by the activations of its own rows, so that processes would omit others"

    def __init__(self, sat: Sat) -> None:
        self._sat = sat
        self._blocks: list[Block] = []
        self._statistics: ChannelStatistics | None = None
        self._kept: list[Tensor] = []  # kept units of every block; empty while training is dense
        self._frozen: list[tuple[Tensor, int, Tensor, Tensor]] = []  # parameter, dimension, indices, values

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        self._blocks = find_blocks(model)
        if self._sat.metric in OBSERVING_METRICS:
            self._statistics = ChannelStatistics(model, self._blocks)
        if state.global_step:
            self._load(_state_file(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer calls this once before the micro batches of a step, so that all of them see the same units.
        step, rate = state.global_step, self._sat.rate_at(state.global_step, state.max_steps)
        if rate == 0.0:
            self._end()
            return
        is_rung = rate != self._sat.rate_at(step - 1, state.max_steps)
        if self._kept and step % self._sat.refresh and not is_rung:
            return
        if self._statistics is not None and not self._statistics.update():
            return  # no activations to score by yet
        self._omit([self._select(index, rate, step) for index in range(len(self._blocks))])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._sat.freeze_omitted or not self._kept:
            return
        for block, kept in zip(self._blocks, self._kept, strict=True):
            omitted = torch.ones(block.num_units, dtype=torch.bool)
            omitted[kept] = False
            for linear, dim, indices in block.slices(omitted.nonzero().squeeze(1)):
                weights = [linear.weight, *([linear.bias] if dim == 0 and linear.bias is not None else [])]
                for weight in (weight.detach() for weight in weights if weight.requires_grad):
                    self._frozen.append((weight, dim, indices, weight.index_select(dim, indices)))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for weight, dim, indices, values in self._frozen:
            weight.index_copy_(dim, indices, values)
        self._frozen = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        names = (f"{block.name}.kept" for block in self._blocks)
        tensors = dict(zip(names, self._kept, strict=True)) if self._kept else {}
        if self._statistics is not None:
            tensors |= self._statistics.state()
        save_file(tensors, _state_file(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def _select(self, index: int, rate: float, step: int) -> Tensor:
        block, sat = self._blocks[index], self._sat
        scores = block.scores(sat.metric, None if self._statistics is None else self._statistics.mean_square[index])
        # Seeded by step and block, a draw needs no generator state in the checkpoint. torch takes only 32 bits.
        seed = int(content_hash([sat.seed, step, block.name])[:8], 16)
        generator = torch.Generator().manual_seed(seed)
        return select_units(scores, block.num_units - num_omitted(rate, block.num_units), sat.selection, generator)

    def _omit(self, kept: list[Tensor]) -> None:
        self._kept = kept
        for block, units in zip(self._blocks, kept, strict=True):
            block.restore()
            if len(units) < block.num_units:
                block.omit_all_but(units, self._sat.rescale)
        if self._statistics is not None:
            self._statistics.watch(kept)

    def _load(self, file: Path) -> None:
        """Restores the state that `on_save` wrote."""
        if not file.is_file():
            raise ValueError(
                f"A checkpoint of method=sat holds the units that are left out, got none in {file}. Delete the "
                "checkpoints to train from the start."
            )
        tensors = load_file(file)
        if self._statistics is not None and tensors:  # a checkpoint of the dense tail holds none
            self._statistics.load(tensors)
        kept = [tensors[f"{block.name}.kept"] for block in self._blocks if f"{block.name}.kept" in tensors]
        if kept:
            self._omit(kept)

    def _end(self) -> None:
        """Makes the model dense for the rest of the training."""
        for block in self._blocks:
            block.restore()
        if self._statistics is not None:
            self._statistics.close()
        self._kept, self._statistics = [], None


def _state_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
