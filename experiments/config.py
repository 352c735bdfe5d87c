"""Turns hydra's config into the pipeline of a run, the settings that results depend on, and the run's folder."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.cli import add_to_path
from experiments.paths import path_setting
from experiments.places import shipped
from gradpruner.checks import guess
from gradpruner.files import content_hash
from gradpruner.messages import first_line
from gradpruner.record import NOT_IDENTITY, evaluation_settings

if TYPE_CHECKING:
    from gradpruner.pipeline.run import Pipeline
    from gradpruner.tasks import Task

CONF = shipped("conf", "conf")
# Keys that name a second dataset, and the keys with its settings.
SETTINGS_OF = {"dataset.test": "dataset.test_settings", "method.recover_on": "method.recover_settings"}

schema.register()
# Our YAML of a launcher replaces the plugin's defaults of the same name: `hydra/launcher=submitit_slurm`.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/.*' is validated against ConfigStore schema")


def build_pipeline(cfg: DictConfig) -> "Pipeline":
    """Builds every node of the config; loads no weights and no data."""
    from gradpruner.pipeline.run import Pipeline  # takes seconds, which a typo in the config's names must not cost

    task, test_task = build_tasks(cfg)
    recover_on, recover_settings = (cfg.method.get(key) for key in ("recover_on", "recover_settings"))
    return Pipeline(
        model=schema.build(cfg.model, "model"),
        task=task,
        test_task=test_task,
        method=schema.build(cfg.method, "method"),
        training=schema.build(cfg.finetune, "finetune"),
        evaluation=schema.build(cfg.evaluation, "evaluation"),
        seed=cfg.seed,
        cache_dir=path_setting(cfg, "cache_dir"),
        evaluate_before=cfg.evaluate_before,
        measure_speed=cfg.measure_speed,
        recovery_task=_second_task(cfg, "method.recover_on", recover_on, recover_settings),
    )


def build_tasks(cfg: DictConfig) -> "tuple[Task, Task | None]":
    """Returns the dataset to train on and, if `dataset.test` names another one, the dataset to test on.

    Raises:
        ConfigError: if there is no such dataset, if settings are given without a dataset's name, or if
            `dataset.validation_fraction` already replaces the test split.
    """
    node = cfg.dataset.copy()
    with open_dict(node):
        name, settings = node.pop("test", None), node.pop("test_settings", None)
    task: Task = schema.build(node, "dataset")
    if name is not None and task.validation_fraction is not None:
        raise schema.ConfigError(
            f"Test rows are either those of another dataset or validation rows, got dataset.test={name} and "
            f"dataset.validation_fraction={task.validation_fraction}. Set one of them to null."
        )
    return task, _second_task(cfg, "dataset.test", name, settings)


def _second_task(cfg: DictConfig, key: str, name: str | None, settings: DictConfig | None) -> "Task | None":
    """Returns the dataset that `key` names, with the settings next to that key.

    Raises:
        ConfigError: if there is no such dataset, or if settings are given without a name.
    """
    # `dataset@dataset.test: NAME` in a defaults list cannot do this: hydra builds the defaults list before the config,
    # so the list sees choices of config groups and never a value such as dataset.test=NAME.
    if name is None:
        if settings:
            raise schema.ConfigError(
                f"{SETTINGS_OF[key]} belongs to {key}, got {settings} and {key}=null. Name the dataset."
            )
        return None
    known = options("dataset")
    if name not in known:
        raise schema.ConfigError(
            f"{key} must name a dataset, got {name!r}{guess(str(name), known)}. Known: {', '.join(known)}, or null."
        )
    node = OmegaConf.merge(load_option("dataset", name), settings or {})
    assert isinstance(node, DictConfig)
    node.pop("test", None), node.pop("test_settings", None)
    root = cfg.copy()
    with open_dict(root):
        root.dataset = node  # its interpolations, such as ${show_options}, resolve against the run's config
    task: Task = schema.build(root.dataset, "dataset")
    return task


def reference_configs(cfg: DictConfig, method_name: str) -> Iterator[DictConfig]:
    """Yields configs of the same run with each reference method and the settings that its YAML and the preset give it.

    Args:
        cfg: config of the run.
        method_name: its method, which is not run twice.

    Raises:
        ConfigError: if there is no such method.
    """
    known = options("method")
    for name in cfg.reference if OmegaConf.is_list(cfg.reference) else [cfg.reference]:
        if name in (None, method_name):
            continue
        if name not in known:
            raise schema.ConfigError(
                f"reference must name a method, or a list of methods, got {name!r}. Known: {', '.join(known)}, or null."
            )
        reference = cfg.copy()
        OmegaConf.set_struct(reference, False)
        reference.method = _method_in_preset(name)
        reference.save_checkpoint, reference.push_to_hub = False, None
        if name == "dense":  # fine-tuned once: it is what the run compresses then
            reference.finetune.tune_dense_first = False
        if cfg.output_dir is not None:
            reference.output_dir = str(path_setting(cfg, "output_dir") / "reference" / name)
        yield reference


def _method_in_preset(name: str) -> DictConfig:
    """Returns the settings of a method, also those that the chosen preset has for it (`experiment/base/methods`)."""
    method = load_option("method", name)
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    for group in ("experiment/base", "debug"):
        option = f"{chosen.get(group)}_{name}"
        if option in options(f"{group}/methods"):
            method.merge_with(load_option(f"{group}/methods", option, "method"))
    return method


def use_config_dir(folder: str) -> None:
    """Lets Python find classes in the folder of `--config-dir`.

    Raises:
        ConfigError: if there is no such folder.
    """
    if not Path(folder).is_dir():
        raise schema.ConfigError(
            f"--config-dir must be a folder with options of config groups, got {Path(folder).absolute()}, where there "
            "is none. Correct it."
        )
    add_to_path(Path(folder))


@contextmanager
def composing(config_dir: str | None = None) -> Iterator[ConfigLoader]:
    """Makes `hydra.compose` work outside of `hydra.main`; yields hydra's loader.

    Args:
        config_dir: folder with more options, as `--config-dir` names it.

    Raises:
        ConfigError: if there is no such folder.
    """
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        if config_dir is not None:
            use_config_dir(config_dir)
            search_path = create_config_search_path(str(CONF))
            before_schema = SearchPathQuery(provider="schema")  # which must be last; as hydra.main has it
            search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}", before_schema)
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("app", search_path)
        yield GlobalHydra.instance().config_loader()


def load_option(group: str, name: str, package: str | None = None) -> DictConfig:
    """Composes an option of a config group by itself; its interpolations are not resolved yet.

    Args:
        group: the group.
        name: its option.
        package: where its keys are in a config; by default they have the name of the group.
    """
    if GlobalHydra.instance().is_initialized():  # in a job of hydra's, and in tests that compose
        node = compose(f"{group}/{name}")[package or group]
    else:
        with composing():
            node = compose(f"{group}/{name}")[package or group]
    # A copy without its root: the root's struct flag would refuse keys before `schema.build` can name them.
    copied: DictConfig = OmegaConf.create(node)
    return copied


def options(group: str) -> list[str]:
    """Returns the names of the options of a config group, also those of a user's `--config-dir` in a job of hydra's."""
    if GlobalHydra.instance().is_initialized():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Returns the config as plain values, with interpolations resolved.

    Raises:
        ConfigError: if an interpolation names no key or resolver.
    """
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = first_line(error)
        raise schema.ConfigError(
            f"{error.full_key} cannot be resolved: {reason}. Correct what is in ${{}}, or write \\${{ for a plain ${{."
        ) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that results depend on."""
    resolved = resolve(cfg)
    settings = {key: value for key, value in resolved.items() if key not in NOT_IDENTITY}
    finetune = {key: value for key, value in settings["finetune"].items() if key != "parallel"}
    return {**settings, "finetune": finetune, "evaluation": evaluation_settings(resolved)}


def run_directory(cfg: DictConfig, pipeline: "Pipeline") -> Path:
    """Returns `<results_dir>/<model>/<dataset>/<finetune>/<method>/<variant>-<hash>-seed<k>`, or `output_dir`.

    The variant is for people to read; the hash covers everything that results depend on and keeps runs apart.
    """
    if cfg.output_dir is not None:
        return path_setting(cfg, "output_dir")
    rounded = re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4g}", pipeline.method.variant())
    variant = "-".join(part for part in (rounded, content_hash(identity(cfg))[:8]) if part)
    folder = path_setting(cfg, "results_dir") / pipeline.model.name / pipeline.dataset_name / pipeline.training.mode
    return folder / pipeline.method.name / f"{variant}-seed{cfg.seed}"
