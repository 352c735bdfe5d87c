"""What a stage is, and what runs stages: a folder on disk for each result, and at most one model in memory."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gradpruner import processes, progress
from gradpruner.files import content_hash, write_json
from gradpruner.pipeline.cache import StageCache
from gradpruner.runtime import default_device

SECONDS_FILE = "seconds.json"
LIBRARIES = ("torch", "transformers", "peft")

Key = dict[str, Any]  # JSON-ready


@dataclass(frozen=True)
class Stage:
    """One step of a run, whose result is a folder.

    Attributes:
        name: of its folder in the cache.
        key: everything that the result depends on, and nothing else.
        compute: writes the result into the folder that it is given.
        resumable: give `compute` what an interrupted call left behind, instead of an empty folder.
        together: with several processes, all of them compute; otherwise rank 0 does, and the others wait.
        needs: stages whose folders `compute` asks for; they are made beforehand, and their time is not its own.
    """

    name: str
    key: Key
    compute: Callable[[Path], None]
    resumable: bool = False
    together: bool = False
    needs: "tuple[Stage, ...]" = ()

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

    Of several processes, rank 0 alone goes through the cache and tells the others what it found. All of them ask for
    the same stages in the same order.

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

        def compute(directory: Path) -> None:
            processes.broadcast(str(directory))  # which tells the others to compute, too
            for need in stage.needs:  # before the clock starts
                self.folder(need)
            progress.stage_begins(stage.name, stage.id)
            start = time.perf_counter()
            stage.compute(directory)
            seconds.append(time.perf_counter() - start)
            write_json(directory / SECONDS_FILE, seconds[0])
            processes.wait_for_all()

        seconds: list[float] = []  # none if the stage is cached
        place = (stage.name, stage.id)
        if place in self._folders:  # once a run: looking an entry up verifies its checksums
            return self._folders[place]
        if processes.is_main():
            folder = self._cache.get(stage.name, stage.key, compute, stage.resumable)
            self._folders[place] = Path(processes.broadcast(str(folder)))
            progress.stage_ends(stage.name, stage.id, seconds[0] if seconds else None)
        else:
            self._folders[place] = self._followed(stage)
        return self._folders[place]

    def _followed(self, stage: Stage) -> Path:
        """Returns the folder of a stage that rank 0 goes through; takes part if all processes compute it."""
        entry = self._cache.path(stage.name, stage.key)
        told = Path(processes.broadcast(str(entry)))
        if told == entry:
            return entry  # it was cached
        for need in stage.needs:
            self.folder(need)
        if stage.together:
            stage.compute(told)
        processes.wait_for_all()
        return Path(processes.broadcast(str(entry)))

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


def libraries() -> dict[str, str]:
    """Versions of what the arithmetic is done with, and the kind of device."""
    return {"device": default_device().type, **{name: metadata.version(name) for name in LIBRARIES}}
