"""LoRA and full fine-tuning from one TrainingSpec, with the Hugging Face Trainer.

A killed run resumes from its last whole checkpoint and ends with the same weights. For the defaults see `spec`.
"""

import json
import logging
import math
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradpruner import processes
from gradpruner.cost import PeakMemory
from gradpruner.encoding import TrainingRow
from gradpruner.files import write_json
from gradpruner.finetune.adapters import lora_config
from gradpruner.finetune.micro_batch import settle_for
from gradpruner.finetune.order import collate_items, make_dataset, make_sampler, num_blank_rows, with_blank_row
from gradpruner.finetune.parallel import (
    check_folder,
    check_layout,
    check_parallel,
    checkpoint_layout,
    engine_state,
    gathered_weights,
    keep_precision,
    parallel_arguments,
    without_shared,
)
from gradpruner.finetune.precision import prepare_weights, resolve_precision, training_arguments
from gradpruner.finetune.result import (
    ADAPTER_FOLDER,
    PLAN_FILE,
    REPORT_FILE,
    RESULT_FILE,
    WEIGHTS_FILE,
    TrainingAccount,
    prune_again,
    read_result,
    update_survival,
)
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.finetune.trainer import CHECKPOINTING, CompletionTrainer, DivergedError, Loss
from gradpruner.plan import PruningPlan
from gradpruner.runtime import default_device, set_seed

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
HISTORY_KEYS = ("step", "epoch", "loss", "learning_rate", "grad_norm")
COMPLETE_MARK = "complete.json"  # written last into a Trainer checkpoint


class PruningCallback(TrainerCallback):
    """A callback that prunes the model while it trains.

    `plan` records the pruning. It is saved beside the weights and applied again when they are loaded.

    Attributes:
        plan: everything pruned so far from the model that the fine-tune started with.
        report: JSON-ready account, with `num_parameters` and `shape` of the model in its current state.
        loss: loss of a batch, or None for the likelihood of the answers.
    """

    plan: PruningPlan
    report: dict[str, Any]
    loss: Loss | None = None
    one_process_because = "it prunes by statistics of its own rows, so that processes would prune differently"

    @abstractmethod
    def prepare(self, model: PreTrainedModel, checkpoint: Path | None) -> None:
        """Prepares the callback, before adapters are added and the Trainer is made.

        Args:
            model: the model that the fine-tune starts with.
            checkpoint: checkpoint folder to resume from, or None. It holds the `plan` that the fine-tune applies to
                the model after this method returns.
        """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves plan and report with every checkpoint."""
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def save(self, directory: Path) -> None:
        """Writes plan and report."""
        self.plan.save(directory / PLAN_FILE)
        write_json(directory / REPORT_FILE, self.report)


def finetune(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    pad_token_id: int,
    spec: TrainingSpec,
    directory: Path,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    loss: Loss | None = None,
    description: str = "fine-tune",
) -> TrainingAccount:
    """Fine-tunes `model` and writes the trained weights and an account of the run to `directory`.

    A folder that holds the result already is left unchanged. Started by torchrun or accelerate, all processes call this
    with the same arguments; they share each batch, and rank 0 writes.

    Args:
        model: the (compressed) model; trained in place, and wrapped in place for LoRA. Do not use it afterwards: load
            the result with `load_finetuned`.
        rows: tokenized training rows.
        pad_token_id: id to pad with.
        spec: how to train.
        directory: where to write; if it holds checkpoints of an interrupted run of the same spec, that run is resumed.
        seed: seeds the adapter, the order of rows and dropout.
        callbacks: extra callbacks of the method; the plan and report of a `PruningCallback` are written, too.
        loss: loss of a batch; None for the likelihood of the answers.
        description: label of the progress bar.

    Returns:
        The account, as written to `directory`.

    Raises:
        ValueError: if the processes of the run cannot share a batch, a callback works on one process only, or the
            checkpoints in `directory` are divided in another way than this run divides the model.
        DivergedError: if loss or gradient become NaN or infinite; the last good checkpoint is kept.
    """
    check_parallel(spec, callbacks, loss is not None)
    check_folder(directory)
    # Written last: a run that was killed just after it is finished.
    if processes.broadcast((directory / RESULT_FILE).is_file()):
        return read_result(directory)
    set_seed(seed)
    precision = resolve_precision(spec)
    checkpoints = directory / CHECKPOINTS_FOLDER
    resume_from, seconds_before, layout = processes.broadcast(_last_whole_checkpoint(checkpoints))
    check_layout(spec, resume_from, layout)
    pruning = [callback for callback in callbacks if isinstance(callback, PruningCallback)]
    for callback in pruning:
        callback.prepare(model, None if resume_from is None else Path(resume_from))
        loss = loss or callback.loss
    if resume_from is not None:
        logger.info("Resuming fine-tuning from %s", resume_from)
        prune_again(model, Path(resume_from))
    spec = settle_for(model, spec, rows, None if resume_from is None else Path(resume_from))
    prepare_weights(model, spec, precision)
    if spec.mode == "lora":
        model = get_peft_model(model, lora_config(model, spec, resume_from))
    elif not all(parameter.requires_grad for parameter in model.parameters()):
        model.requires_grad_(True)
    if spec.parallel == "fsdp" and spec.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()  # the Trainer's argument does the same, with a warning for FSDP1
    clock = _Clock(spec, seconds_before, len(rows))
    with engine_state(spec):
        trainer = _FinetuneTrainer(
            model,
            _training_arguments(spec, checkpoints, seed, precision, parallel_arguments(model, spec, precision)),
            description=f"{description} ({spec.mode})",
            loss=loss,
            train_dataset=make_dataset(with_blank_row(rows, pad_token_id)),
            make_order=lambda: make_sampler(spec, [len(row.input_ids) for row in rows], seed),
            data_collator=lambda items: collate_items(items, pad_token_id),
            callbacks=[*callbacks, clock],  # the clock is last: it marks a checkpoint as whole
        )
        keep_precision(trainer, precision)
        try:
            with PeakMemory() as memory:
                trainer.train(resume_from_checkpoint=resume_from)
        except DivergedError as error:
            kept, *_ = _last_whole_checkpoint(checkpoints)
            where = f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet."
            raise DivergedError(f"{error} {where}") from None
        weights = _gathered(trainer, spec)
        if processes.is_main():
            _write_result(directory, model, weights, spec, pruning, _account(trainer, spec, precision, clock, memory))
    processes.wait_for_all()
    return read_result(directory)


def _account(
    trainer: CompletionTrainer,
    spec: TrainingSpec,
    precision: str,
    clock: "_Clock",
    memory: PeakMemory,
) -> TrainingAccount:
    """Returns the account of a finished training."""
    history: list[dict[str, float]] = [
        {key: entry[key] for key in HISTORY_KEYS if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    last = [entry["loss"] for entry in history[-max(1, len(history) // 10) :]]
    account: TrainingAccount = {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "train_seconds": clock.seconds(),
        "peak_memory_bytes": memory.peak_bytes,
        "loss": sum(last) / len(last),
        "precision": precision,
        "micro_batch_size": int(spec.micro_batch_size),
        "history": history,
    }
    if processes.count() > 1:
        account["num_processes"] = processes.count()
    return account


def _write_result(
    directory: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    spec: TrainingSpec,
    pruning: Sequence[PruningCallback],
    account: TrainingAccount,
) -> None:
    """Writes weights and account, and deletes the checkpoints."""
    _save(model, weights, spec, directory)
    for callback in pruning:
        callback.save(directory)
    if spec.mode == "lora" and spec.merge_adapter and weights is None:
        account["update_survival"] = update_survival(model, spec)
    write_json(directory / RESULT_FILE, account)
    shutil.rmtree(directory / CHECKPOINTS_FOLDER, ignore_errors=True)


class _FinetuneTrainer(CompletionTrainer):
    """Batches whose order depends on seed and epoch only, so that a resumed run sees the same ones."""

    def __init__(self, *args: Any, make_order: Callable[[], Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._make_order = make_order

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        return self._make_order() or super()._get_train_sampler(train_dataset)


class _Clock(TrainerCallback):
    """Counts training time and tokens, marks whole checkpoints, stops before a bad gradient is saved."""

    def __init__(self, spec: TrainingSpec, seconds_before: float, num_rows: int) -> None:
        self._before, self._start = seconds_before, time.perf_counter()
        self._steps_per_epoch, self._num_blank = -(-num_rows // spec.batch_size), num_blank_rows(spec, num_rows)
        self._layout = checkpoint_layout(spec)

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._steps_per_epoch == 0:  # the blank rows, of one token each, end an epoch
            state.num_input_tokens_seen -= self._num_blank

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(norm):
            raise DivergedError(
                f"The gradient norm is {norm} at step {state.global_step} of {state.max_steps}. Lower the learning "
                "rate, or check the data and the weights."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes.wait_for_all()  # every process writes its part of a checkpoint
        if processes.is_main():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE_MARK, {"train_seconds": self.seconds(), "layout": self._layout})


def _last_whole_checkpoint(checkpoints: Path) -> tuple[str | None, float, str | None]:
    """Returns the newest checkpoint that was written completely, the training seconds up to it, and its layout."""
    marks = sorted(checkpoints.glob(f"checkpoint-*/{COMPLETE_MARK}"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not marks:
        return None, 0.0, None
    mark = json.loads(marks[-1].read_text())
    return str(marks[-1].parent), float(mark["train_seconds"]), mark.get("layout")


def _gathered(trainer: CompletionTrainer, spec: TrainingSpec) -> dict[str, Tensor] | None:
    """Returns the whole trained weights if processes hold pieces of them; all processes call this together."""
    if spec.parallel == "fsdp":
        return gathered_weights(trainer.model, trained_only=spec.mode == "lora")
    if spec.parallel == "deepspeed_zero3":
        state = trainer.accelerator.get_state_dict(trainer.deepspeed)  # None on other ranks than 0
        return None if state is None else without_shared(trainer.model, state)
    return None


def _save(model: PreTrainedModel, weights: dict[str, Tensor] | None, spec: TrainingSpec, directory: Path) -> None:
    if spec.mode == "lora":
        model.save_pretrained(directory / ADAPTER_FOLDER, state_dict=weights)
    elif weights is not None:
        save_file({name: value.contiguous() for name, value in weights.items()}, directory / WEIGHTS_FILE)
    else:
        save_model(model, str(directory / WEIGHTS_FILE))


def _training_arguments(
    spec: TrainingSpec, checkpoints: Path, seed: int, precision: str = "float32", parallel: dict[str, Any] | None = None
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=spec.epochs,
        max_steps=-1 if spec.max_steps is None else spec.max_steps,
        per_device_train_batch_size=int(spec.micro_batch_size),
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine_with_min_lr" if spec.min_lr_ratio else spec.lr_scheduler,
        lr_scheduler_kwargs={"min_lr_rate": spec.min_lr_ratio} if spec.min_lr_ratio else {},
        warmup_steps=spec.warmup_fraction,  # a float below 1 is a fraction of the steps
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        train_sampling_strategy="group_by_length" if spec.group_by_length else "random",
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=default_device().type == "cpu",
        seed=seed,
        **{CHECKPOINTING: spec.gradient_checkpointing and spec.parallel != "fsdp"},
        **({} if spec.parallel == "deepspeed_zero3" else training_arguments(precision)),  # whose config has it
        **(parallel or {}),
    )
