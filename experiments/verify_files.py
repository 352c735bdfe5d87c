"""Checks of a saved checkpoint that need its files alone, for `experiments.verify`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.verify_fresh import ADAPTER_FOLDER, Check, named, one_line
from gradpruner.checkpoints.older_readers import older_config, older_tokenizer_config, read_tokenizer_config
from gradpruner.checkpoints.probe import PROBE_FILE, PROBE_VERSION
from gradpruner.plan import PruningPlan

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def checks_of_files(folder: Path, config: dict[str, Any]) -> Iterator[Check]:
    """Yields the checks.

    Args:
        folder: the checkpoint.
        config: content of its `config.json`.
    """
    yield named("weight files", lambda: _weight_files(folder))
    yield from _depth(folder, config)
    yield named("older readers", lambda: _older_keys(config))
    yield named("tokenizer class", lambda: _tokenizer_class(folder))
    yield named("generation config", lambda: _generation_config(folder, config))
    if (folder / ADAPTER_FOLDER).is_dir():
        yield named("adapter base", lambda: _adapter_base(folder))


def _weight_files(folder: Path) -> Check:
    """Checks that all weight files are safetensors and that no shard of the index is missing."""
    name = "weight files"
    pickles = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in PICKLE_SUFFIXES)
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles:
        return Check(name, False, f"pickle files, which can run code when loaded: {', '.join(pickles)}")
    if not weights:
        return Check(name, False, "no *.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - set(weights))
        if missing:
            return Check(name, False, f"shards named in the index but missing: {', '.join(missing)}")
    size = sum((folder / file).stat().st_size for file in weights)
    return Check(name, True, f"{len(weights)} safetensors, {size / 1e6:,.1f} MB")


def _depth(folder: Path, config: dict[str, Any]) -> list[Check]:
    """Checks the depth of the config, and of every list in it with one entry per layer, against the plan."""
    depth = config.get("num_hidden_layers")
    try:
        plan = PruningPlan.load(folder / "plan.json")
    except FileNotFoundError:
        checks = [Check("depth", None, f"num_hidden_layers is {depth}; no plan.json to compare with")]
    except (ValueError, TypeError) as error:
        checks = [Check("depth", False, f"plan.json cannot be read: {error}")]
    else:
        kept = len(plan.kept_layers)
        details = f"num_hidden_layers is {depth}, the plan keeps {kept} of {plan.num_hidden_layers}"
        checks, depth = [Check("depth", depth == kept, details)], kept
    lists = {name: values for name, values in config.items() if "layer" in name and isinstance(values, list) and values}
    if lists:
        lengths = ", ".join(f"{name} has {len(values)} entries" for name, values in lists.items())
        same = all(len(values) == depth for values in lists.values())
        checks.append(Check("per-layer lists", same, lengths if same else f"{lengths}, for {depth} layers"))
    return checks


def _older_keys(config: dict[str, Any]) -> Check:
    """Checks that the keys for older readers say what the keys of transformers 5 say."""
    name, expected = "older readers", older_config(config)
    absent = [key for key in expected if key not in config]
    different = [
        f"{key} is {config[key]}, not {expected[key]}"
        for key in expected
        if config.get(key, expected[key]) != expected[key]
    ]
    if different or 0 < len(absent) < len(expected):
        return Check(name, False, "; ".join(different + [f"no {key}" for key in absent]))
    if absent:
        return Check(name, None, f"no {', '.join(absent)}, for which transformers 4 takes defaults. Save it again")
    return Check(name, True, f"{', '.join(expected) or 'no keys'} as transformers 5 has them")


def _tokenizer_class(folder: Path) -> Check:
    """Checks that transformers 4 knows the class of the tokenizer, and that it means the same there."""
    name, config = "tokenizer class", read_tokenizer_config(folder)
    if config is None:
        return Check(name, None, "no tokenizer.json with a tokenizer_config.json")
    own = config.get("tokenizer_class")
    if older_tokenizer_config(config) != config:
        return Check(
            name,
            None,
            f"{own} as of transformers 5, which transformers 4 refuses or takes in another way. Save it again",
        )
    return Check(name, True, f"{own}, as transformers 4 knows it")


def _generation_config(folder: Path, config: dict[str, Any]) -> Check:
    """Checks that the special tokens of `generation_config.json` are in the vocabulary."""
    name, file = "generation config", folder / "generation_config.json"
    if not file.is_file():
        return Check(name, None, f"no {file.name}")
    settings = json.loads(file.read_text(encoding="utf-8"))
    found = {key: settings[key] for key in SPECIAL_IDS if settings.get(key) is not None}
    ids = {token for value in found.values() for token in (value if isinstance(value, list) else [value])}
    outside = sorted(token for token in ids if not 0 <= token < config["vocab_size"])
    if outside:
        return Check(name, False, f"token ids {outside} are outside of the vocabulary of {config['vocab_size']}")
    return Check(name, True, ", ".join(f"{key} {value}" for key, value in found.items()) or "no special tokens")


def _adapter_base(folder: Path) -> Check:
    """Checks that the adapter names this checkpoint as its base, which is what peft then loads."""
    name, config_file = "adapter base", folder / ADAPTER_FOLDER / "adapter_config.json"
    base = str(json.loads(config_file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    advice = f"AutoPeftModel loads that: write {folder.absolute()} into {config_file.name}"
    if not Path(base).is_dir():
        return Check(name, None, f"names {base}, which is no folder here: was the checkpoint moved? {advice}")
    if not Path(base).samefile(folder):
        return Check(name, False, f"names {base}, another folder. {advice}")
    return Check(name, True, f"names {base}, this folder")


def read_probe(folder: Path, name: str = "probe") -> tuple[dict[str, Any] | None, Check]:
    """Returns the probe recorded in a folder, or None if it is missing or cannot be read, and the check of its file."""
    try:
        probe = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        if probe["version"] != PROBE_VERSION:
            return None, Check(name, False, f"{PROBE_FILE} is of version {probe['version']}, not {PROBE_VERSION}")
        details = f"recorded in {probe['dtype']}, {len(probe['token_ids'])} tokens, {len(probe['positions'])} positions"
        missing = {"decoded", "continuation", "margins"} - set(probe)
    except FileNotFoundError:
        return None, Check(name, None, f"no {PROBE_FILE}: no logits, tokens and token ids to compare with")
    except (ValueError, KeyError, TypeError) as error:
        return None, Check(name, False, f"{PROBE_FILE} cannot be read: {one_line(error)}")
    if missing:
        return None, Check(name, False, f"{PROBE_FILE} lacks {', '.join(sorted(missing))}")
    return probe, Check(name, True, details)
