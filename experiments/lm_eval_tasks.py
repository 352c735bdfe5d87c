"""Write a dataset's test rows and templates as a task of lm-evaluation-harness.

python -m experiments.lm_eval_tasks dataset=arc_easy output=lm_eval_tasks
lm_eval run --model hf --model_args pretrained=CHECKPOINT --include_path lm_eval_tasks --tasks gradpruner_arc_easy
"""

import shlex
import sys
from pathlib import Path

import hydra
import pyarrow
import pyarrow.parquet
import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig

from experiments.command_line import run_command
from experiments.config import CONF, build_tasks, resolve
from experiments.paths import check_writable, path_setting
from gradpruner.files import write_text
from gradpruner.tasks.lm_eval import CHOICES, LABEL, HarnessTask, harness_task


def main() -> None:
    """Runs the command."""
    run_command(hydra_job, "lm_eval_tasks", "experiments.lm_eval_tasks")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="lm_eval_tasks")
def hydra_job(cfg: DictConfig) -> None:
    """Writes the task, and prints the command that runs it."""
    try:
        resolve(cfg)
        folder = path_setting(cfg, "output")
        check_writable(output=folder)
        task, test_task = build_tasks(cfg)
        made = harness_task(test_task or task, cfg.seed)
        file = write_task(made, folder)
    except (ValueError, OSError) as error:
        print(f"\nError: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"Written: {file}, with {len(made.rows)} rows. In an environment with lm_eval[hf]:")
    print(
        "lm_eval run --model hf --model_args pretrained=CHECKPOINT,dtype=float32 "
        f"--include_path {shlex.quote(str(folder))} --tasks {made.name}"
    )


def write_task(task: HarnessTask, folder: Path) -> Path:
    """Writes a task's YAML and its rows beside it; returns the YAML's path.

    The rows are Parquet, whose types are explicit: readers of JSON take a column of dates for times. The YAML has their
    absolute path, because the harness reads a relative one from where it is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (folder / f"{task.name}.parquet").absolute()
    types = {CHOICES: pyarrow.list_(pyarrow.string()), LABEL: pyarrow.int64()}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in task.rows[0]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(task.rows, schema), rows)
    source = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    file = folder / f"{task.name}.yaml"
    write_text(file, yaml.safe_dump({**task.settings, **source}, sort_keys=False, allow_unicode=True, width=1000))
    return file


if __name__ == "__main__":
    main()
