"""Checks of training: low precision against float32, and peak memory against the estimate."""

import gc
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.gpu.common import NOT_CHECKED, Finding, Scale, judged, make_model, random_rows
from gradpruner.cost import process_memory_bytes
from gradpruner.encoding import TrainingRow, collate, trim_to_answers
from gradpruner.finetune.precision import convert_weights, trained_dtype
from gradpruner.finetune.result import load_finetuned
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.memory import estimate_training_memory
from gradpruner.runtime import default_device

MAX_DIFFERENCE = 0.02  # of the loss decrease
# Of the weights that float32 changes. Rounding by chance may put a weight back to where it started.
LEAST_CHANGED = {"bf16_mixed": 0.99, "bf16_stochastic": 0.75}
MAX_ERROR = 0.1  # of the estimated memory
ANSWER_TOKENS = 8
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"mode": "lora"},
    "LoRA, recomputed": {"mode": "lora", "gradient_checkpointing": True},
    "full float32": {"precision": "float32"},
    "full float32, recomputed": {"precision": "float32", "gradient_checkpointing": True},
    "full bf16_mixed": {"precision": "bf16_mixed"},
    "full bf16_mixed, recomputed": {"precision": "bf16_mixed", "gradient_checkpointing": True},
    "full bf16_mixed, recomputed, accumulated": {"precision": "bf16_mixed", "gradient_checkpointing": True},
    "full bf16_stochastic": {"precision": "bf16_stochastic"},
}


def check_precision(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Trains in float32 and in lower precision: the loss must fall as far, and the same weights must change."""
    rows = random_rows(scale.learner, 64, 16, 12)
    expected, changed_in_float32 = _train(scale, rows, "float32", folder)
    yield judged(expected > 0, f"float32: the loss falls by {expected:.5f} in {scale.num_steps} steps")
    for precision in scale.precisions:
        if lacks := missing(precision):
            yield Finding(NOT_CHECKED, f"{precision}: {lacks}")
            continue
        decrease, changed = _train(scale, rows, precision, folder)
        difference = abs(decrease / expected - 1)
        kept = float((changed & changed_in_float32).sum() / changed_in_float32.sum())
        yield judged(
            difference <= MAX_DIFFERENCE and kept >= LEAST_CHANGED[precision],
            f"{precision}: the loss falls by {decrease:.5f}, {difference:.2%} from float32 (at most "
            f"{MAX_DIFFERENCE:.0%}); {kept:.1%} of the weights that float32 changes change (at least "
            f"{LEAST_CHANGED[precision]:.0%})",
        )


def check_memory(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Compares the peak of allocated memory in fine-tunes with `estimate_training_memory`."""
    config, dtype = LlamaConfig(**scale.trained), torch.bfloat16
    rows = random_rows(scale.trained, 6 * scale.train_rows, scale.train_tokens, ANSWER_TOKENS)
    # Libraries reserve their workspaces in the first training run of a process.
    warm_up = TrainingSpec(mode="full", precision="float32", batch_size=2, micro_batch_size=2, max_steps=1)
    finetune(
        make_model(scale.learner, dtype), random_rows(scale.learner, 4, 16, 12), 1, warm_up, folder / "warm-up",
        callbacks=[_NoCheckpoints()],
    )  # fmt: skip
    for name in scale.memory_cases:
        settings = {"mode": "full", **MEMORY_CASES[name]}
        if lacks := missing(settings.get("precision", "auto")):
            yield Finding(NOT_CHECKED, f"{name}: {lacks}")
            continue
        accumulation = 2 if "accumulated" in name else 1
        spec = TrainingSpec(
            batch_size=accumulation * scale.train_rows, micro_batch_size=scale.train_rows, max_steps=3, **settings
        )
        measured = _peak_bytes(scale.trained, rows, spec, folder / name)
        estimate = estimate_training_memory(
            config,
            scale.train_rows,
            scale.train_tokens,
            1 + ANSWER_TOKENS,
            dtype,
            precision=spec.precision if spec.mode == "full" else None,
            lora_rank=spec.lora_rank if spec.mode == "lora" else None,
            recompute=spec.gradient_checkpointing,
            accumulate=spec.accumulation > 1,
        ).total
        error = estimate / measured - 1
        yield judged(
            abs(error) <= MAX_ERROR,
            f"{name}: {measured / 2**20:.1f} MiB at the peak, estimated {estimate / 2**20:.1f} MiB ({error:+.1%}, at "
            f"most {MAX_ERROR:.0%})",
        )


class _NoCheckpoints(TrainerCallback):
    """Keeps the Trainer from writing a checkpoint after the last step."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = False


def missing(precision: str) -> str | None:
    """Returns what a precision lacks on this machine, or None."""
    missing = precision == "bf16_stochastic" and importlib.util.find_spec("torchao") is None
    return "torchao is not installed" if missing else None


def _train(scale: Scale, rows: Sequence[TrainingRow], precision: str, folder: Path) -> tuple[float, Tensor]:
    """Returns by how much the loss falls, and which weights change."""
    dtype = trained_dtype(precision) if precision != "bf16_mixed" else torch.bfloat16
    spec = TrainingSpec(
        mode="full",
        precision=precision,
        merge_dtype="float32",
        learning_rate=scale.learning_rate,
        batch_size=16,
        micro_batch_size=16,
        max_steps=scale.num_steps,
        save_steps=10 * scale.num_steps,
    )
    finetune(make_model(scale.learner, dtype), rows, 1, spec, folder / precision)
    start, tuned = make_model(scale.learner, torch.float32), make_model(scale.learner, torch.float32)
    tuned = load_finetuned(tuned, spec, folder / precision)
    convert_weights(tuned, torch.float32)
    changed = [new != old for new, old in zip(tuned.parameters(), start.parameters(), strict=True)]
    return _loss(start, rows) - _loss(tuned, rows), torch.cat([each.flatten() for each in changed])


@torch.no_grad()
def _loss(model: Any, rows: Sequence[TrainingRow]) -> float:
    """Returns the loss per answer token in float32, computed from the logits."""
    batch = {name: values.to(model.device) for name, values in collate(rows, 1).items()}
    inputs = trim_to_answers(batch)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return float(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def _peak_bytes(config: Mapping[str, Any], rows: Sequence[TrainingRow], spec: TrainingSpec, folder: Path) -> int:
    """Returns the highest sum of live tensors in a fine-tune, model included.

    CUDA's allocator counts it. On a CPU the profiler does: resident memory would include what the heap keeps.
    """
    if default_device().type == "cuda":
        before = process_memory_bytes()
        model = make_model(config, torch.bfloat16)
        return int(finetune(model, rows, 1, spec, folder, callbacks=[_NoCheckpoints()])["peak_memory_bytes"]) - before
    gc.collect()  # frees older models before the count starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = make_model(config, torch.bfloat16)
        finetune(model, rows, 1, spec, folder, callbacks=[_NoCheckpoints()])
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
