"""What a stage is, and what runs stages: a folder on disk for each result, and at most one model in memory."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gradpruner.files import content_hash, write_json
from gradpruner.pipeline.cache import StageCache

SECONDS_FILE = "seconds.json"

Key = dict[str, Any]  # JSON-ready


@dataclass(frozen=True)
class Stage:
    """One step of a run, whose result is a folder.

    Attributes:
        name: of its folder in the cache.
        key: everything that the result depends on, and nothing else.
        compute: writes the result into the folder that it is given.
        resumable: give `compute` what an interrupted call left behind, instead of an empty folder.
    """

    name: str
    key: Key
    compute: Callable[[Path], None]
    resumable: bool = False

    @property
    def id(self) -> str:
        """Hash of the key."""
        return content_hash(self.key)


@dataclass(frozen=True, kw_only=True)
class ModelStage(Stage):
    """A stage whose result is a model.

    Attributes:
        load: makes the model from the stage's folder.
        is_final: no later stage starts from the model, so it is not held once it was used.
    """

    load: Callable[[Path], PreTrainedModel]
    is_final: bool = False


class StageRunner:
    """Computes the stages that the cache lacks, and holds at most one model for the stages that start from it.

    Args:
        cache: of finished stages.
    """

    def __init__(self, cache: StageCache) -> None:
        self._cache = cache
        self._folders: dict[tuple[str, str], Path] = {}
        self._held: tuple[str, PreTrainedModel] | None = None  # by the id of its stage

    def is_cached(self, stage: Stage) -> bool:
        """Whether the cache holds the stage, whole."""
        return self._cache.find(stage.name, stage.key) is not None

    def folder(self, stage: Stage) -> Path:
        """The folder of the stage's result; computes it unless it is cached."""

        def timed(directory: Path) -> None:
            start = time.perf_counter()
            stage.compute(directory)
            write_json(directory / SECONDS_FILE, time.perf_counter() - start)

        place = (stage.name, stage.id)
        if place not in self._folders:  # once a run: looking an entry up verifies its checksums
            self._folders[place] = self._cache.get(stage.name, stage.key, timed, stage.resumable)
        return self._folders[place]

    def seconds(self, stage: Stage) -> float:
        """Wall time of the stage when it was computed."""
        return float(json.loads((self.folder(stage) / SECONDS_FILE).read_text()))

    def model(self, stage: ModelStage) -> PreTrainedModel:
        """The stage's model. It stays held unless it is final, so do not change it."""
        folder = self.folder(stage)
        if self._held is None or self._held[0] != stage.id:
            self.hold(stage.key, stage.load(folder))  # which takes the model that is held, if it starts from that
        assert self._held is not None
        _, model = self._held
        if stage.is_final:
            self.release()
        return model

    def take(self, stage: ModelStage) -> PreTrainedModel:
        """The stage's model, to be changed: it is not held any more."""
        model = self.model(stage)
        self.release()
        return model

    def hold(self, key: Key, model: PreTrainedModel) -> None:
        """Holds the model of the stage with this key in place of the one that is held."""
        self._held = content_hash(key), model

    def release(self) -> None:
        """Holds no model any more."""
        self._held = None
