"""Datasets as their YAML files in conf/dataset/ configure them."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.config import load_option
from gradpruner import tasks
from gradpruner.tasks import Example, Task

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared/data"  # rows of the Hub's datasets; exists on some machines only
OF_THE_PIPELINE = ("test", "test_settings")  # in the YAML, but not fields of the class
CLASSES: dict[str, type[Task]] = {
    cls.__module__.rpartition(".")[2]: cls
    for cls in map(tasks.__dict__.__getitem__, tasks.__all__)
    if isinstance(cls, type) and issubclass(cls, Task) and cls is not Task
}


def settings_of(name: str) -> dict[str, Any]:
    settings = OmegaConf.to_container(load_option("dataset", name))
    assert isinstance(settings, dict)
    return settings


def build(name: str, cls: type[Task] | None = None, **changes: Any) -> Task:
    settings = {key: value for key, value in settings_of(name).items() if key not in OF_THE_PIPELINE}
    target = settings.pop("_target_")
    assert target == f"{CLASSES[name].__module__}.{CLASSES[name].__name__}"
    # What depends on the rest of a run's config is the class's default here, as it is in a run by default.
    settings = {key: value for key, value in settings.items() if not str(value).startswith("${")}
    return (cls or CLASSES[name])(**(settings | changes))


def without_ids(examples: list[Example]) -> list[tuple[Any, ...]]:
    return [(example.prompt, example.answer, example.choices, example.label) for example in examples]
