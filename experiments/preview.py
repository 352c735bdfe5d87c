"""Show rendered training examples, and which of their tokens have a loss.

    gradpruner preview --config my.yaml --rows 5

Takes the arguments of `experiments.run`. Reads data and tokenizer, and no weights.
"""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from experiments import schema
from experiments.cli import command_of
from experiments.command_line import run_command
from experiments.config import CONF, build_pipeline, resolve

if TYPE_CHECKING:
    from gradpruner.pipeline.run import Pipeline

NUM_ROWS = 3


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=" ".join(command_of("experiments.preview")), add_help=False, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    own, arguments = parser.parse_known_args()
    if own.rows < 1:
        parser.error(f"argument --rows: must be 1 or more, got {own.rows}. Leave it out for {NUM_ROWS}.")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def hydra_job(cfg: DictConfig) -> None:
        try:
            preview(cfg, own.rows)
        except (ValueError, OSError) as error:
            print(f"\nError: {error}", file=sys.stderr)
            raise SystemExit(1) from error

    sys.argv[1:] = [*arguments, "hydra.mode=RUN"]  # a preset of a table says MULTIRUN
    run_command(hydra_job, "config", "experiments.preview")


def preview(cfg: DictConfig, num_rows: int) -> None:
    """Prints the first training rows of a run.

    Raises:
        ValueError: if config or data cannot be read.
    """
    from gradpruner.models import offline_configs
    from gradpruner.runtime import quiet_libraries

    quiet_libraries()
    schema.check_root(cfg)
    resolve(cfg)
    pipeline = build_pipeline(cfg)
    pipeline = dataclasses.replace(pipeline, model=offline_configs.for_dry_run(pipeline.model, pipeline.assets_dir))
    console = Console()
    for index in range(min(num_rows, len(pipeline.rows))):
        show_example(pipeline, console, index)


def show_example(pipeline: "Pipeline", console: Console | None = None, index: int = 0) -> None:
    """Prints a training example as the model sees it: the prompt dim, each token with loss bold in brackets."""
    row, tokenizer = pipeline.rows[index], pipeline.tokenizer
    num_prompt = len(row.input_ids) - row.num_answer_tokens
    text = Text(tokenizer.decode(row.input_ids[:num_prompt]), style="dim")
    without_loss = {place for start, end in row.gaps for place in range(start, end)}
    for place, token in enumerate(row.input_ids[num_prompt:], start=num_prompt):
        if place in without_loss:
            text.append(tokenizer.decode([token]), style="dim")
            continue
        text.append("[", style="green").append(tokenizer.decode([token]), style="bold").append("]", style="green")
    num_loss = row.num_answer_tokens - len(without_loss)
    counts = f"{len(pipeline.train_examples)} train, {len(pipeline.test_examples)} test rows"
    which = "first" if index == 0 else f"row {index + 1}"
    (console or Console(stderr=True)).print(
        Panel(
            text,
            title=f"{pipeline.task.name}: {which} of {counts}",
            subtitle=f"{len(row.input_ids) - num_loss} prompt tokens, {num_loss} \\[tokens] with loss",
        )
    )


if __name__ == "__main__":
    main()
