"""Settings of a fine-tune: TrainingSpec.

Defaults are the paper's (Appendix C.2) and, where it is silent, those of the authors' scripts.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from gradpruner import processes
from gradpruner.checks import AUTO, check_choice

MODES = ("full", "lora")
PRECISIONS = ("auto", "float32", "bf16_mixed", "bf16_stochastic")
PARALLELS = ("ddp", "fsdp", "deepspeed_zero3")
ANSWERS_LOSS, ALL_TOKENS, DISTILL = "answers", "all_tokens", "distill"
LOSSES = (ANSWERS_LOSS, ALL_TOKENS, DISTILL)
SHARDED = PARALLELS[1:]  # those that divide the model among the processes
MERGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingSpec:
    """Settings of a fine-tune.

    Attributes:
        mode: `full` or `lora`.
        learning_rate: peak rate of AdamW.
        batch_size: rows per optimizer step, on all processes together.
        micro_batch_size: rows per forward pass of a process; gradients accumulate up to `batch_size`. `auto`: as many
            as the memory of the device holds, see `micro_batch`.
        epochs: passes over the training rows.
        max_steps: optimizer steps, instead of `epochs`.
        warmup_fraction: fraction of the steps in which the rate rises.
        lr_scheduler: name of a transformers scheduler.
        min_lr_ratio: fraction of the peak rate at which a cosine schedule ends.
        weight_decay: weight decay of AdamW.
        max_grad_norm: norm that gradients are clipped to; 0 does not clip.
        lora_rank: rank of the adapters.
        lora_alpha: alpha of the adapters.
        lora_dropout: dropout before the adapters.
        merge_adapter: fold the adapter into the saved checkpoint, instead of saving it beside the checkpoint.
        precision: how weights are held and updated, see `precision`; `auto` is `bf16_mixed` for full fine-tuning on a
            GPU, else `float32`.
        merge_dtype: dtype of the trained weights that are evaluated and saved; `auto`: the model's.
        group_by_length: batch rows of similar length.
        gradient_checkpointing: recompute activations, for less memory and more time.
        parallel: what each of several processes holds, one of `PARALLELS`: with `ddp` a whole model, else a piece of
            it, see `parallel`. Results do not depend on it.
        save_steps: optimizer steps between checkpoints, from which an interrupted run resumes.
        loss: `answers`: their likelihood; `all_tokens`: the prompt's own tokens, too; `distill`: on the prompt, what
            the dense model predicts. See `losses`.
        prompt_weight: weight of a row's prompt in the last two, where its answer weighs 1.
        tuned_teacher: with `distill`, fraction of the answers' loss that compares with the dense model after its own
            fine-tune on the task.
        tune_dense_first: fine-tune the dense model on the task first, by the likelihood of the answers and otherwise in
            the same way, and compress the result.
    """

    mode: str = "lora"
    learning_rate: float = 1e-5
    batch_size: int = 64
    micro_batch_size: int | str = 8
    epochs: float = 3.0
    max_steps: int | None = None
    warmup_fraction: float = 0.03
    lr_scheduler: str = "cosine"
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    merge_adapter: bool = True
    precision: str = "auto"
    merge_dtype: str = "auto"
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    save_steps: int = 50
    loss: str = ANSWERS_LOSS
    prompt_weight: float = 1.0
    tuned_teacher: float = 0.0
    tune_dense_first: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        check_choice("finetune.mode", self.mode, MODES)
        check_choice("finetune.merge_dtype", self.merge_dtype, ("auto", *MERGE_DTYPES))
        check_choice("finetune.parallel", self.parallel, PARALLELS)
        self._check_precision()
        self._check_micro_batch()
        self._check_loss()
        for name in ("learning_rate", "batch_size", "epochs", "lora_rank", "save_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}. Raise finetune.{name}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be 1 or more, or null to go by epochs, got {self.max_steps}.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}. The paper's is 0.03.")
        if not 0.0 <= self.min_lr_ratio <= 1.0 or (self.min_lr_ratio and self.lr_scheduler != "cosine"):
            raise ValueError(
                f"min_lr_ratio is where a cosine schedule ends, in [0, 1], got {self.min_lr_ratio} with "
                f"lr_scheduler={self.lr_scheduler}. Set finetune.min_lr_ratio=0 or finetune.lr_scheduler=cosine."
            )

    def _check_loss(self) -> None:
        check_choice("finetune.loss", self.loss, LOSSES)
        if not self.prompt_weight >= 0.0:
            raise ValueError(
                "prompt_weight is the weight of a row's prompt beside its answer, 0 or above, got "
                f"{self.prompt_weight}. Set finetune.prompt_weight, e.g. to 1."
            )
        if not 0.0 <= self.tuned_teacher <= 1.0 or (self.tuned_teacher and self.loss != DISTILL):
            raise ValueError(
                f"tuned_teacher is a fraction of the answers' loss with finetune.loss={DISTILL}, in [0, 1], got "
                f"{self.tuned_teacher} with loss={self.loss}. Set finetune.tuned_teacher=0 or finetune.loss={DISTILL}."
            )

    def _check_micro_batch(self) -> None:
        size = self.micro_batch_size
        if size == AUTO:
            return
        if isinstance(size, str) or size < 1:
            raise ValueError(
                f"micro_batch_size must be a number of rows above 0, or auto, got {size!r}. Set "
                "finetune.micro_batch_size=auto."
            )
        if self.batch_size % size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {size}. Change "
                "finetune.micro_batch_size, or set it to auto."
            )

    def _check_precision(self) -> None:
        if self.precision in ("fp16", "float16", "fp16_mixed"):
            raise ValueError(
                f"Training in float16 is not offered, got finetune.precision={self.precision}: gradients underflow and "
                "updates are rounded. Use finetune.precision=bf16_mixed or float32."
            )
        check_choice("finetune.precision", self.precision, PRECISIONS)
        if self.precision == "bf16_stochastic" and self.mode == "lora":
            raise ValueError(
                "finetune.precision=bf16_stochastic is for full fine-tuning, got mode=lora, whose adapters are float32 "
                "and small. Use finetune.precision=auto."
            )

    def check_processes(self) -> None:
        """Raises ValueError if the batch cannot be divided equally among the processes of this run."""
        num_processes = processes.count()
        size = 1 if self.micro_batch_size == AUTO else int(self.micro_batch_size)
        if self.batch_size % (size * num_processes):
            raise ValueError(
                "batch_size counts the rows of all processes, so it must be a multiple of micro_batch_size times "
                f"processes, got {self.batch_size}, {self.micro_batch_size} and {num_processes} processes. Change "
                "finetune.batch_size or finetune.micro_batch_size, or start another number of processes."
            )

    def result_settings(self) -> dict[str, Any]:
        """Returns the settings that results depend on; part of the cache key of the fine-tune."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "parallel"}

    @property
    def tunes_dense(self) -> bool:
        """Whether the dense model is fine-tuned, too, before the compressed one."""
        return self.tune_dense_first or self.tuned_teacher > 0.0

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step on each process; needs a `micro_batch_size` that is a number."""
        return self.batch_size // (int(self.micro_batch_size) * processes.count())

    def num_steps(self, num_rows: int) -> int:
        """Returns the optimizer steps of a run over `num_rows` rows, counted as the Trainer does."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.epochs * math.ceil(num_rows / self.batch_size))
