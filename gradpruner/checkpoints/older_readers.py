"""Keys that readers of before transformers 5 need beside those that transformers 5 writes.

Without them transformers 4, and what bundles it, fails on the tokenizer or, worse, computes other rotary embeddings
without a word. `make test-transformers4` tries the result. Only JSON files are read and written here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from gradpruner.files import write_json

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
# The class that takes `tokenizer.json` as it is, in transformers 4 and 5. Classes of single models share their names
# between the two, but not their meaning: LlamaTokenizer of transformers 5 saves no `add_bos_token`, and that of
# transformers 4 then adds a BOS.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
CALL_IT_TYPE = ("olmo2", "phi3")  # models whose own check in transformers 4 refuses `rope_type` in `rope_scaling`


def add_older_keys(folder: Path) -> None:
    """Adds the keys to `config.json` and, if it is of transformers 5, `tokenizer_config.json` in a folder."""
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, dict(sorted((config | older_config(config)).items())))
    tokenizer_config = read_tokenizer_config(folder)
    if tokenizer_config is not None:
        older = older_tokenizer_config(tokenizer_config)
        if older != tokenizer_config:
            write_json(folder / TOKENIZER_CONFIG_FILE, older)


def read_tokenizer_config(folder: Path) -> dict[str, Any] | None:
    """Returns the content of `tokenizer_config.json`, or None if there is none, or no `tokenizer.json` beside it.

    Raises:
        ValueError: if it holds no JSON object.
    """
    file = folder / TOKENIZER_CONFIG_FILE
    if not (file.is_file() and (folder / TOKENIZER_FILE).is_file()):
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} must hold a JSON object, got {error}. Download or save the tokenizer again."
        ) from error


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the older keys that say what `dtype` and `rope_parameters` of a config say.

    Rotary parameters of single kinds of layers are those of Gemma 3, the one such model in transformers 4.

    Args:
        config: content of a `config.json` of transformers 5.

    Returns:
        `torch_dtype`; `rope_theta`; and where the rotary embeddings call for them `rope_scaling`,
        `partial_rotary_factor`, `rope_local_base_freq` and `original_max_position_embeddings`.
    """
    older: dict[str, Any] = {}
    if config.get("dtype"):
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return older
    # transformers 5 prefers `rope_scaling` to `rope_parameters`, so nothing may be missing from the two together.
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
    trained_length = rope.get("original_max_position_embeddings")
    if kind == "longrope" and trained_length is not None:
        older["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if kind == "yarn" and trained_length == config.get("max_position_embeddings"):
        del scaling["original_max_position_embeddings"]  # transformers 4 would take their ratio, 1, for the factor
    if config.get("model_type") in CALL_IT_TYPE:
        scaling["type"] = scaling.pop("rope_type")
    older["rope_scaling"] = scaling
    return older


def older_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `tokenizer_config.json` that transformers 4 and 5 read alike; one of transformers 4 is unchanged.

    Args:
        config: content of a `tokenizer_config.json` that has a `tokenizer.json` beside it.
    """
    own_class = getattr(transformers, str(config.get("tokenizer_class")), None)
    if config.get("backend") != "tokenizers" or own_class is None or "auto_map" in config:
        return dict(config)
    older = dict(config) | {"tokenizer_class": TOKENIZER_CLASS}
    # Defaults of the class that is no longer named.
    older.setdefault("model_input_names", list(own_class.model_input_names))
    if own_class.padding_side != PreTrainedTokenizerBase.padding_side:
        older.setdefault("padding_side", own_class.padding_side)
    # A list of this name is an error in transformers 4; under the name there, both read it.
    extra = older.pop("extra_special_tokens", None)
    if extra:
        older["additional_special_tokens"] = extra
    return dict(sorted(older.items()))
