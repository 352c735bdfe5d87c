"""Time and memory of a model: training steps, prefill and decoding, each in a process of its own.

Time and memory depend on the shape of a model and not on its weights, so the process (`speed_process`) builds the shape
with random weights. The process is a fresh one because on a CPU the memory of the whole process is measured, earlier
work included. Models are measured in turns, so that a machine that slows down slows all of them.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from gradpruner import processes
from gradpruner.checks import AUTO
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.shape import ModelShape
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import speed_process
from gradpruner.pipeline.speed_process import Workload
from gradpruner.progress import track

ROLES = ("train", "infer")
Model = tuple[PreTrainedConfig, ModelShape]  # config of the dense model, and the shape made from it


@dataclass(frozen=True)
class Phase:
    """One phase of one model.

    Attributes:
        seconds: of every timed repeat: a training step, a whole prompt, one decoding step.
        tokens: tokens per repeat.
        peak_memory_bytes: highest memory above what the process had before the model was built.
    """

    seconds: tuple[float, ...]
    tokens: int
    peak_memory_bytes: int

    @property
    def median_seconds(self) -> float:
        """Of the repeats."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: median and quartiles, tokens a second, memory."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return {
            "median_seconds": self.median_seconds,
            "quartile_seconds": [low, high],
            "tokens_per_second": self.tokens / self.median_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "repeats": len(self.seconds),
        }


def measure(
    models: Mapping[str, Model], workload: Workload, roles: Sequence[str] = ROLES
) -> dict[str, dict[str, Phase]]:
    """Measures models in turns.

    Args:
        models: by name.
        workload: what to time.
        roles: `train` gives the phase of that name, `infer` gives `prefill` and `decode`.

    Returns:
        Phases by model and name. Memory is the highest of all rounds.

    Raises:
        RuntimeError: if a process fails, with what it wrote to stderr.
    """
    found: dict[str, dict[str, Phase]] = {name: {} for name in models}
    turns = [(role, name) for _ in range(workload.rounds) for role in roles for name in models]
    for role, name in track(turns, "speed", "process"):
        for phase, new in _in_fresh_process(role, *models[name], workload).items():
            old = found[name].get(phase)
            found[name][phase] = new if old is None else _pooled(old, new)
    return found


def ratios(own: Mapping[str, Phase], dense: Mapping[str, Phase]) -> dict[str, dict[str, float]]:
    """Returns time and memory of a model as fractions of the dense model's, by phase."""
    return {
        phase: {
            "time": own[phase].median_seconds / dense[phase].median_seconds,
            "memory": own[phase].peak_memory_bytes / dense[phase].peak_memory_bytes,
        }
        for phase in own
    }


def _pooled(one: Phase, other: Phase) -> Phase:
    peak = max(one.peak_memory_bytes, other.peak_memory_bytes)
    return Phase((*one.seconds, *other.seconds), one.tokens, peak)


def _in_fresh_process(role: str, config: PreTrainedConfig, shape: ModelShape, workload: Workload) -> dict[str, Phase]:
    request = {
        "role": role,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "shape": shape.to_dict(),
        "workload": dataclasses.asdict(workload),
    }
    done = subprocess.run(
        [sys.executable, "-m", speed_process.__name__],
        input=json.dumps(request),
        cwd=Path(__file__).resolve().parents[2],
        env=processes.alone(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Measuring ({role}) ended with status {done.returncode}:\n{done.stderr}")
    phases = json.loads(done.stdout.splitlines()[-1])
    return {
        name: Phase(tuple(phase["seconds"]), phase["tokens"], phase["peak_bytes"]) for name, phase in phases.items()
    }


def workload_like(model: ModelSpec, training: TrainingSpec, rows: Sequence[TrainingRow]) -> Workload:
    """Returns the workload of a run: training steps of one micro batch, with rows of the mean length.

    With `micro_batch_size=auto` the micro batch is of the default size, so that runs on one machine stay comparable.
    """
    size = TrainingSpec.micro_batch_size if training.micro_batch_size == AUTO else training.micro_batch_size
    length = round(sum(len(row.input_ids) for row in rows) / len(rows))
    answer = round(sum(row.num_answer_tokens for row in rows) / len(rows))
    return Workload(
        mode=training.mode,
        precision=training.precision,
        lora_rank=training.lora_rank,
        gradient_checkpointing=training.gradient_checkpointing,
        train_rows=min(int(size), training.batch_size),
        train_tokens=length,
        answer_tokens=min(answer, length - 1),
        dtype=str(model.torch_dtype).removeprefix("torch."),
        attn_implementation=model.attn_implementation,
        rounds=1,
    )


def compare(dense: Model, own: Model, workload: Workload, roles: Sequence[str]) -> dict[str, Any]:
    """Times the dense model and another one in turns; if both have the same shape, only one of them.

    Returns:
        JSON-ready: the `workload`, the phases of `dense` and `own`, and their `ratios`.
    """
    is_dense = own[1] == dense[1]
    found = measure({"dense": dense} if is_dense else {"dense": dense, "own": own}, workload, roles)
    dense_phases, own_phases = found["dense"], found["dense" if is_dense else "own"]
    return {
        "workload": dataclasses.asdict(workload),
        "dense": {name: phase.to_dict() for name, phase in dense_phases.items()},
        "own": {name: phase.to_dict() for name, phase in own_phases.items()},
        "ratios": ratios(own_phases, dense_phases),
    }
