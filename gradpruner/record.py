"""RunRecord: what one run did and measured, as `record.json`.

Each section of the record is a `TypedDict`, so mypy checks the keys that tables and figures read. Counts start with
`num_`; times end in `_seconds`, memory in `_bytes`; layers are 0-based positions in the dense model.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gradpruner.files import write_json
from gradpruner.record_sections import (
    ContentSection,
    EfficiencySection,
    EnvironmentSection,
    Metrics,
    ModelSection,
    PruningSection,
    TrainingSection,
    empty_section,
    metric_stderr,
    metric_value,
)

SCHEMA_VERSION = 3  # 3: shapes, recovery
RECORD_FILE = "record.json"
CONFIG_FILE = "config.yaml"  # beside it: the whole config
# Config keys that results do not depend on: they may differ between runs of one identity. `sparsity` and `merge_count`
# are here because a method's own settings repeat the values that it uses.
NOT_IDENTITY = (
    *("sparsity", "merge_count", "tracker", "reference", "dry_run", "rerun", "save_checkpoint", "measure_speed"),
    *("push_to_hub", "results_dir", "output_dir", "cache_dir", "num_processes"),
)
# Ends of the names of settings that hold paths.
PATH_SETTINGS = ("path", "_file", "_dir", "_python")
KEPT_PARTS = 2  # of an absolute path
# Settings of the evaluation that older records lack, with the value that those runs had.
LATER_EVALUATION = {"engine": "transformers", "vllm_dtype": "auto"}
SECTIONS: dict[str, Any] = {  # those that every finished run has
    "model": ModelSection,
    "pruning": PruningSection,
    "finetune": TrainingSection,
    "efficiency": EfficiencySection,
    "environment": EnvironmentSection,
}
OF_TRAINING = ("finetune", "efficiency")
MAY_LACK = ("content", "stage_ids", "row_scores")  # sections that failed runs and older records lack


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without folders of the machine: of absolute paths the last two parts remain.

    `CONFIG_FILE` has them whole.
    """

    def part(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return portable(value)
        if isinstance(value, str) and key.endswith(PATH_SETTINGS) and Path(value).is_absolute():
            return "/".join(Path(value).parts[1:][-KEPT_PARTS:])
        return value

    return {key: part(key, value) for key, value in config.items()}


@dataclass(frozen=True)
class RunRecord:
    """One run.

    All sections of a failed run are `{}`, so check `status` before reading one. In a finished run, `metrics_before`,
    `pruning["recovery"]` and `efficiency["speed"]` are `{}` where the run did not have that stage. `make test-gpu`
    writes timings alone: `finetune` and `metrics` are `{}` and `efficiency` has only ratios and `speed`.

    Attributes:
        status: `finished` or `failed`.
        config: the resolved config.
        identity: hash of the part of the config that results depend on.
        seed: the run's seed.
        model: the dense model.
        pruning: the pruned model, what the method reported, and the recovery.
        finetune: the fine-tune.
        metrics: of the fine-tuned model.
        metrics_before: of the compressed model before fine-tuning.
        efficiency: ratios to the dense model, time and memory.
        environment: versions, hardware, commit.
        content: weights and data that the run was made from. Failed runs and older records lack it.
        stage_ids: hash of the key of each stage, code and versions included. Failed runs and older records lack it.
        row_scores: score of each test row by metric, as text, see `reporting.row_scores`: runs on the same rows are
            compared row by row. Failed runs and older records lack it.
        error: what stopped a failed run.
        path: file that the record was read from; not part of it.
    """

    status: str
    config: dict[str, Any]
    identity: str
    seed: int
    model: ModelSection = field(default_factory=empty_section)
    pruning: PruningSection = field(default_factory=empty_section)
    finetune: TrainingSection = field(default_factory=empty_section)
    metrics: Metrics = field(default_factory=empty_section)
    metrics_before: Metrics = field(default_factory=empty_section)
    efficiency: EfficiencySection = field(default_factory=empty_section)
    environment: EnvironmentSection = field(default_factory=empty_section)
    content: ContentSection = field(default_factory=empty_section)
    stage_ids: dict[str, str] = field(default_factory=dict)
    row_scores: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    schema_version: int = SCHEMA_VERSION
    path: Path | None = field(default=None, compare=False)

    def metric(self, name: str) -> float | None:
        """Returns the metric `name` of the fine-tuned model, or None if it was not measured."""
        return metric_value(self.metrics, name)

    def stderr(self, name: str) -> float:
        """Returns the standard error of the metric `name` of the fine-tuned model.

        Raises:
            KeyError: if `name` was not measured.
        """
        return metric_stderr(self.metrics, name)

    def save(self, run_dir: Path) -> None:
        """Writes `record.json` atomically."""
        write_json(run_dir / RECORD_FILE, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready form, without those of `MAY_LACK` that are empty."""
        data = dataclasses.asdict(dataclasses.replace(self, path=None))
        del data["path"]
        return {key: value for key, value in data.items() if value or key not in MAY_LACK}

    @classmethod
    def load(cls, run_dir: Path) -> Self | None:
        """Reads `record.json`, or returns None if there is none.

        Raises:
            ValueError: if it was written by another version or is damaged.
        """
        path = run_dir / RECORD_FILE
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Cannot read {path}: {error}. Delete it to run again.") from error
        return cls.from_dict(data, path)

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Self:
        """Reads what `save` wrote to `path`.

        Raises:
            ValueError: if it was written by another version, or is not a whole record.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"Cannot read {path}: schema version {version!r}, this release reads {SCHEMA_VERSION}. Delete it to "
                "run again."
            )
        known = {each.name for each in dataclasses.fields(cls)} - {"path"}
        wrong = sorted(data.keys() - known) + [
            name for name in _needed_keys(data) if not _has_key(data, name.split("."))
        ]
        if wrong:
            raise ValueError(
                f"Cannot read {path}: it must be a record as a run wrote it, got one with missing or unknown keys "
                f"({', '.join(wrong)}). Delete it to run again."
            )
        return cls(**data, path=path)


def evaluation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluation settings of a config that results depend on.

    Settings that older records lack are left out where they have the value that those runs had.
    """
    return {
        key: value
        for key, value in config["evaluation"].items()
        if key != "vllm_python" and (key, value) not in LATER_EVALUATION.items()
    }


def _needed_keys(data: dict[str, Any]) -> list[str]:
    """Returns the keys that a record must have, those of a finished run's sections with dots."""
    needed = ["status", "config", "identity", "seed"]
    if data.get("status") == "finished":
        needed += ["metrics", "config.model", "config.dataset", "config.method", "config.finetune"]
        # Timings alone (`make test-gpu`) come without a fine-tune, hence without its metrics and cost.
        is_timing = data.get("finetune") == {} == data.get("metrics") and _has_key(data, ["efficiency", "speed"])
        sections = {name: section for name, section in SECTIONS.items() if not is_timing or name not in OF_TRAINING}
        needed += [f"{name}.{key}" for name, section in sections.items() for key in sorted(section.__required_keys__)]
    return needed


def _has_key(data: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True
