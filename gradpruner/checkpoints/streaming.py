"""Apply a pruning plan to a safetensors checkpoint on disk, tensor by tensor, for models larger than memory.

The result is the one of `surgery.apply_plan` and `save_pretrained`, tensor for tensor and bit for bit. Only sublayers
that absorb pruned ones become tensors in memory. All other weights are copied as bytes, and pruned layers that do not
merge are never read.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_state_dict_into_shards_factory

from gradpruner.checkpoints.model_card import model_card
from gradpruner.checkpoints.older_readers import add_older_keys, read_tokenizer_config
from gradpruner.checkpoints.pruned_tensors import PrunedCheckpoint, prepare
from gradpruner.files import write_json, write_text
from gradpruner.models.contents import ADAPTER_CONFIG_FILE, INDEX_FILE
from gradpruner.models.origin import find_origin
from gradpruner.plan import PruningPlan
from gradpruner.progress import Steps

if TYPE_CHECKING:  # it pulls in the Trainer, whose libraries take more memory than the work done here
    from gradpruner.gradients import EarlyGradients

SHARD_PATTERN = "model{suffix}.safetensors"
COPY_BYTES = 2**18  # bytes copied at once; fits the processor's cache, megabytes would take four times as long
# Weights in any format and their indices. Other files beside the weights are copied, except LEFT_OUT_FILES.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".safetensors.index.json", ".bin.index.json"),
)
# Written anew, or true of the source alone; an adapter's config would have transformers look for the adapter.
LEFT_OUT_FILES = ("config.json", "plan.json", "README.md", "probe.json", ADAPTER_CONFIG_FILE, "trainer_state.json")
SIDE_FOLDERS = ("additional_chat_templates",)


def prune_checkpoint(
    plan: PruningPlan,
    gradients: "EarlyGradients | None",
    source: Path,
    target: Path,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the pruned checkpoint to `target`, whole or not at all, without loading the model.

    The merge is computed in the dtype of the checkpoint, so it equals the in-memory path on a model loaded with
    `dtype="auto"`. Beside the weights, `target` gets the config of the kept layers, the other small files of `source`
    (tokenizer, chat template, generation config, ...), `plan.json` and a model card. Its config and that of the
    tokenizer also suit readers of before transformers 5.

    Args:
        plan: which layers are pruned and merged.
        gradients: source of the merged layers' IGIA-Matrices; None if the plan merges nothing.
        source: folder of the dense model, with `model.safetensors` or shards and their index.
        target: new folder.
        max_shard_bytes: largest weight file; a tensor larger than this has a file of its own.

    Raises:
        ValueError: if plan, gradients and source do not belong together, `source` is damaged or holds no safetensors,
            `target` exists, or the disk is too small. Then nothing is written.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"Source and target must differ, got {source} for both. Name a new folder as target.")
    if os.path.lexists(target):
        raise ValueError(f"The target exists already: {target}. Remove it, or name a new folder.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be above 0, got {max_shard_bytes}. Leave it out for 5 GB.")
    pruned = prepare(plan, gradients, source)
    read_tokenizer_config(source)  # refuses a damaged one before the weights are read
    side_files = _side_files(source)
    _check_space(target, pruned.num_bytes + sum(file.stat().st_size for file in side_files))

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed run left it
    partial.mkdir(parents=True)
    try:
        _write_weights(pruned, partial, max_shard_bytes)
        for file in side_files:
            copy = partial / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        pruned.config.save_pretrained(partial)
        add_older_keys(partial)
        plan.save(partial / "plan.json")
        settings = {"max_shard_bytes": max_shard_bytes}
        card = model_card(plan, source.resolve().name, settings, origin=find_origin(str(source)))
        write_text(partial / "README.md", card)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _side_files(source: Path) -> list[Path]:
    """Returns the files to copy unchanged: tokenizer, chat templates, generation config, licence, code, ..."""
    files = [file for folder in ("", *SIDE_FOLDERS) for file in sorted((source / folder).glob("*")) if file.is_file()]
    return [
        file
        for file in files
        if not file.name.endswith(WEIGHT_SUFFIXES) and file.name not in LEFT_OUT_FILES and file.name[0] != "."
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


def _write_weights(pruned: PrunedCheckpoint, folder: Path, max_shard_bytes: int) -> None:
    """Writes all tensors as one safetensors file, or as shards with an index, named as transformers names them."""
    split = split_state_dict_into_shards_factory(
        pruned.tensors,
        get_storage_size=lambda tensor: tensor.kept.num_bytes,
        filename_pattern=SHARD_PATTERN,
        max_shard_size=max_shard_bytes,
    )
    with Steps("prune checkpoint", "B", pruned.num_bytes) as steps:
        for file_name, names in split.filename_to_tensors.items():
            _write_file(folder / file_name, pruned, names, steps.advance)
    if split.is_sharded:
        total_parameters = sum(math.prod(tensor.kept.shape) for tensor in pruned.tensors.values())
        metadata = {"total_parameters": total_parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / INDEX_FILE, index)


def _write_file(file: Path, pruned: PrunedCheckpoint, names: Iterable[str], written: Callable[[int], object]) -> None:
    """Writes these tensors as one safetensors file; wide elements come first, so that every tensor is aligned."""
    wide_first = sorted(names, key=lambda name: -pruned.tensors[name].kept.itemsize)
    tensors = {name: pruned.tensors[name] for name in wide_first}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.kept.num_bytes
        header[name] = {"dtype": tensor.kept.dtype, "shape": list(tensor.kept.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = memoryview(bytearray(COPY_BYTES))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for part in pruned.parts(tensor, buffer):
                stream.write(part)
                written(len(part))
        stream.flush()
        os.fsync(stream.fileno())
