"""The shape of the root config, and how a config node becomes the object it describes.

A node's fields and types have one home: the dataclass that its `_target_` names. Unknown keys and wrong types are
refused before anything is built.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass
class RunConfig:
    """Root config. The groups are checked against their own classes in `build`.

    Attributes:
        model: which model (`gradpruner.models.ModelSpec`).
        dataset: which task (a `gradpruner.tasks.Task`).
        method: what to do to the model (a `gradpruner.method.Method`).
        finetune: how to fine-tune (`gradpruner.finetune.TrainingSpec`).
        evaluation: how to evaluate.
        tracker: where to report besides the record.
        sparsity: fraction of decoder layers to prune; round(sparsity * layers) leave. `auto`: the method finds it.
        merge_count: how many of the pruned layers merge.
        seed: of data order, adapters and draws.
        show_options: list the choices in the prompt, where a dataset has a template for it.
        reference: method to run beside this one for the summary, from the same cache; null for none.
        evaluate_before: evaluate before fine-tuning, too.
        measure_speed: time training steps and inference of the result, beside the dense model.
        dry_run: say what would happen, load no weights.
        save_checkpoint: write the final model.
        results_dir: where run folders go.
        output_dir: folder of this very run, instead of one below results_dir.
        cache_dir: finished stages and converted models.
    """

    model: Any = MISSING
    dataset: Any = MISSING
    method: Any = MISSING
    finetune: Any = MISSING
    evaluation: Any = MISSING
    tracker: Any = MISSING
    sparsity: float | str | None = MISSING
    merge_count: int = MISSING
    seed: int = MISSING
    show_options: bool = MISSING
    reference: str | None = MISSING
    evaluate_before: bool = MISSING
    measure_speed: bool = MISSING
    dry_run: bool = MISSING
    save_checkpoint: bool = MISSING
    results_dir: str = MISSING
    output_dir: str | None = MISSING
    cache_dir: str = MISSING


class ConfigError(ValueError):
    """A config value has the wrong name or type."""


def register() -> None:
    """Makes `schema` available to `conf/config.yaml`, and two resolvers to all YAML.

    `${lookup:key,{key:value,...},default}` is the value of the key. `${layer_fraction:dropped,merged,layers}` is the
    sparsity at which `dropped + merged` of so many layers leave.
    """
    ConfigStore.instance().store(name="schema", node=RunConfig)
    OmegaConf.register_new_resolver("lookup", lambda key, table, default: table.get(key, default), replace=True)
    OmegaConf.register_new_resolver(
        "layer_fraction", lambda dropped, merged, layers: (dropped + merged) / layers, replace=True
    )


def build(node: DictConfig, where: str) -> Any:
    """Builds the object that a config node describes.

    Args:
        node: a mapping with `_target_` and fields of that dataclass.
        where: name of the node, for errors.

    Raises:
        ConfigError: if a key is unknown, missing or of the wrong type.
        ValueError: whatever the class itself refuses.
    """
    values = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
    target = get_class(str(values.pop("_target_")))
    missing = sorted(str(key) for key, value in values.items() if value == "???")
    if missing:
        keys = ", ".join(f"{where}.{key}" for key in missing)
        raise ConfigError(f"{target.__name__} needs {keys}, got no value. Give it on the command line: {keys}=...")
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


def _unfrozen(target: type) -> type:
    """A plain dataclass with the fields of `target`: omegaconf makes configs of frozen ones read-only."""
    hints = get_type_hints(target)
    fields = [
        (field.name, hints[field.name], dataclasses.field(default=_default(field)))
        for field in dataclasses.fields(target)
    ]
    return dataclasses.make_dataclass(target.__name__, fields)


def _default(field: "dataclasses.Field[Any]") -> Any:
    return MISSING if field.default is dataclasses.MISSING else field.default
