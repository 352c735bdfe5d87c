"""The command that makes a run again, from the config in its record.

The command names the options of the config groups, and the settings in which the record differs from these.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from experiments.cli import command_of
from experiments.config import CONF, load_option, options, resolve
from gradpruner.record import NOT_IDENTITY, RunRecord, portable
from gradpruner.reporting.coordinates import dataset_module

NOT_REPEATED = ("_target_", "save_steps")  # of a group: said by its option, and without effect on results
OWN_MODEL = "smollm2_135m"  # the option on top of which a user's model.path goes
PLAIN = re.compile(r"[\w./-]+")  # text that hydra's grammar reads without quotes
# Settings at the root that groups take, so that they have an effect.
AT_ROOT = ("sparsity", "merge_count", "seed", "show_options")


def rerun_command(record: RunRecord) -> str:
    """Returns the command, or "" if the record was made with options that are not here."""
    try:
        choices = _choices(record)
    except LookupError:
        return ""
    own = dict(_leaves(record.config))
    cfg = _default().copy()
    with open_dict(cfg):
        for group, name in choices.items():
            cfg[group] = _part(group, name)
        for key in AT_ROOT:
            cfg[key] = own.get(key, cfg[key])
    # What the groups take from the root, such as ${sparsity}, is now as in the record.
    base = dict(_leaves(portable(resolve(cfg))))
    arguments = [f"{group}={name}" for group, name in choices.items()]
    arguments += [f"{key}={_written(own[key])}" for key in AT_ROOT if key in own and own[key] != _default()[key]]
    for key, value in own.items():
        if key.split(".")[0] in NOT_IDENTITY or key.rsplit(".", 1)[-1] in NOT_REPEATED:
            continue
        if key not in base and value is not None:
            arguments.append(f"+{key}={_written(value)}")
        elif key in base and base[key] != value:
            arguments.append(f"{key}={_written(value)}")
    return shlex.join([*command_of("experiments.run"), *arguments])


@cache
def _default() -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        cfg: DictConfig = compose("config")
    else:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            cfg = compose("config")
    return cfg


@cache
def _part(group: str, name: str) -> DictConfig:
    return load_option(group, name)


def _choices(record: RunRecord) -> dict[str, str]:
    """Returns the option of each group.

    Raises:
        LookupError: if a group has no such option.
    """
    config = record.config
    dataset = dataset_module(record) or ""
    known = options("dataset")
    found = {
        "model": _option("model", "path", config["model"]["path"], default=OWN_MODEL),
        "dataset": dataset if dataset in known else "jsonl",
        "method": record.pruning["method"],
        "finetune": config["finetune"]["mode"],
        "evaluation": _option("evaluation", "_target_", config["evaluation"]["_target_"]),
    }
    if found["method"] not in options("method"):
        raise LookupError(found["method"])
    return found


@cache
def _option(group: str, key: str, value: str, default: str | None = None) -> str:
    """Returns the first option of a group that has this value, or `default`.

    Raises:
        LookupError: if none has, and there is no default.
    """
    for name in options(group):
        if _part(group, name).get(key) == value:
            return name
    if default is not None:
        return default
    raise LookupError(f"{group}.{key}={value}")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(value: Any) -> str:
    """Returns a value in hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if PLAIN.fullmatch(value) else f"'{quoted}'"
    return json.dumps(value)
