"""Times one model in a fresh process, which `speed` starts: random weights in, phases as JSON out.

echo '{"role": ..., ...}' | python -m gradpruner.pipeline.speed_process
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gradpruner.checks import check_choice
from gradpruner.cost import PeakMemory, process_memory_bytes
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.run import finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.shape import ModelShape, config_shape, resize_layers, shaped_config
from gradpruner.models.spec import DTYPES
from gradpruner.runtime import default_device, quiet_libraries

SKIPPED_STEPS = 2  # the first steps of a training run are slower than the rest


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        mode: training of `full` weights or `lora` adapters.
        precision: as in `TrainingSpec`.
        lora_rank: rank of the adapters.
        gradient_checkpointing: recompute activations.
        train_rows: rows per training step.
        train_tokens: tokens per training row.
        answer_tokens: tokens per training row that carry loss.
        batch_size: rows per prefill and per decoding step.
        prompt_tokens: tokens per prompt.
        new_tokens: decoding steps.
        dtype: of the weights, one of `models.DTYPES`.
        attn_implementation: as in `ModelSpec`.
        repeats: timed repeats of every phase in every process.
        rounds: processes per model and role.
    """

    mode: str = "lora"
    precision: str = "auto"
    lora_rank: int = 8
    gradient_checkpointing: bool = False
    train_rows: int = 8
    train_tokens: int = 64
    answer_tokens: int = 8
    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 16
    dtype: str = "float32"
    attn_implementation: str = "auto"
    repeats: int = 5
    rounds: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        check_choice("dtype", self.dtype, tuple(DTYPES))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name} must be 1 or more, got {value}. Raise it.")
        if self.answer_tokens >= self.train_tokens:
            raise ValueError(
                f"answer_tokens must be fewer than the {self.train_tokens} train_tokens, got {self.answer_tokens}."
            )


def _main() -> None:
    """Reads a request, measures, prints the phases as JSON."""
    request = json.load(sys.stdin)
    quiet_libraries()
    workload = Workload(**request["workload"])
    values = request["config"]
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    shape = ModelShape.from_dict(request["shape"])
    torch.manual_seed(0)
    before = process_memory_bytes()
    model = random_model(config, shape, workload)
    measured = _train(model, workload) if request["role"] == "train" else _infer(model, workload)
    for phase in measured.values():
        phase["peak_bytes"] -= before
    print(json.dumps(measured))


def random_model(config: PreTrainedConfig, shape: ModelShape, workload: Workload) -> PreTrainedModel:
    """Returns a model of that shape with random weights, on the default device."""
    attention = None if workload.attn_implementation == "auto" else workload.attn_implementation
    with default_device():  # a GPU draws the weights of an 8B model in seconds
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shaped_config(config, shape), dtype=DTYPES[workload.dtype], attn_implementation=attention
        )
    if config_shape(model.config) != shape:
        resize_layers(model, shape)
        for parameter in model.parameters():
            torch.nn.init.normal_(
                parameter, std=0.02
            )  # uninitialised memory may hold numbers that are slow to compute with
    return model.to(default_device()).eval()


class _StepTimes(TrainerCallback):
    """Wall time of every optimizer step; the Trainer's checkpoint after the last one is left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        control.should_save = False


def _train(model: PreTrainedModel, workload: Workload) -> dict[str, dict[str, Any]]:
    """Times the steps of `finetune.run.finetune`, as a run makes them."""
    spec = TrainingSpec(
        mode=workload.mode,
        precision=workload.precision,
        lora_rank=workload.lora_rank,
        gradient_checkpointing=workload.gradient_checkpointing,
        batch_size=workload.train_rows,
        micro_batch_size=workload.train_rows,
        max_steps=SKIPPED_STEPS + workload.repeats,
        save_steps=10**9,
    )
    ids = _random_ids(workload.train_rows, workload.train_tokens, model.config.vocab_size).tolist()
    rows = [TrainingRow(tuple(row), workload.answer_tokens) for row in ids]
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(model, rows, 0, spec, Path(folder), callbacks=[times])
    tokens = workload.train_rows * workload.train_tokens
    seconds = times.seconds[SKIPPED_STEPS:]
    return {"train": {"seconds": seconds, "tokens": tokens, "peak_bytes": result["peak_memory_bytes"]}}


@torch.inference_mode()
def _infer(model: PreTrainedModel, workload: Workload) -> dict[str, dict[str, Any]]:
    """Times a prompt into an empty key-value cache, then greedy tokens one by one."""
    prompt = _random_ids(workload.batch_size, workload.prompt_tokens, model.config.vocab_size).to(model.device)

    def prefill() -> tuple[Tensor, Any]:
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    prefill()  # warm-up
    with PeakMemory() as memory:
        seconds = [_timed(prefill) for _ in range(workload.repeats)]
    peaks = {"prefill": memory.peak_bytes}
    step_seconds: list[float] = []
    with PeakMemory() as memory:
        for repeat in range(1 + workload.repeats):
            token, cache = prefill()  # so that every repeat sees the same lengths
            for _ in range(workload.new_tokens if repeat else 1):  # first a warm-up

                def decode(token: Tensor = token, cache: Any = cache) -> None:
                    output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token.copy_(output.logits[:, -1:].argmax(-1))

                seconds_taken = _timed(decode)
                if repeat:
                    step_seconds.append(seconds_taken)
    peaks["decode"] = memory.peak_bytes
    return {
        "prefill": {"seconds": seconds, "tokens": prompt.numel(), "peak_bytes": peaks["prefill"]},
        "decode": {"seconds": step_seconds, "tokens": workload.batch_size, "peak_bytes": peaks["decode"]},
    }


def _random_ids(rows: int, length: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def _timed(work: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    _main()
