"""What a model folder or a Hub repository holds, judged by the names of its files: a whole model or something else."""

import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gradpruner.messages import first_few

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
JSON_FILES = (CONFIG_FILE, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX_FILE)
POINTER_START = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # of the Git LFS specification
# Beside weights in a folder that a training run wrote, or an adapter's own; they hold no model.
NOT_WEIGHTS = ("adapter_model.*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*")
# File names -> what they are, and what to do. The first line that a file name fits counts.
KINDS = (
    (
        ("*.gguf",),
        "GGUF weights, as llama.cpp uses them",
        "Use the safetensors checkpoint that they were converted from.",
    ),
    (
        ("global_step*/*", "zero_to_fp32.py", "*_model_states.pt", "*_optim_states.pt"),
        "parts of a DeepSpeed training run",
        "Put them together with its zero_to_fp32.py --safe_serialization, and use the resulting folder.",
    ),
    (
        ("*.distcp", "*/*.distcp"),
        "parts of an FSDP training run",
        "Put them together with `accelerate merge-weights`, and use the resulting folder.",
    ),
    (
        ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2"),
        "an unfinished download",
        "Download the model again; `hf download` continues where it stopped.",
    ),
    (
        ("*.safetensors",),
        f"safetensors, but neither {WEIGHTS_FILE} nor {INDEX_FILE}, which transformers reads",
        "Download or save the checkpoint again, whole and under these names.",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        "only pickle files",
        "Pickle files can run code when loaded and are refused; convert the model with save_pretrained in an "
        "environment that trusts it.",
    ),
    (
        ("*.h5", "*.msgpack", "*.onnx", "*.npz", "*.ot", "*.tflite", "*.nemo"),
        "weights of another framework",
        "Use a checkpoint for PyTorch: a folder with safetensors.",
    ),
    (
        ("adapter_model.*", ADAPTER_CONFIG_FILE),
        "an adapter alone",
        "Merge the adapter into its base model with peft's merge_and_unload(), save the result with its tokenizer, and "
        "use that folder.",
    ),
    (
        ("*/config.json", f"*/{ADAPTER_CONFIG_FILE}"),
        "models in folders of its own",
        "Use one of these folders.",
    ),
)


class AssetError(ValueError):
    """A requested model is not on this machine; the message says how to get it."""


def check_folder(folder: Path) -> None:
    """Raises AssetError unless `folder` holds the files of a whole model; reads no weights."""
    if not folder.is_dir():
        raise _no_folder(folder)
    names = [file.relative_to(folder).as_posix() for pattern in ("*", "*/*") for file in folder.glob(pattern)]
    check_names(names, str(folder.absolute()))
    _check_links(folder)
    _check_no_pointers(folder)
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def check_names(names: Collection[str], place: str) -> None:
    """Raises AssetError unless the files of a folder or repository include a config and safetensors weights.

    Args:
        names: paths relative to the folder.
        place: the folder or Hub id, for the message.
    """
    has_weights, has_config = WEIGHTS_FILE in names or INDEX_FILE in names, CONFIG_FILE in names
    if has_weights and has_config:
        return
    advice = "Use a folder written by save_pretrained, or a Hub id such as meta-llama/Llama-3.2-1B."
    if has_weights:
        raise AssetError(
            f"No model in {place}: it holds weights but no {CONFIG_FILE}. Copy the file there that was saved with them."
        )
    for patterns, what, own_advice in KINDS:
        found = sorted({_matched(name, patterns) for name in names} - {""})
        if found:
            raise AssetError(f"No model in {place}: it holds {what} ({first_few(found)}). {own_advice}")
    lacks = "no weights" if has_config else f"neither {CONFIG_FILE} nor weights"
    raise AssetError(f"No model in {place}: it holds {lacks}. {advice}")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises AssetError if it holds none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        problem = f"a {type(data).__name__}"
    except ValueError as error:
        data, problem = None, f"no JSON ({error})" if file.stat().st_size else "an empty file"
    if not isinstance(data, dict):
        raise AssetError(f"{file} must hold a JSON object, got {problem}. Download or save the checkpoint again.")
    return data


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads a model's weights from; empty if there are none.

    Raises:
        AssetError: if the index of several files is damaged, or names files that are missing.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AssetError(
            f"The index of a checkpoint must hold a weight_map, got none in {index}. The file is damaged: download or "
            "save the checkpoint again."
        )
    files = [folder / str(name) for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise AssetError(
            f"All files that the checkpoint's index names must be there, got {len(files) - len(missing)} of "
            f"{len(files)} in {folder}: {first_few(missing)} missing. Download or save the checkpoint again."
        )
    return files


def _no_folder(folder: Path) -> AssetError:
    if folder.is_file():
        return AssetError(
            f"No model in {folder.absolute()}: it is a file. Use the folder of a whole model, with its "
            f"{CONFIG_FILE}, tokenizer and safetensors."
        )
    parent = folder.absolute().parent
    siblings = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    there = f"{parent} holds the folders {first_few(siblings)}" if siblings else f"{parent} holds no folders"
    there = there if parent.is_dir() else f"{parent} does not exist either"
    return AssetError(
        f"No model in {folder.absolute()}: there is no such folder, and {there}. Correct the path; a relative one "
        "means the folder that the command was started in."
    )


def _matched(name: str, patterns: tuple[str, ...]) -> str:
    """Returns the file name, or the folder of a pattern with one, if it fits a pattern; else an empty string."""
    if any(fnmatch(name, pattern) for pattern in NOT_WEIGHTS) and "adapter_model.*" not in patterns:
        return ""
    for pattern in patterns:
        if fnmatch(name, pattern) and pattern.count("/") == name.count("/"):
            return name.rpartition("/")[0] or name
    return ""


def _check_links(folder: Path) -> None:
    broken = sorted(file.name for file in folder.iterdir() if file.is_symlink() and not file.exists())
    if broken:
        raise AssetError(
            f"A checkpoint must hold the files themselves, got links to files that are missing in {folder}: "
            f"{first_few(broken)}. Copy the folder again with its links followed (`cp -L`), or download the model "
            "again."
        )


def _check_no_pointers(folder: Path) -> None:
    small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.stat().st_size <= MAX_POINTER_BYTES]
    pointers = [file.name for file in small if file.read_bytes().startswith(POINTER_START)]
    if pointers:
        raise AssetError(
            f"A checkpoint must hold the files themselves, got Git LFS pointers in {folder}: {first_few(pointers)}. "
            "Run `git lfs install` and then `git lfs pull` there, or download the model with `hf download`."
        )
