"""Times a Llama-3.1-8B with random weights, dense and with 13 of 32 layers pruned, and writes records of the timings.

`python -m experiments.report table=2 runs_dir=FOLDER` shows them: the measured columns of the paper's Table 2. LoRA
trains adapters on bfloat16 weights. Full fine-tuning in float32 would need 16 bytes per parameter, more than one card
has: it is timed with `bf16_stochastic`, if torchao is installed and time is left.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.common import NOT_CHECKED, Finding, Scale, judged
from benchmarks.gpu.training import missing
from gradpruner.files import content_hash
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.counting import count_model
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.pipeline.speed import compare
from gradpruner.pipeline.speed_process import Workload
from gradpruner.record import RunRecord
from gradpruner.record_sections import SpeedSection
from gradpruner.runtime import environment

FULL_SECONDS = 240  # that timing full fine-tuning of the 8B model may take
NOTE = "Timings of random weights alone: nothing was measured, merged, fine-tuned or evaluated."


def check_ratios(scale: Scale, folder: Path, deadline: float) -> Iterator[Finding]:
    """Times LoRA and full fine-tuning, prefill and decoding; writes two records for each way to train.

    Args:
        scale: sizes.
        folder: for the records; those of an earlier call are replaced.
        deadline: `time.monotonic()` by which everything must have ended.
    """
    lora = scale.workload
    full = dataclasses.replace(lora, mode="full", precision=scale.full_precision)
    trained, inference = _compare(scale, lora, ("train",)), _compare(scale, lora, ("infer",))
    for phase in (trained, inference):
        yield from _judged(scale, phase)
    _save(scale, lora, trained, inference, folder)
    name = f"full fine-tuning with {scale.full_precision}"
    if lacks := missing(scale.full_precision):
        yield Finding(NOT_CHECKED, f"{name}: {lacks}")
    elif time.monotonic() + FULL_SECONDS > deadline:
        yield Finding(NOT_CHECKED, f"{name}: less than {FULL_SECONDS} s are left")
    else:
        trained = _compare(scale, full, ("train",))
        yield from _judged(scale, trained)
        _save(scale, full, trained, inference, folder)


def _shapes(scale: Scale) -> tuple[ModelShape, ModelShape]:
    """Returns the shapes of the dense and of the pruned model."""
    dense = config_shape(scale.timed())
    return dense, dataclasses.replace(dense, layers=dense.layers[: -scale.num_pruned_layers])


def _compare(scale: Scale, workload: Workload, roles: Sequence[str]) -> SpeedSection:
    config, (dense, pruned) = scale.timed(), _shapes(scale)
    speed: SpeedSection = compare((config, dense), (config, pruned), workload, roles)
    return speed


def _judged(scale: Scale, speed: SpeedSection) -> Iterator[Finding]:
    dense, pruned = (len(shape.layers) for shape in _shapes(scale))
    for phase, ratio in speed["ratios"].items():
        mode = f"{speed['workload']['mode']} training step" if phase == "train" else phase
        seconds = [speed[name][phase]["median_seconds"] for name in ("own", "dense")]
        yield judged(
            ratio["time"] <= scale.max_ratio and ratio["memory"] <= scale.max_ratio,
            f"{mode} with {pruned} of {dense} layers ({pruned / dense:.3f}): {ratio['time']:.3f} of the dense model's "
            f"time ({seconds[0]:.4f} of {seconds[1]:.4f} s), {ratio['memory']:.3f} of its memory (at most "
            f"{scale.max_ratio})",
        )


def _save(scale: Scale, workload: Workload, trained: SpeedSection, inference: SpeedSection, folder: Path) -> None:
    """Writes the records of the dense and of the pruned model."""
    own: SpeedSection = {
        "workload": trained["workload"],
        "dense": trained["dense"] | inference["dense"],
        "own": trained["own"] | inference["own"],
        "ratios": trained["ratios"] | inference["ratios"],
    }
    of_dense: SpeedSection = {
        **own,
        "own": own["dense"],
        "ratios": {phase: {"time": 1.0, "memory": 1.0} for phase in own["dense"]},
    }
    for method, shape, speed in zip(("dense", "gradpruner"), _shapes(scale), (of_dense, own), strict=True):
        record = _record(scale, workload, method, shape, speed)
        record.save(folder / f"{record.model['name']}-{workload.mode}-{method}")


def _record(scale: Scale, workload: Workload, method: str, shape: ModelShape, speed: SpeedSection) -> RunRecord:
    """Returns a record whose fine-tune and metrics are `{}`; see `RunRecord`."""
    config = scale.timed()
    dense = config_shape(config)
    counts, own = count_model(config), count_model(config, shape)
    training = TrainingSpec(
        mode=workload.mode,
        precision=workload.precision,
        lora_rank=workload.lora_rank,
        batch_size=workload.train_rows,
        micro_batch_size=workload.train_rows,
        gradient_checkpointing=workload.gradient_checkpointing,
    )
    name = f"random-{config.model_type}-{counts.num_parameters / 1e9:.2g}B"
    settings = {
        "model": {
            "name": name,
            "path": f"random:{config.model_type}",
            "config": config.to_diff_dict(),
            "dtype": workload.dtype,
        },
        "dataset": {},
        "evaluation": {},
        "finetune": dataclasses.asdict(training),
        "method": {"name": method, "num_pruned_layers": len(dense.layers) - len(shape.layers)},
        "seed": 0,
    }
    return RunRecord(
        status="finished",
        config=settings,
        identity=content_hash(settings),
        seed=0,
        model={
            "name": name,
            "num_hidden_layers": len(dense.layers),
            "num_parameters": counts.num_parameters,
            "shape": dense.to_dict(),
        },
        pruning={
            "method": method,
            "pruned_layers": list(range(len(shape.layers), len(dense.layers))),
            "absorbed_by": {},
            "layer_importance": [],
            "num_hidden_layers": len(shape.layers),
            "num_parameters": own.num_parameters,
            "shape": shape.to_dict(),
            "report": {"notes": [NOTE]},
            "recovery": {},
        },
        efficiency={
            "layer_ratio": len(shape.layers) / len(dense.layers),
            "parameter_ratio": own.num_parameters / counts.num_parameters,
            "speed": speed,
        },
        environment=environment(),
    )
