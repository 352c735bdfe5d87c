"""Disk space that a run needs, from its config and the stages that the cache holds already; no weights are loaded.

A stage's result stays in the cache. A fine-tune also holds the Trainer's checkpoints beside it while it trains.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from gradpruner.finetune.precision import resolve_precision, trained_dtype
from gradpruner.finetune.spec import DISTILL, MERGE_DTYPES, TrainingSpec
from gradpruner.finetune.teacher import ENTRY_BYTES, TOP
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import ModelCounts, count_model
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.pipeline.setup import Setup
from gradpruner.pipeline.vllm_checks import uses_vllm
from gradpruner.repair import JUDGED

SMALL_BYTES = 2**20  # what any stage writes besides: plans, reports, scores, answers; about one MB
KEPT_CHECKPOINTS = 2  # of a fine-tune; the Trainer deletes an older one only after the next one is written
ADAPTER_BYTES = 4  # per weight of an adapter: float32, whatever the dtype of the model
MOMENT_BYTES, MOMENT_BYTES_8BIT = 8, 2 * (1 + 4 / 256)  # AdamW's two; in 8 bits with one float32 scale per 256 values


@dataclass(frozen=True)
class Writes:
    """Bytes that a stage writes.

    Attributes:
        result: what stays on the disk.
        peak: most at any time, the result included.
    """

    result: int = SMALL_BYTES
    peak: int = SMALL_BYTES


def check_disk(setup: Setup, folders: Mapping[str, Path], save_to: Path | None = None) -> None:
    """Refuses a run that the disk has no space for.

    Args:
        setup: the run.
        folders: folder in the cache by stage, existing or not.
        save_to: folder that the final model is saved to after the run, existing or not; None if it is not saved.

    Raises:
        ValueError: if the free space is below what the run still writes.
    """
    needed = needed_bytes(stage_writes(setup), folders)
    saved = 0 if save_to is None else saved_model_bytes(setup)
    if save_to is not None:
        save_to = next(folder for folder in (save_to.absolute(), *save_to.absolute().parents) if folder.exists())
        if save_to.stat().st_dev != setup.cache_dir.stat().st_dev:
            _check_free(save_to, saved, "output_dir")
            saved = 0
    _check_free(setup.cache_dir, needed + saved, "cache_dir")


def _check_free(folder: Path, needed: int, setting: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"Not enough disk space in {folder.absolute()}: about {needed / 1e9:.1f} GB needed, "
            f"{free / 1e9:.1f} GB free. Free some, or set {setting} to another disk."
        )


def needed_bytes(writes: Mapping[str, Writes], folders: Mapping[str, Path]) -> int:
    """Returns the most additional bytes that exist at any time of a run.

    Args:
        writes: what each stage writes, in order.
        folders: as for `check_disk`; a finished stage writes nothing, and an unfinished one goes on with its files or
            deletes them first.
    """
    kept = peak = 0
    for stage, written in writes.items():
        folder = folders[stage]
        if folder.is_dir():
            continue
        partial = folder.with_name(f"{folder.name}.partial")
        found = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        peak = max(peak, kept + written.peak - found)
        kept += written.result - found
    return peak


def stage_writes(setup: Setup) -> dict[str, Writes]:
    """Returns what each stage of a run writes, in order."""
    method, shape = setup.resolved_method, setup.shape
    decided = {} if method.decision_calibration() is None else {"decide": Writes()}
    writes = {**teacher_writes(setup), "measure": Writes(), **decided, "prune": Writes()}
    if isinstance(method, GradPruner):
        settings = method.measurement_settings()
        factors = factor_bytes(
            count_model(setup.config), settings["lora_rank"], settings["steps"], settings["gradient_estimate"]
        )
        writes["measure"] = Writes(factors + SMALL_BYTES, factors + SMALL_BYTES)
    if setup.repairs:
        is_judged = getattr(method, "repair", None) == JUDGED
        maps = repair_bytes(setup.config, len(shape.layers), setup.base_model.torch_dtype, is_judged)
        writes["repair"] = Writes(maps + SMALL_BYTES, maps + SMALL_BYTES)
    if setup.recovery is not None:
        counts = count_model(setup.config, shape)
        writes["recover"] = training_writes(counts, setup.recovery.training, len(setup.recovery_rows))
    trained = count_model(setup.config, trained_shape(setup))
    writes["finetune"] = training_writes(trained, setup.training, len(setup.rows))
    predict = Writes(peak=SMALL_BYTES + saved_model_bytes(setup)) if uses_vllm(setup) else Writes()
    return writes | {"predict": predict, "evaluate": Writes()}


def teacher_writes(setup: Setup) -> dict[str, Writes]:
    """Returns what the stages of `teachers.Teachers` write: predictions, and the fine-tuned dense model."""
    training = setup.training
    writes = {}
    if training.tunes_dense:
        writes["tuned_dense"] = training_writes(count_model(setup.dense_config), training, len(setup.rows))
    if training.loss != DISTILL:
        return writes
    answers = sum(row.num_answer_tokens - sum(end - start for start, end in row.gaps) for row in setup.rows)
    prompts = sum(len(row.input_ids) - 1 for row in setup.rows) - answers
    if training.prompt_weight:
        writes["teach_prompts"] = Writes(*[prompts * TOP * ENTRY_BYTES + SMALL_BYTES] * 2)
    if training.tuned_teacher:
        writes["teach_answers"] = Writes(*[answers * TOP * ENTRY_BYTES + SMALL_BYTES] * 2)
    return writes


def trained_shape(setup: Setup) -> ModelShape:
    """Returns the shape of the model that the fine-tune starts with: the dense one if the method prunes during it."""
    return config_shape(setup.config) if setup.resolved_method.callbacks() else setup.shape


def factor_bytes(counts: ModelCounts, lora_rank: int, steps: int, gradient_estimate: str = "product") -> int:
    """Returns the bytes of the importance run's factors: float32, per step and sublayer (out + in) x rank numbers.

    Args:
        counts: counts of the dense model.
        lora_rank: rank of the adapters.
        steps: optimizer steps.
        gradient_estimate: one of `igia.GRADIENT_ESTIMATES`; the factors of `tangent` have twice the rank.
    """
    rank = lora_rank * (2 if gradient_estimate == "tangent" else 1)
    return 4 * steps * counts.num_lora_parameters(rank)


def repair_bytes(config: PreTrainedConfig, num_kept_layers: int, dtype: torch.dtype, is_judged: bool = False) -> int:
    """Returns the most bytes that repaired sublayers take: one down_proj per run of pruned layers.

    Args:
        config: config of the dense model.
        num_kept_layers: layers of the pruned model.
        dtype: dtype of the weights.
        is_judged: the repair may change down_proj and o_proj of every kept layer.
    """
    dense = config_shape(config)
    if is_judged:
        first = dense.layers[0]
        head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inputs = first.intermediate_size + 1 + first.num_attention_heads * head_size + 1
        return num_kept_layers * dense.hidden_size * inputs * dtype.itemsize
    most_runs = min(num_kept_layers, len(dense.layers) - num_kept_layers)
    return most_runs * dense.hidden_size * (dense.layers[0].intermediate_size + 1) * dtype.itemsize  # + 1: a bias


def training_writes(counts: ModelCounts, training: TrainingSpec, num_rows: int) -> Writes:
    """Returns what a fine-tune writes: its result, beside as many checkpoints as exist at once.

    Args:
        counts: counts of the trained model.
        training: how it is trained.
        num_rows: training rows.
    """
    result, checkpoint = result_bytes(counts, training), checkpoint_bytes(counts, training)
    num_checkpoints = math.ceil(training.num_steps(num_rows) / training.save_steps)  # the last step has one, too
    during = min(num_checkpoints, KEPT_CHECKPOINTS + 1) * checkpoint
    after = min(num_checkpoints, KEPT_CHECKPOINTS) * checkpoint + result
    return Writes(result + SMALL_BYTES, max(during, after) + SMALL_BYTES)


def result_bytes(counts: ModelCounts, training: TrainingSpec) -> int:
    """Returns the bytes of a fine-tune's result: all weights in the dtype that they are trained in, or the adapter."""
    if training.mode == "lora":
        return ADAPTER_BYTES * counts.num_lora_parameters(training.lora_rank)
    return counts.checkpoint_bytes(trained_dtype(resolve_precision(training)))


def checkpoint_bytes(counts: ModelCounts, training: TrainingSpec) -> int:
    """Returns the bytes of a Trainer checkpoint: weights as in the result, and two moments per trained weight."""
    if training.mode == "lora":
        moments: float = MOMENT_BYTES * counts.num_lora_parameters(training.lora_rank)
    else:
        is_8bit = resolve_precision(training) == "bf16_stochastic"
        moments = (MOMENT_BYTES_8BIT if is_8bit else MOMENT_BYTES) * counts.num_parameters
    return result_bytes(counts, training) + math.ceil(moments)


def saved_model_bytes(setup: Setup) -> int:
    """Returns the bytes of the final model's checkpoint, with the adapter where that is kept apart."""
    training, counts = setup.training, count_model(setup.config, setup.shape)
    dtype = MERGE_DTYPES.get(training.merge_dtype, setup.base_model.torch_dtype)
    apart = training.mode == "lora" and not training.merge_adapter
    return counts.checkpoint_bytes(dtype) + (result_bytes(counts, training) if apart else 0)
