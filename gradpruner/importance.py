"""Run the first LoRA steps and save their gradients: the first of GradPruner's four steps.

GradPruner (arXiv:2601.19503), Section 3.1 and Algorithm 1, step 1. The base model is bit-identical afterwards.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradpruner import processes
from gradpruner.cost import PeakMemory
from gradpruner.encoding import IGNORED, Batch
from gradpruner.files import write_json
from gradpruner.finetune.parallel import check_folder, parallel_arguments, whole
from gradpruner.finetune.trainer import CHECKPOINTING, CompletionTrainer
from gradpruner.gradients import RESULT_FILE, EarlyGradients, factor_names, step_file
from gradpruner.igia import Factors, simulated_gradient, squared_frobenius
from gradpruner.importance_spec import LORA_INITS, PLAIN_INITS, ImportanceSpec
from gradpruner.models.architectures import check_finite_weights, decoder_layers, linear_sublayers, lora_targets
from gradpruner.runtime import default_device, set_seed


def record_early_gradients(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    spec: ImportanceSpec,
    directory: Path,
    has_settled: Callable[[Tensor], bool] | None = None,
) -> EarlyGradients:
    """Fine-tunes LoRA adapters for `spec.steps` steps and writes every step's gradient factors to `directory`.

    Factors go to disk after every step, so that the run needs no more memory than plain LoRA training. Started by
    torchrun or accelerate, all processes call this with the same arguments; each takes some rows of every batch, and
    rank 0 writes.

    Args:
        model: base model; its weights, flags and mode are unchanged on return.
        batches: dicts of `input_ids`, `attention_mask`, `labels` (-100 = no loss), each (B, T).
        spec: settings of the run.
        directory: empty folder for the result.
        has_settled: called after every step with the energies so far, (t, L, M); the run stops when it returns True.

    Raises:
        ValueError: if there are fewer batches than the steps need, or all gradients are zero.
        DivergedError: if the loss is NaN or infinite.
    """
    needed = spec.steps * spec.accumulation
    taken = list(islice(batches, needed))
    if len(taken) < needed:
        raise ValueError(
            f"{spec.steps} importance steps need {needed} batches, got {len(taken)}. Give more batches or lower steps."
        )
    without_loss = [index for index, batch in enumerate(taken) if not (batch["labels"][:, 1:] != IGNORED).any()]
    if without_loss:
        raise ValueError(
            f"Every batch needs a label other than -100 after its first column, got none in batches {without_loss}. "
            "Label the answer tokens."
        )
    check_finite_weights(model)
    check_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    set_seed(spec.seed)
    device, is_spread = model.device, getattr(model, "hf_device_map", None) is not None
    with _adapters(model, spec) as tuned, tempfile.TemporaryDirectory() as scratch:
        recorder = _GradientRecorder(model, spec, directory, has_settled)
        trainer = _ImportanceTrainer(
            tuned,
            _training_arguments(spec, Path(scratch)),
            description="importance",
            train_dataset=[piece for batch in taken for piece in split_batch(batch, processes.count())],
            data_collator=lambda batch: batch[0],
            callbacks=[recorder],
        )
        start = time.perf_counter()
        with PeakMemory() as memory:
            trainer.train()
        seconds = time.perf_counter() - start
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not is_spread:
        model.to(device)  # the Trainer moved it to its own device
    energies = torch.stack(recorder.energies)  # (t, L, M)
    if not energies.any():
        raise ValueError(
            f"All gradients were exactly zero in {len(energies)} importance steps, so no layer can be told from "
            "another. Raise method.learning_rate, or check the dtype of the model."
        )
    result = {
        "sublayers": recorder.sublayers,
        "energies": energies.tolist(),
        "losses": losses,
        "train_seconds": seconds,
        "peak_memory_bytes": memory.peak_bytes,
    }
    if processes.is_main():
        write_json(directory / RESULT_FILE, result)
    processes.wait_for_all()
    return EarlyGradients.load(directory)


def split_batch(batch: Batch, num_pieces: int) -> list[Batch]:
    """Returns the rows of a batch in pieces of about equal size, one per process.

    Gradients are sums over tokens, so that pieces may be unequal. A process without a row gets one without labels.
    """
    pieces = []
    for rows in torch.tensor_split(torch.arange(len(batch["input_ids"])), num_pieces):
        piece = {name: values[rows if len(rows) else [0]] for name, values in batch.items()}
        if not len(rows):
            piece["labels"] = torch.full_like(piece["labels"], IGNORED)
        pieces.append(piece)
    return pieces


class _ImportanceTrainer(CompletionTrainer):
    """Trainer that names layers with NaN or infinite gradients, before clipping spreads these over the model."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, *args, **kwargs)
        bad = [
            index
            for index, layer in enumerate(decoder_layers(self.accelerator.unwrap_model(model).get_base_model()))
            if not all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)
        ]
        if bad:
            raise ValueError(
                f"Gradients of layers {bad} are NaN or infinite at importance step {self.state.global_step + 1}. "
                "Lower method.learning_rate, or use a wider dtype."
            )
        return loss


class _GradientRecorder(TrainerCallback):
    """Callback that saves the factors of every sublayer before each optimizer step (after clipping, if any)."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ImportanceSpec,
        directory: Path,
        has_settled: Callable[[Tensor], bool] | None,
    ) -> None:
        layers = decoder_layers(model)
        self._modules = [
            {name: module for name, module in layer.named_modules() if isinstance(module, LoraLayer)}
            for layer in layers
        ]
        self.sublayers = list(self._modules[0])
        self.energies: list[Tensor] = []  # one (L, M) per step
        self._spec, self._directory, self._has_settled = spec, directory, has_settled

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        factors: dict[str, Tensor] = {}
        energies = torch.zeros(len(self._modules), len(self.sublayers), dtype=torch.float64)
        for layer, modules in enumerate(self._modules):
            for index, name in enumerate(self.sublayers):
                left, right = self._factors(modules[name])
                energies[layer, index] = squared_frobenius(left, right)
                left_name, right_name = factor_names(layer, name)
                factors[left_name] = left.float().cpu().contiguous()
                factors[right_name] = right.float().cpu().contiguous()
        if processes.is_main():
            save_file(factors, self._directory / step_file(len(self.energies)))
        self.energies.append(energies)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._has_settled is not None and processes.broadcast(self._has_settled(torch.stack(self.energies))):
            control.should_training_stop = True

    def _factors(self, module: LoraLayer) -> Factors:
        a, b = (adapter["default"].weight for adapter in (module.lora_A, module.lora_B))
        # A model that FSDP divides has its gradients in pieces, which all processes put together.
        a_grad, b_grad, estimate = whole(a.grad), whole(b.grad), self._spec.gradient_estimate
        return simulated_gradient(whole(a.detach()), whole(b.detach()), a_grad, b_grad, estimate)


@contextmanager
def _adapters(model: PreTrainedModel, spec: ImportanceSpec) -> Iterator[PreTrainedModel]:
    """Yields `model` with LoRA adapters on all linear sublayers; undoes everything on exit."""
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training, use_cache = model.training, model.config.use_cache
    was_checkpointing = getattr(model, f"is_{CHECKPOINTING}")
    embedding_hooks = model.get_input_embeddings()._forward_hooks  # peft and Trainer add a hook for checkpointing
    hooks_before = set(embedding_hooks)
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        init_lora_weights=LORA_INITS.get(spec.lora_init, spec.lora_init),
        use_dora=spec.adapter == "dora",
        target_modules=lora_targets(model),
        task_type="CAUSAL_LM",
    )
    with _weights_restored(model, enabled=spec.lora_init not in PLAIN_INITS):
        try:
            with _quantized(model, enabled=spec.adapter == "qlora"):
                try:
                    yield get_peft_model(model, config)
                finally:
                    _unwrap(model)
        finally:
            for hook in set(embedding_hooks) - hooks_before:
                del embedding_hooks[hook]
            if spec.gradient_checkpointing and not was_checkpointing:
                getattr(model, f"{CHECKPOINTING}_disable")()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required_grad[name])
                parameter.grad = None
            model.config.use_cache = use_cache
            model.train(was_training)


def _unwrap(model: PreTrainedModel) -> None:
    """Restores the plain linear sublayers, even if peft stopped halfway through wrapping them."""
    for layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config  # else a later get_peft_model warns about a second adapter


@contextmanager
def _quantized(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Replaces the linear sublayers by 4-bit copies until exit (NF4, double quantization: QLoRA, arXiv:2305.14314).

    The original sublayers are kept in memory, so that they are bit-identical afterwards.
    """
    if not enabled:
        yield
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    originals = [
        (layer, name, linear) for layer in decoder_layers(model) for name, linear in linear_sublayers(layer).items()
    ]
    try:
        for layer, name, linear in originals:
            weight, has_bias = linear.weight, linear.bias is not None
            # The meta device draws no random initial values, so that adapters start as they do with adapter=lora.
            quantized = Linear4bit(*weight.T.shape, bias=has_bias, compute_dtype=weight.dtype, device="meta")
            quantized.weight = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=quantized)
            quantized.bias = linear.bias
            layer.set_submodule(name, quantized.to(weight.device))  # the move quantizes
        model.is_loaded_in_4bit = True  # peft reads this flag
        yield
    finally:
        for layer, name, linear in originals:
            layer.set_submodule(name, linear)
        if hasattr(model, "is_loaded_in_4bit"):
            del model.is_loaded_in_4bit


@contextmanager
def _weights_restored(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Restores on exit the linear weights that an adapter init such as PiSSA changes; the copy is on disk."""
    if not enabled:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{layer}.safetensors" for layer in range(len(decoder_layers(model)))]
        for file, layer in zip(files, decoder_layers(model), strict=True):
            weights = {name: linear.weight.detach().cpu().clone() for name, linear in linear_sublayers(layer).items()}
            save_file(weights, file)
        try:
            yield
        finally:
            for file, layer in zip(files, decoder_layers(model), strict=True):
                weights = load_file(file)
                for name, linear in linear_sublayers(layer).items():
                    linear.weight.data.copy_(weights[name])


def _training_arguments(spec: ImportanceSpec, scratch: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=spec.steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=spec.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=default_device().type == "cpu",
        seed=spec.seed,
        **parallel_arguments(),
        **{CHECKPOINTING: spec.gradient_checkpointing},
    )
