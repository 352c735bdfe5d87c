"""Apply a pruning plan to a safetensors checkpoint on disk, tensor by tensor, for models larger than memory.

The result is that of `surgery.apply_plan` and `save_pretrained`, tensor for tensor and bit for bit, but only the
sublayers that merge are ever tensors here: the rest is copied as bytes, and pruned layers that do not merge are never
read.

Files are read with plain reads rather than mapped: pages of a mapped file count as memory of the process.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from gradpruner.checkpoints.model_card import model_card
from gradpruner.checkpoints.tensor_files import INDEX_FILE, StoredTensor, check_float, find_tensors, locate_tensors
from gradpruner.checks import check_choice
from gradpruner.files import write_json, write_text
from gradpruner.igia import STEP_WEIGHTINGS, Factors, igia_matrix, step_weights
from gradpruner.merge import merge_layers, top_fraction_mask
from gradpruner.models.architectures import (
    check_supported,
    decoder_layers,
    empty_model,
    linear_sublayers,
    shrink_config,
)
from gradpruner.plan import PruningPlan

if TYPE_CHECKING:  # it pulls in the Trainer, whose libraries take more memory than the work done here
    from gradpruner.gradients import EarlyGradients

SHARD_PATTERN = "model{suffix}.safetensors"
COPY_BYTES = 2**18  # at once; stays in the cache of the processor, megabytes would take four times as long
BLOCK_NUMEL = 2**19  # entries of a sublayer that merge at once
# Weights in whatever format, their indices, and what is written anew or holds for the source alone. All other files
# beside the weights are carried along.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".safetensors.index.json", ".bin.index.json"),
)
REWRITTEN_FILES = ("config.json", "plan.json", "README.md", "probe.json")
SIDE_FOLDERS = ("additional_chat_templates",)
_NUMBERED = re.compile(r"(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<layer>\d+)\.")  # up to the first part that is a number


def prune_checkpoint(
    plan: PruningPlan,
    gradients: "EarlyGradients | None",
    source: Path,
    target: Path,
    max_shard_bytes: int = 5 * 10**9,
    *,
    step_weighting: str = "energy",
) -> None:
    """Writes the pruned checkpoint to `target`, whole or not at all, without loading the model.

    The merge is computed in the dtype of the checkpoint: it equals the in-memory path on a model that was loaded with
    `dtype="auto"`. Beside the weights, `target` gets the config of the kept layers, the other small files of `source`
    (tokenizer, chat template, generation config, ...), `plan.json` and a model card.

    Args:
        plan: what to do.
        gradients: where the IGIA-Matrices of merged layers come from; None if the plan merges nothing.
        source: folder of the dense model, with `model.safetensors` or shards and their index.
        target: new folder.
        max_shard_bytes: largest weight file; a tensor larger than this has a file of its own.
        step_weighting: one of `igia.STEP_WEIGHTINGS`, the one that the plan was made with.

    Raises:
        ValueError: if plan, gradients and source do not belong together, `source` is damaged or holds no safetensors,
            `target` exists, or the disk is too small. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"Source and target must differ, got {source} for both. Name a new folder as target.")
    if os.path.lexists(target):
        raise ValueError(f"The target exists already: {target}. Remove it, or name a new folder.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be above 0, got {max_shard_bytes}. Leave it out for 5 GB.")
    job = _prepare(plan, gradients, source, step_weighting)
    side_files = _side_files(source)
    _check_space(target, job.num_bytes + sum(file.stat().st_size for file in side_files))

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run left it
    partial.mkdir(parents=True)
    try:
        _write_weights(job, partial, max_shard_bytes)
        for file in side_files:
            copy = partial / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        job.config.save_pretrained(partial)
        plan.save(partial / "plan.json")
        settings = {"step_weighting": step_weighting, "max_shard_bytes": max_shard_bytes}
        write_text(partial / "README.md", model_card(plan, source.resolve().name, settings))
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_pruned(
    plan: PruningPlan,
    gradients: "EarlyGradients | None",
    source: Path,
    *,
    step_weighting: str = "energy",
) -> PreTrainedModel:
    """The model that `surgery.apply_plan` makes, loaded without ever holding the pruned layers.

    Args:
        plan: what to do.
        gradients: see `prune_checkpoint`.
        source: see `prune_checkpoint`.
        step_weighting: see `prune_checkpoint`.

    Returns:
        The model in the checkpoint's dtype, on the CPU, in evaluation mode.

    Raises:
        ValueError: if plan, gradients and source do not belong together, or `source` lacks weights of the model.
    """
    source = Path(source)
    job = _prepare(plan, gradients, source, step_weighting)
    state = {name: job.tensor(output) for name, output in job.outputs.items()}
    model_class = type(empty_model(job.config))
    model, info = model_class.from_pretrained(
        None, config=job.config, state_dict=state, dtype=job.config.dtype or "auto", output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The tensors in {source} are not those of the model: missing {sorted(info['missing_keys'])}, "
            f"unexpected {sorted(info['unexpected_keys'])}. Save the model with save_pretrained and use that folder."
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@dataclass(frozen=True)
class _Output:
    """A tensor of the pruned checkpoint: a stored one, and what merges into it if it is the weight of a sublayer."""

    kept: StoredTensor
    sublayer: str = ""
    layer: int = -1
    merged: Mapping[int, StoredTensor] = field(default_factory=dict)  # pruned layer -> its weight


@dataclass(frozen=True)
class _Job:
    """A checked plan: what the pruned checkpoint consists of."""

    plan: PruningPlan
    config: PreTrainedConfig
    outputs: dict[str, _Output]
    igia: Callable[[int, str], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(output.kept.num_bytes for output in self.outputs.values())

    def parts(self, output: _Output, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor of the pruned checkpoint; through `buffer` if it is only copied."""
        if not output.merged:
            yield from output.kept.parts(buffer)
        else:
            for block in self._merged_blocks(output):
                yield block.flatten().view(torch.uint8).numpy().data

    def tensor(self, output: _Output) -> Tensor:
        """A tensor of the pruned checkpoint."""
        return torch.cat(list(self._merged_blocks(output))) if output.merged else output.kept.read()

    def _merged_blocks(self, output: _Output) -> Iterator[Tensor]:
        """Block of rows by block of rows what `surgery.apply_plan` makes of the whole weight, bit for bit.

        Only the IGIA-Matrix is ever whole, because its top entries are those of all rows: one at a time, except that
        `fisher` needs all of them throughout.
        """
        rule, density = self.plan.merge_rule, self.plan.density
        fisher = rule == "fisher"
        if rule == "weighted_average":  # it counts zeros in, so masked entries cannot be left out as below
            weights = [stored.read() for stored in output.merged.values()]
            igias = [self.igia(layer, output.sublayer) for layer in output.merged]
            yield merge_layers(output.kept.read(), weights, igias, density, rule)
            return
        masks, kept_igias = {}, {}
        for layer in output.merged:
            igia = self.igia(layer, output.sublayer)
            masks[layer] = top_fraction_mask(igia, density)
            if fisher:
                kept_igias[layer] = igia
            del igia  # before the next one is made
        if fisher:
            kept_igias[output.layer] = self.igia(output.layer, output.sublayer)
        num_rows, num_columns = output.kept.shape
        block = max(1, BLOCK_NUMEL // num_columns)
        for start in range(0, num_rows, block):
            rows = slice(start, min(start + block, num_rows))
            kept = output.kept.rows(rows.start, rows.stop).read()
            ignored = torch.zeros(()).expand(kept.shape)
            # A zero never merges: with the masked entries at zero, every entry (density 1) may pass.
            yield merge_layers(
                kept,
                [
                    stored.rows(rows.start, rows.stop).read().masked_fill_(~masks[layer][rows], 0)
                    for layer, stored in output.merged.items()
                ],
                [kept_igias[layer][rows] if fisher else ignored for layer in output.merged],
                1.0,
                rule,
                kept_igia=kept_igias[output.layer][rows] if fisher else None,
            )


def _prepare(plan: PruningPlan, gradients: "EarlyGradients | None", source: Path, step_weighting: str) -> _Job:
    """Checks that everything belongs together; reads names and shapes, no weights."""
    check_choice("step_weighting", step_weighting, STEP_WEIGHTINGS)
    beyond = "makes layers narrower" if plan.width is not None else "repairs" if plan.details.get("repair") else None
    if beyond:
        raise ValueError(
            f"Only plans that drop and merge layers are applied file to file, got one of method={plan.method} that "
            f"{beyond}. Run the method with save_checkpoint=true."
        )
    file_names = locate_tensors(source)  # first: it says best what is wrong with a folder that is no checkpoint
    config = _load_config(source)
    if config.num_hidden_layers != plan.num_hidden_layers:
        raise ValueError(
            f"The plan is for {plan.num_hidden_layers} decoder layers, the model in {source} has "
            f"{config.num_hidden_layers}. Apply it to the dense model that it was made for."
        )
    prefix = _layer_prefix(file_names, plan.num_hidden_layers, source)
    kept_layers, merged_layers = plan.kept_layers, {layer for merged in plan.merges.values() for layer in merged}
    unread = set(plan.pruned_layers) - merged_layers
    used = [name for name in file_names if _layer_of(name, prefix) not in unread]
    stored = find_tensors(source, file_names, used)

    outputs = {}
    for name, tensor in stored.items():
        layer = _layer_of(name, prefix)
        if layer is None:
            outputs[name] = _Output(tensor)
        elif layer in kept_layers:
            outputs[_renumber(name, prefix, kept_layers.index(layer))] = _Output(tensor)
    if not plan.merges:
        return _Job(plan, shrink_config(config, kept_layers), outputs, _no_igia)

    shapes = _sublayer_shapes(config)
    gradients = _check_gradients(gradients, plan, shapes)
    for absorber, merged in plan.merges.items():
        for sublayer, shape in shapes.items():
            weights = {}
            for layer in (absorber, *merged):
                name = f"{prefix}{layer}.{sublayer}.weight"
                found = stored[name].shape if name in stored else None
                if found != shape:
                    raise ValueError(
                        f"The config calls for a weight {name} of shape {shape}, got {found or 'none'} in {source}. "
                        "Save the model with save_pretrained and use that folder."
                    )
                check_float(stored[name])
                weights[layer] = stored[name]
            name = f"{prefix}{kept_layers.index(absorber)}.{sublayer}.weight"
            outputs[name] = _Output(weights.pop(absorber), sublayer, absorber, weights)
    weights_of_steps = step_weights(gradients.energies, step_weighting).tolist()

    def igia(layer: int, sublayer: str) -> Tensor:
        return igia_matrix(gradients.factors(layer, sublayer), weights_of_steps)

    return _Job(plan, shrink_config(config, kept_layers), outputs, igia)


def _no_igia(layer: int, sublayer: str) -> Tensor:
    raise AssertionError(f"nothing merges, but the IGIA-Matrix of layer {layer}, {sublayer}, was asked for")


def _load_config(source: Path) -> PreTrainedConfig:
    if not (source / "config.json").is_file():
        raise ValueError(f"A checkpoint needs a config.json, got none in {source}. Copy it there from the dense model.")
    config = AutoConfig.from_pretrained(source)
    check_supported(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"Cannot prune quantized weights on disk, got {config.quantization_config} in {source}/config.json. "
            "Use the checkpoint that it was quantized from."
        )
    return config


def _layer_prefix(names: Iterable[str], num_layers: int, source: Path) -> str:
    """What comes before the layer number in the names of decoder layers, such as `model.layers.`."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            numbers.setdefault(match["prefix"], set()).add(int(match["layer"]))
    prefixes = [prefix for prefix, found in numbers.items() if found == set(range(num_layers))]
    if len(prefixes) == 1:
        return prefixes[0]
    if prefixes:
        raise ValueError(
            f"Decoder layers must be the only tensors numbered 0 to {num_layers - 1}, got {sorted(prefixes)} in "
            f"{source}. Save the language model alone with save_pretrained and use that folder."
        )
    found = ", ".join(f"{len(found)} of {prefix}<i>" for prefix, found in sorted(numbers.items()))
    raise ValueError(
        f"The checkpoint must hold tensors numbered 0 to {num_layers - 1}, one number a decoder layer, got "
        f"{found or 'no numbers'} in {source}. It is incomplete or its config is another model's: get it again."
    )


def _layer_of(name: str, prefix: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    match = _NUMBERED.match(name)
    return int(match["layer"]) if match and match["prefix"] == prefix else None


def _renumber(name: str, prefix: str, layer: int) -> str:
    return f"{prefix}{layer}.{name.removeprefix(prefix).partition('.')[2]}"


def _sublayer_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape (out, in) of every linear sublayer of a decoder layer, from the config alone."""
    layer = decoder_layers(empty_model(config))[0]
    return {name: tuple(linear.weight.shape) for name, linear in linear_sublayers(layer).items()}


def _check_gradients(
    gradients: "EarlyGradients | None", plan: PruningPlan, shapes: Mapping[str, tuple[int, ...]]
) -> "EarlyGradients":
    """Raises ValueError if the factors are missing, damaged or of another model."""
    if gradients is None:
        raise ValueError(
            f"The plan merges layers {sorted(plan.absorbed_by)} but no factors were given. "
            "Pass the folder that the importance run wrote."
        )
    if set(gradients.sublayers) != set(shapes) or gradients.energies.shape[1] != plan.num_hidden_layers:
        raise ValueError(
            f"The factors must be of {plan.num_hidden_layers} layers with sublayers {sorted(shapes)}, got "
            f"{gradients.energies.shape[1]} layers with {sorted(gradients.sublayers)} in {gradients.directory}. "
            "Pass the folder of the importance run that the plan was made from."
        )
    for absorber, merged in plan.merges.items():
        for layer in (absorber, *merged) if plan.merge_rule == "fisher" else merged:
            for sublayer, shape in shapes.items():
                found = {(left.shape[0], right.shape[1]) for left, right in _factors(gradients, layer, sublayer)}
                if found != {shape}:
                    raise ValueError(
                        f"The factors of layer {layer}, {sublayer}, must make a matrix of shape {shape}, got "
                        f"{', '.join(map(str, sorted(found)))} in {gradients.directory}. "
                        "Pass the folder of the importance run that the plan was made from."
                    )
    return gradients


def _factors(gradients: "EarlyGradients", layer: int, sublayer: str) -> list[Factors]:
    try:
        return gradients.factors(layer, sublayer)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Cannot read the factors of layer {layer}, {sublayer}, in {gradients.directory}: got "
            f"{type(error).__name__}: {error}. The folder is damaged: run the importance steps again."
        ) from error


def _side_files(source: Path) -> list[Path]:
    """What is carried along as it is: tokenizer, chat templates, generation config, licence, code, ..."""
    files = [file for folder in ("", *SIDE_FOLDERS) for file in sorted((source / folder).glob("*")) if file.is_file()]
    return [
        file
        for file in files
        if not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in REWRITTEN_FILES and file.name[0] != "."
    ]


def _check_space(target: Path, num_bytes: int) -> None:
    """Raises ValueError if the disk cannot hold the result."""
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{target} needs {num_bytes:,} bytes of disk, got {free:,} free in {folder}. "
            "Make room, or choose a target on another disk."
        )


def _write_weights(job: _Job, folder: Path, max_shard_bytes: int) -> None:
    """Writes all outputs as one safetensors file, or as shards with an index, named as transformers names them."""
    split = split_state_dict_into_shards_factory(
        job.outputs,
        get_storage_size=lambda output: output.kept.num_bytes,
        filename_pattern=SHARD_PATTERN,
        max_shard_size=max_shard_bytes,
    )
    with tqdm(total=job.num_bytes, desc="prune checkpoint", unit="B", unit_scale=True) as bar:
        for file_name, names in split.filename_to_tensors.items():
            _write_file(folder / file_name, {name: job.outputs[name] for name in names}, job, bar.update)
    if split.is_sharded:
        total_parameters = sum(math.prod(output.kept.shape) for output in job.outputs.values())
        metadata = {"total_parameters": total_parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / INDEX_FILE, index)


def _write_file(file: Path, outputs: dict[str, _Output], job: _Job, written: Callable[[int], object]) -> None:
    """Writes one safetensors file; wide elements come first, so that every tensor is aligned."""
    outputs = dict(sorted(outputs.items(), key=lambda item: -item[1].kept.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, output in outputs.items():
        start, end = end, end + output.kept.num_bytes
        header[name] = {"dtype": output.kept.dtype, "shape": list(output.kept.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = memoryview(bytearray(COPY_BYTES))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs.values():
            for part in job.parts(output, buffer):
                stream.write(part)
                written(len(part))
        stream.flush()
        os.fsync(stream.fileno())
