"""Print what the paper's Table 1 costs in GPU hours where cells share stages.

    python -m experiments.scale_out          # the tables of docs/scale-out.md

Speeds and settings are those of `experiments.paper_scale`. A stage that several cells share is found as the pipeline
finds it, by what its result depends on, and counts once. Nothing is measured and nothing is loaded.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from hydra import compose, initialize_config_dir

from experiments.config import CONF, build_pipeline
from experiments.paper_scale import (
    DATA,
    DENSE_METHODS,
    FLOPS_PER_SECOND,
    HUB_IDS,
    LORA_RANK,
    UTILISATION,
    cells,
    pruned_shape,
    training_hours,
)
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.counting import ModelCounts, count_model
from gradpruner.models.offline_configs import shipped_config
from gradpruner.pipeline.run import Pipeline
from gradpruner.tasks.published_sizes import SIZES, PublishedSize

BYTES_PER_SECOND = 3.35e12 * 0.2  # of weights that decoding reads: a fifth of an H100 SXM's memory bandwidth
BATCH = 16  # answers at once
LONGEST_IN_BATCH = 2  # a batch decodes until its longest answer ends, about so many times the mean
UNTUNED_TOKENS = 512  # a model that was not fine-tuned writes until evaluation.max_new_tokens
ALPACA = SIZES["alpaca"]  # what MINITRON is distilled on
STAGES = {
    "measure": "importance and calibration",
    "recover": "MINITRON's distillation",
    "finetune": "fine-tune",
    "predict": "answers of the fine-tuned model",
    "before": "answers before the fine-tune",
}
GPU_COUNTS = (1, 8, 32)


@dataclass(frozen=True)
class Work:
    """A stage of a cell.

    Attributes:
        stage: one of `STAGES`.
        key: equal for cells that share the stage.
        hours: GPU hours.
    """

    stage: str
    key: tuple[str, ...]
    hours: float


@cache
def table_1() -> tuple[tuple[dict[str, str], tuple[Work, ...]], ...]:
    """Returns the cells of Table 1 at scale=paper with the work of each."""
    return tuple((cell, tuple(cell_work(cell))) for cell in cells("table1"))


def cell_work(cell: dict[str, str]) -> Iterator[Work]:
    """Yields the stages of a cell, those with next to no work left out."""
    name, mode, data = cell["method"], cell["finetune"], DATA[cell["dataset"]]
    hub_id, is_pruned = HUB_IDS[cell["model"]], name not in DENSE_METHODS
    pipeline = _pipeline(cell["model"], mode, name, cell["dataset"] if name == "apt" else "piqa")
    num_layers = shipped_config(hub_id).num_hidden_layers
    method = pipeline.method.resolve(num_layers, pipeline.training.num_steps(data.num_train))
    counts, calibration = _counts(hub_id, False), method.calibration()
    settings = json.dumps(method.measurement_settings(), sort_keys=True)
    measured: tuple[str, ...] = (cell["model"], method.measured_as.name, settings)
    if calibration is not None:
        measured = (*measured, cell["dataset"])
        rows, length = calibration.count(data.num_train), math.ceil(data.tokens)
        is_trained = isinstance(method, GradPruner)
        flops = (
            counts.training_flops(rows, length, length, LORA_RANK, True) if is_trained else counts.flops(rows, length)
        )
        yield Work("measure", measured, _hours(flops))
    untuned = (*measured, name, json.dumps(method.prune_settings(), sort_keys=True))
    if (recovery := method.recovery()) is not None:
        rows, length = round(recovery.training.epochs * ALPACA.num_train), math.ceil(ALPACA.tokens)
        flops = _counts(hub_id, is_pruned).training_flops(rows, length, length, recompute=True)
        untuned = (*untuned, "recovered")
        yield Work("recover", untuned, _hours(flops + counts.flops(rows, length)))
    tuned = (*untuned, cell["dataset"], mode)
    yield Work("finetune", tuned, training_hours(hub_id, data, mode, is_pruned))
    yield Work(
        "predict", tuned, answer_hours(hub_id, is_pruned, data, data.num_test, LONGEST_IN_BATCH * data.answer_tokens)
    )
    yield Work(
        "before", (*untuned, cell["dataset"]), answer_hours(hub_id, is_pruned, data, data.num_test, UNTUNED_TOKENS)
    )


def answer_hours(hub_id: str, is_pruned: bool, data: PublishedSize, num_rows: int, tokens: float) -> float:
    """Returns the hours in which one GPU answers the test rows, each batch with this many tokens per answer."""
    counts = _counts(hub_id, is_pruned)
    prompts = counts.flops(num_rows, math.ceil(data.tokens - data.answer_tokens), logit_positions=1)
    steps = math.ceil(num_rows / BATCH) * tokens
    return _hours(prompts) + steps * counts.checkpoint_bytes(torch.bfloat16) / BYTES_PER_SECOND / 3600


def stage_table() -> str:
    """Returns GPU hours by stage, shared and not, as Markdown."""
    lines = [
        "| stage | cells with it | made | hours if each cell made its own | hours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    all_own = all_shared = 0.0
    for stage, label in STAGES.items():
        found = [work for _, works in table_1() for work in works if work.stage == stage]
        distinct = {work.key: work.hours for work in found}
        own, shared = sum(work.hours for work in found), sum(distinct.values())
        lines.append(f"| {label} | {len(found)} | {len(distinct)} | {own:.1f} | {shared:.1f} |")
        if stage != "before":
            all_own, all_shared = all_own + own, all_shared + shared
    lines.append(
        f"| **without answers before the fine-tune** | {len(table_1())} |  | {all_own:.0f} | {all_shared:.0f} |"
    )
    return "\n".join(lines)


def group_table() -> str:
    """Returns GPU hours by model and mode, as Markdown; a shared stage is in the first group that needs it."""
    lines = ["| model | fine-tune | cells | hours | longest cell |", "| --- | --- | ---: | ---: | ---: |"]
    made: set[tuple[str, tuple[str, ...]]] = set()
    for model in dict.fromkeys(cell["model"] for cell, _ in table_1()):
        for mode in ("full", "lora"):
            group = [works for cell, works in table_1() if (cell["model"], cell["finetune"]) == (model, mode)]
            hours = longest = 0.0
            for works in group:
                needed = [work for work in works if work.stage != "before"]
                hours += sum(work.hours for work in needed if (work.stage, work.key) not in made)
                made |= {(work.stage, work.key) for work in needed}
                longest = max(longest, sum(work.hours for work in needed))
            name = HUB_IDS[model].split("/")[1]
            lines.append(f"| {name} | {mode} | {len(group)} | {hours:.0f} | {longest:.1f} |")
    return "\n".join(lines)


def wall_clock() -> str:
    """Returns wall-clock hours by number of GPUs, as Markdown: at least a GPU's share, and the longest cell."""
    needed = [work for _, works in table_1() for work in works if work.stage != "before"]
    total = sum({(work.stage, work.key): work.hours for work in needed}.values())
    longest = max(sum(work.hours for work in works if work.stage != "before") for _, works in table_1())
    lines = ["| GPUs | hours at least |", "| ---: | ---: |"]
    lines += [f"| {count} | {max(total / count, longest):.1f} |" for count in GPU_COUNTS]
    return "\n".join(lines)


@cache
def _pipeline(model: str, mode: str, method: str, dataset: str) -> Pipeline:
    """Returns the pipeline of such cells; APT alone has settings that depend on the dataset."""
    overrides = ["experiment=table1", "scale=paper", f"model={model}", f"finetune={mode}", f"method={method}"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return build_pipeline(compose("config", [*overrides, f"dataset={dataset}", "evaluation=paper"]))


@cache
def _counts(hub_id: str, is_pruned: bool) -> ModelCounts:
    return count_model(shipped_config(hub_id), pruned_shape(hub_id) if is_pruned else None)


def _hours(flops: float) -> float:
    return flops / (FLOPS_PER_SECOND * UTILISATION) / 3600


def main() -> None:
    """Prints the tables."""
    print(stage_table(), group_table(), wall_clock(), sep="\n\n")


if __name__ == "__main__":
    main()
