"""Estimated peak memory of the phases of a run that train, and the refusal of a run that its GPU cannot hold.

Config, rows and settings are enough for the estimates; no weights are loaded. See `gradpruner.models.memory`.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gradpruner import processes
from gradpruner.checks import AUTO
from gradpruner.encoding import TrainingRow
from gradpruner.finetune import micro_batch
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import count_model
from gradpruner.models.memory import MemoryEstimate, allocator_overhead, estimate_training_memory
from gradpruner.models.shape import ModelShape
from gradpruner.pipeline.setup import Setup
from gradpruner.runtime import default_device


def training_memory(
    setup: Setup,
    training: TrainingSpec,
    rows: Sequence[TrainingRow],
    config: PreTrainedConfig,
    shape: ModelShape | None = None,
) -> MemoryEstimate:
    """Estimates the peak memory of a fine-tune of this run; for the arguments see `micro_batch.training_memory`."""
    model = setup.base_model
    return micro_batch.training_memory(training, rows, config, model.torch_dtype, model.attn_implementation, shape)


def settle_micro_batch(
    setup: Setup,
    training: TrainingSpec,
    rows: Sequence[TrainingRow],
    config: PreTrainedConfig,
    shape: ModelShape | None = None,
) -> TrainingSpec:
    """Returns `training` with the number that `micro_batch_size=auto` would be if the fine-tune began now."""
    device = default_device()

    def num_bytes(tried: TrainingSpec) -> int:
        return training_memory(setup, tried, rows, config, shape).total

    return micro_batch.settle_micro_batch(training, num_bytes, micro_batch.free_bytes(device), device)


def importance_memory(setup: Setup, method: GradPruner) -> MemoryEstimate:
    """Estimates the peak memory of a method's importance run on the dense model."""
    length, positions = micro_batch.longest(setup.rows)
    return estimate_training_memory(
        setup.config,
        -(-method.batch_size // processes.count()),  # each process takes some rows of a batch
        length,
        positions,
        setup.base_model.torch_dtype,
        lora_rank=method.lora_rank,
        recompute=method.gradient_checkpointing,
        keep_factors=True,
        attn_implementation=setup.model.attn_implementation,
        overhead=allocator_overhead(),
    )


def check_memory(setup: Setup, cached: Collection[str] = ()) -> None:
    """Refuses a run that the memory of its GPU cannot hold, and names settings with which it would fit.

    On a CPU nothing is refused: memory can be swapped, and estimates are rough.

    Args:
        setup: the run.
        cached: stages that are in the cache already, which need no memory.

    Raises:
        ValueError: if importance run, recovery or fine-tune need more memory than is free.
    """
    device = default_device()
    if device.type != "cuda":
        return
    free = micro_batch.free_bytes(device)
    for phase in _phases(setup):
        needed = phase.num_bytes(phase.num_rows, phase.recompute)
        if phase.stage in cached or needed <= free:
            continue
        fits = next((tried for tried in phase.lighter() if phase.num_bytes(*tried) <= free), None)
        if fits is None:
            least = phase.num_bytes(1, True)
            trains_less = (
                " finetune=lora," if phase.stage in ("tuned_dense", "finetune") and phase.trains_all_weights else ""
            )
            advice = (
                f"No smaller batch would fit: one row at a time with gradient checkpointing needs {_gib(least)}. Use"
                f"{trains_less} a GPU with more memory, a smaller model, or shorter rows (dataset.max_length)"
            )
        else:
            advice = f"It would fit with {' '.join(phase.settings(*fits))}"
        raise ValueError(
            f"The {phase.name} needs about {_gib(needed)} of GPU memory, got {_gib(free)} free on "
            f"{torch.cuda.get_device_name(device)}. {advice}."
        )


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """A phase of a run that trains.

    Attributes:
        stage: name of its stage.
        name: what messages call it.
        prefix: of its settings.
        num_rows: rows per forward pass.
        batch_size: rows per optimizer step; a multiple of `num_rows`.
        recompute: whether it checkpoints activations.
        trains_all_weights: whether it trains more than adapters.
        num_bytes: estimates the peak memory for other values of `num_rows` and `recompute`.
        batch_settings: returns the overrides that set `num_rows`.
    """

    stage: str
    name: str
    prefix: str
    num_rows: int
    batch_size: int
    recompute: bool
    trains_all_weights: bool
    num_bytes: Callable[[int, bool], int]
    batch_settings: Callable[[int], list[str]]

    def lighter(self) -> Iterator[tuple[int, bool]]:
        """Yields fewer rows per forward pass and gradient checkpointing, those that change least first."""
        for num_rows in range(self.num_rows, 0, -1):
            if self.batch_size % num_rows == 0:
                yield from ((num_rows, recompute) for recompute in sorted({self.recompute, True}))

    def settings(self, num_rows: int, recompute: bool) -> list[str]:
        """Returns the overrides that set these values."""
        changed = [f"{self.prefix}.gradient_checkpointing=true"] if recompute and not self.recompute else []
        return changed + (self.batch_settings(num_rows) if num_rows != self.num_rows else [])


def _phases(setup: Setup) -> Iterator[_Phase]:
    """Yields the phases of a run that train, in order."""
    method, recovery = setup.resolved_method, setup.recovery
    if setup.training.tunes_dense:
        names = ("tuned_dense", "fine-tune of the dense model", "finetune")
        yield _training_phase(setup, setup.training, setup.rows, None, names, config=setup.dense_config)
    if isinstance(method, GradPruner):
        yield _importance_phase(setup, method)
    if recovery is not None:
        teacher = 0  # bytes of the dense model beside the trained one
        if recovery.distillation is not None:
            teacher = count_model(setup.config).checkpoint_bytes(setup.base_model.torch_dtype)
        names = ("recover", "training before the fine-tune", "method.recover_training")
        yield _training_phase(setup, recovery.training, setup.recovery_rows, setup.shape, names, teacher)
    # A method that prunes while it trains starts with the dense model.
    shape = None if method.callbacks() else setup.shape
    yield _training_phase(setup, setup.training, setup.rows, shape, ("finetune", "fine-tune", "finetune"))


def _importance_phase(setup: Setup, method: GradPruner) -> _Phase:
    def num_bytes(num_rows: int, recompute: bool) -> int:
        changed = dataclasses.replace(method, batch_size=num_rows, gradient_checkpointing=recompute)
        return importance_memory(setup, changed).total

    def batch_settings(num_rows: int) -> list[str]:
        # Accumulation makes up for smaller batches: the ranking sees as many rows per step.
        accumulation = method.accumulation * method.batch_size // num_rows
        return [f"method.batch_size={num_rows}", f"method.accumulation={accumulation}"]

    return _Phase(
        stage="measure",
        name="importance run",
        prefix="method",
        num_rows=method.batch_size,
        batch_size=method.batch_size,
        recompute=method.gradient_checkpointing,
        trains_all_weights=False,
        num_bytes=num_bytes,
        batch_settings=batch_settings,
    )


def _training_phase(
    setup: Setup,
    training: TrainingSpec,
    rows: Sequence[TrainingRow],
    shape: ModelShape | None,
    names: tuple[str, str, str],
    others: int = 0,
    config: PreTrainedConfig | None = None,
) -> _Phase:
    """Returns the phase of a fine-tune.

    Args:
        setup: the run.
        training: how to train.
        rows: the training rows.
        shape: of the model; None: that of `config`.
        names: stage, name and prefix.
        others: bytes of another model.
        config: of the model that is trained; None: that of the model that the method starts from.
    """
    stage, name, prefix = names
    # As many rows as fit: the run is refused only if one row does not.
    size = 1 if training.micro_batch_size == AUTO else int(training.micro_batch_size)

    def num_bytes(num_rows: int, recompute: bool) -> int:
        changed = dataclasses.replace(training, micro_batch_size=num_rows, gradient_checkpointing=recompute)
        return others + training_memory(setup, changed, rows, config or setup.config, shape).total

    return _Phase(
        stage=stage,
        name=name,
        prefix=prefix,
        num_rows=size,
        batch_size=training.batch_size,
        recompute=training.gradient_checkpointing,
        trains_all_weights=training.mode == "full",
        num_bytes=num_bytes,
        batch_settings=lambda num_rows: [f"{prefix}.micro_batch_size={num_rows}"],
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
