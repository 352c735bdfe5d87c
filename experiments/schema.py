"""The fields of the root config, and how a config node becomes the object it describes.

The dataclass that a node's `_target_` names defines the node's fields and types. Unknown keys and wrong types are
refused before anything is built.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints
from uuid import uuid4

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.cli import command_of
from experiments.places import home
from gradpruner.checks import guess
from gradpruner.messages import one_line


@dataclass
class RunConfig:
    """The root config. `build` checks each group against its own class.

    Attributes:
        model: model to prune (`gradpruner.models.ModelSpec`).
        dataset: task to train and test on (a `gradpruner.tasks.Task`).
        method: how to prune (a `gradpruner.method.Method`).
        finetune: how to fine-tune (`gradpruner.finetune.TrainingSpec`).
        evaluation: how to evaluate.
        tracker: where to report the run besides its record.
        sparsity: fraction of decoder layers to prune: round(sparsity * layers) of them. `auto`: the method finds it.
        merge_count: number of pruned layers that merge into kept layers.
        seed: seed of data order, adapters and draws.
        show_options: list the choices in the prompt, if the dataset has a template for it.
        num_processes: processes per node that share the run, started by torchrun if there are several.
        reference: method, or list of methods, to run first, from the same cache, and to show in the summary; null for
            none.
        evaluate_before: also evaluate before fine-tuning.
        measure_speed: time training steps and inference of the result and of the dense model.
        dry_run: print what would happen; load no weights.
        rerun: also run what has finished.
        save_checkpoint: write the final model.
        push_to_hub: repository on the Hub, OWNER/NAME, to push the final model to; null: none.
        results_dir: folder for run folders.
        output_dir: folder of this run; null: a folder below results_dir.
        cache_dir: folder for finished stages and converted models.
    """

    model: Any = MISSING
    dataset: Any = MISSING
    method: Any = MISSING
    finetune: Any = MISSING
    evaluation: Any = MISSING
    tracker: Any = MISSING
    sparsity: float | int | str | None = MISSING
    merge_count: int = MISSING
    seed: int = MISSING
    show_options: bool = MISSING
    num_processes: int = MISSING
    reference: Any = MISSING
    evaluate_before: bool = MISSING
    measure_speed: bool = MISSING
    dry_run: bool = MISSING
    rerun: bool = MISSING
    save_checkpoint: bool = MISSING
    push_to_hub: bool | str | None = MISSING  # true is refused with advice, false is null
    results_dir: str = MISSING
    output_dir: str | None = MISSING
    cache_dir: str = MISSING


class ConfigError(ValueError):
    """Error for a config key or value that is not allowed."""


def register() -> None:
    """Registers `schema` for `conf/config.yaml`, and six resolvers for all YAML.

    `${lookup:key,{key:value,...},default}` is the value of the key. `${layer_fraction:dropped,merged,layers}` is the
    sparsity that prunes `dropped + merged` of `layers` layers. `${at_scale:small,paper}`, for
    `hydra.sweeper.params`, is the value at the chosen scale of tables and figures (`conf/scale/`). `${unique:}` is 8
    random hex digits: others in each sweep, the same in all jobs of one, to which hydra hands the values in its cache.
    `${home:path}` is a path below GRADPRUNER_HOME, if that is set. `${command:module}` is how to start an entry point.
    """
    ConfigStore.instance().store(name="schema", node=RunConfig)
    OmegaConf.register_new_resolver("lookup", lambda key, table, default: table.get(key, default), replace=True)
    OmegaConf.register_new_resolver(
        "layer_fraction", lambda dropped, merged, layers: (dropped + merged) / layers, replace=True
    )
    OmegaConf.register_new_resolver("at_scale", _at_scale, replace=True)
    OmegaConf.register_new_resolver("home", home, replace=True)
    OmegaConf.register_new_resolver("command", lambda module: " ".join(command_of(module)), replace=True)
    OmegaConf.register_new_resolver("unique", lambda: uuid4().hex[:8], use_cache=True, replace=True)


def _at_scale(small: Any, paper: Any, *, _root_: DictConfig) -> Any:
    """Returns the value at the chosen scale, for hydra's own node: a job's config no longer has that node."""
    return {"small": small, "paper": paper}[_root_.hydra.runtime.choices.scale]


def build(node: DictConfig, where: str) -> Any:
    """Builds the object that a config node describes.

    Args:
        node: mapping with `_target_`, which names a dataclass, and the fields of that dataclass.
        where: name of the node, for errors.

    Raises:
        ConfigError: if a key is unknown, missing or of the wrong type.
        ValueError: if the class refuses a value.
    """
    values = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    target = _target(str(values.pop("_target_", "???")), where)
    missing = sorted(str(key) for key, value in values.items() if value == "???")
    if missing:
        keys = ", ".join(f"{where}.{key}" for key in missing)
        raise ConfigError(f"{target.__name__} needs {keys}, got no value. Give it on the command line: {keys}=...")
    hints = get_type_hints(target)
    known = [field.name for field in dataclasses.fields(target)]
    for key, value in values.items():
        if key not in known:
            raise unknown_key(f"{where}.{key}", known)
        if type(value) is int and float in get_args(hints[key]) and int not in get_args(hints[key]):
            values[key] = float(value)  # omegaconf does so for a plain `float`
    try:
        checked = OmegaConf.merge(OmegaConf.structured(_unfrozen(target)), values)
        plain = OmegaConf.to_container(checked, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Bad value in {where}: {reason} (key {where}.{error.full_key}). See conf/{where}/ for the fields."
        ) from error
    assert isinstance(plain, dict)
    return target(**{str(key): tuple(v) if isinstance(v, list) else v for key, v in plain.items()})


def _target(path: str, where: str) -> type:
    """Returns the class of a node; raises ConfigError if the node names none, or one that cannot be used."""
    if path == "???":
        raise ConfigError(
            f"{where} must name its class, got no _target_. Write `_target_: MODULE.CLASS` into the YAML, or start "
            f"from one of conf/{where}/base/ in its defaults."
        )
    try:
        target: type = get_class(path)
    except Exception as error:  # whatever the module raises
        cause = error.__cause__ or error
        raise ConfigError(
            f"{where}._target_ must be a class, got {path}, which cannot be imported: {one_line(cause)}. Correct the "
            "name, or start in the folder of the module."
        ) from error
    if get_type_hints(target).get("name") == ClassVar[str] and not hasattr(target, "name"):
        raise ConfigError(
            f"{path} must have a name, for folders and tables, got a class without one. Add `name: ClassVar[str] = "
            f'"{target.__name__.lower()}"` to it.'
        )
    return target


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest of the `known` names in its place."""
    parent, _, name = key.rpartition(".")
    within = f" in {parent}" if parent else ""
    return ConfigError(f"There is no key {key!r}{guess(name, known)}. Known{within}: {', '.join(known)}.")


def check_root(cfg: DictConfig) -> None:
    """Refuses root keys that no run has, and missing ones, such as after `~seed`.

    Raises:
        ConfigError: naming the key.
    """
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in map(str, cfg):
        if key not in known:
            raise unknown_key(key, known)
    for key in known:
        if key not in cfg.keys() or OmegaConf.is_missing(cfg, key):  # noqa: SIM118, where `in` skips missing values
            raise ConfigError(f"A run needs {key}, got no value. Give it on the command line: {key}=...")


def is_text(cfg: DictConfig, key: str) -> bool:
    """Returns whether the class of a key's node says that the key's value is a text."""
    parent, _, name = key.rpartition(".")
    if not parent:
        owner: type = RunConfig
    else:
        node = OmegaConf.select(cfg, parent)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            return False
        owner = get_class(str(node._target_))
    hint = get_type_hints(owner).get(name)
    allowed = set(get_args(hint) or (hint,))
    return str in allowed and allowed <= {str, NoneType}


def _unfrozen(target: type) -> type:
    """Returns a mutable dataclass with the fields of `target`; omegaconf makes configs of frozen ones read-only."""
    hints = get_type_hints(target)
    fields = [
        (field.name, hints[field.name], dataclasses.field(default=_default(field)))
        for field in dataclasses.fields(target)
    ]
    return dataclasses.make_dataclass(target.__name__, fields)


def _default(field: "dataclasses.Field[Any]") -> Any:
    return MISSING if field.default is dataclasses.MISSING else field.default
