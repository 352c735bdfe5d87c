"""LoRA and full fine-tuning from one TrainingSpec, with the Hugging Face Trainer.

A killed run resumes from its last whole checkpoint and ends with the same weights. For the defaults see `spec`.
"""

import json
import logging
import math
import shutil
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_model
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from gradpruner.cost import PeakMemory
from gradpruner.encoding import TrainingRow, collate
from gradpruner.files import write_json
from gradpruner.finetune.micro_batch import settle_for
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
from gradpruner.models.architectures import lora_targets
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

    A folder that holds the result already is left unchanged.

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
        DivergedError: if loss or gradient become NaN or infinite; the last good checkpoint is kept.
    """
    if (directory / RESULT_FILE).is_file():  # written last: a run that was killed just after it is finished
        return read_result(directory)
    set_seed(seed)
    precision = resolve_precision(spec)
    checkpoints = directory / CHECKPOINTS_FOLDER
    resume_from, seconds_before = _last_whole_checkpoint(checkpoints)
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
        model = get_peft_model(model, _lora_config(model, spec, resume_from))
    elif not all(parameter.requires_grad for parameter in model.parameters()):
        model.requires_grad_(True)
    clock = _Clock(seconds_before)
    trainer = _FinetuneTrainer(
        model,
        _training_arguments(spec, checkpoints, seed, precision),
        description=f"{description} ({spec.mode})",
        loss=loss,
        train_dataset=_dataset(rows),
        data_collator=lambda items: collate([_row(item) for item in items], pad_token_id),
        callbacks=[*callbacks, clock],  # the clock is last: it marks a checkpoint as whole
    )
    try:
        with PeakMemory() as memory:
            trainer.train(resume_from_checkpoint=resume_from)
    except DivergedError as error:
        kept, _ = _last_whole_checkpoint(checkpoints)
        where = f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet."
        raise DivergedError(f"{error} {where}") from None
    _save(model, spec, directory)
    for callback in pruning:
        callback.save(directory)
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
    if spec.mode == "lora" and spec.merge_adapter:
        account["update_survival"] = update_survival(model, spec)
    write_json(directory / RESULT_FILE, account)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return account


class _FinetuneTrainer(CompletionTrainer):
    """Length-grouped batches whose order depends on seed and epoch only, so that a resumed run sees the same ones."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return _SeededLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=self.train_dataset["length"],
            seed=self.args.seed,
        )


class _SeededLengthGroupedSampler(LengthGroupedSampler):
    """Length-grouped sampler with a seed; transformers' own uses the global random state, which a resume lacks."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return super().__iter__()  # type: ignore[no-any-return]


class _Clock(TrainerCallback):
    """Counts training time across interruptions, marks whole checkpoints, stops before a bad gradient is saved."""

    def __init__(self, seconds_before: float) -> None:
        self._before, self._start = seconds_before, time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

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
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / COMPLETE_MARK, {"train_seconds": self.seconds()})


def _last_whole_checkpoint(checkpoints: Path) -> tuple[str | None, float]:
    """Returns the newest checkpoint that was written completely, and the training seconds up to it."""
    marks = sorted(checkpoints.glob(f"checkpoint-*/{COMPLETE_MARK}"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not marks:
        return None, 0.0
    return str(marks[-1].parent), float(json.loads(marks[-1].read_text())["train_seconds"])


def _lora_config(model: PreTrainedModel, spec: TrainingSpec, resume_from: str | None) -> LoraConfig:
    """Returns adapters for all linear sublayers; on resuming with saved ranks, which a `PruningCallback` may change."""
    patterns = ("rank_pattern", "alpha_pattern")
    saved = None if resume_from is None else LoraConfig.from_pretrained(resume_from)
    return LoraConfig(
        **{name: getattr(saved, name) for name in patterns if saved is not None},
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=lora_targets(model),
        task_type="CAUSAL_LM",
    )


def _save(model: PreTrainedModel, spec: TrainingSpec, directory: Path) -> None:
    if spec.mode == "lora":
        model.save_pretrained(directory / ADAPTER_FOLDER)
    else:
        save_model(model, str(directory / WEIGHTS_FILE))


def _dataset(rows: Sequence[TrainingRow]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "num_answer_tokens": [row.num_answer_tokens for row in rows],
            "gaps": [[list(gap) for gap in row.gaps] for row in rows],
            "length": [len(row.input_ids) for row in rows],
        }
    )


def _row(item: dict[str, Any]) -> TrainingRow:
    gaps = tuple((start, end) for start, end in item["gaps"])
    return TrainingRow(tuple(item["input_ids"]), item["num_answer_tokens"], gaps)


def _training_arguments(
    spec: TrainingSpec, checkpoints: Path, seed: int, precision: str = "float32"
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
        **{CHECKPOINTING: spec.gradient_checkpointing},
        **training_arguments(precision),
    )
