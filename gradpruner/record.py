"""RunRecord: what one finished run says, as `record.json`."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gradpruner.files import write_json

SCHEMA_VERSION = 3  # 3: shapes, recovery
RECORD_FILE = "record.json"
# Keys of the config that results do not depend on: they may differ between runs of one identity. Methods have what they
# use of sparsity and merge_count in settings of their own.
NOT_IDENTITY = (
    *("sparsity", "merge_count", "tracker", "reference", "dry_run", "save_checkpoint", "measure_speed"),
    *("results_dir", "output_dir", "cache_dir"),
)


@dataclass(frozen=True)
class RunRecord:
    """One run. Counts start with `num_`; times end in `_seconds`, memory in `_bytes`; layers are 0-based.

    Attributes:
        status: `finished` or `failed`.
        config: the resolved config.
        identity: hash of the part of the config that results depend on.
        seed: the run's seed.
        model: `name`, `num_hidden_layers`, `num_parameters`, `shape` of the dense model.
        pruning: `pruned_layers`, `absorbed_by`, `layer_importance`; `num_hidden_layers`, `num_parameters` and `shape`
            after pruning; what the method reported, and the account of training between pruning and the fine-tune.
        finetune: `steps`, `tokens`, `train_seconds`, `peak_memory_bytes`, `loss`.
        metrics: of the fine-tuned model, see `evaluate.metrics`.
        metrics_before: of the compressed model before fine-tuning; empty when not asked for.
        efficiency: ratios to the dense model, seconds per stage, time and memory of compression; memory of the process
            before the run; `speed`: prefill and decoding of the dense model and this one, timed in turns.
        environment: versions, hardware, commit.
        error: what stopped a failed run.
    """

    status: str
    config: dict[str, Any]
    identity: str
    seed: int
    model: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    metrics_before: dict[str, Any] = field(default_factory=dict)
    efficiency: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    schema_version: int = SCHEMA_VERSION

    def save(self, run_dir: Path) -> None:
        """Writes `record.json`, atomically."""
        write_json(run_dir / RECORD_FILE, dataclasses.asdict(self))

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
            data = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"Cannot read {path}: {error}. Delete it to run again.") from error
        return cls.from_dict(data, path)

    @classmethod
    def from_dict(cls, data: dict[str, Any], path: Path) -> Self:
        """Reads what `save` wrote to `path`.

        Raises:
            ValueError: if it was written by another version.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"Cannot read {path}: schema version {data.get('schema_version')!r}, this release reads "
                f"{SCHEMA_VERSION}. Delete it to run again."
            )
        return cls(**data)
