"""Print what the paper's tables need at the paper's scale: GPU memory, hours of training, commands.

    python -m experiments.paper_scale          # the tables of docs/paper-scale.md

Memory is that of `gradpruner.models.memory`, hours are floating-point operations over a stated speed. Nothing is
measured and nothing is loaded: configs of the models ship with the project.
"""

import dataclasses
import itertools
import math

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config import CONF
from gradpruner.models.counting import count_model
from gradpruner.models.memory import estimate_training_memory
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import ModelShape, config_shape
from gradpruner.tasks.published_sizes import SIZES, PublishedSize

FLOPS_PER_SECOND = 989e12  # bfloat16 products of an H100 SXM, dense, by its data sheet
UTILISATION = 0.4
CARD_GIB = 80 * 1e9 / 2**30
EPOCHS, MICRO_BATCH, LORA_RANK = 3, 8, 8  # of scale=paper
DENSE_METHODS = ("dense", "sat", "sat_constant")  # train all layers; small_dense is counted as pruned
HUB_IDS = {
    "llama3_1_8b": "meta-llama/Llama-3.1-8B",
    "mistral_7b_v0_3": "mistralai/Mistral-7B-v0.3",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
}


PAPER_ROWS = {"medmcqa": 40_000, "fingpt": 40_000, "winogrande": 10_234}  # where the paper draws some of all
DATA = {
    name: dataclasses.replace(size, num_train=PAPER_ROWS.get(name, size.num_train))
    for name, size in SIZES.items()
    if size.num_train and size.num_test
}


def pruned_shape(hub_id: str) -> ModelShape:
    """Returns the shape with 40 % of the layers pruned."""
    dense = config_shape(shipped_config(hub_id))
    return dataclasses.replace(dense, layers=dense.layers[round(0.4 * len(dense.layers)) :])


def memory_gib(hub_id: str, data: PublishedSize, precision: str | None, is_pruned: bool) -> float:
    """Returns the estimated peak memory of a fine-tune with the settings of scale=paper; None as precision is LoRA."""
    estimate = estimate_training_memory(
        shipped_config(hub_id),
        MICRO_BATCH,
        data.longest,
        min(data.longest_answer + 1, data.longest),
        torch.bfloat16,
        precision=precision,
        lora_rank=LORA_RANK if precision is None else None,
        recompute=True,
        accumulate=True,
        shape=pruned_shape(hub_id) if is_pruned else None,
    )
    return estimate.total / 2**30


def training_hours(hub_id: str, data: PublishedSize, mode: str, is_pruned: bool) -> float:
    """Returns the hours of one fine-tune on one H100 at the stated utilisation."""
    counts = count_model(shipped_config(hub_id), pruned_shape(hub_id) if is_pruned else None)
    rank = LORA_RANK if mode == "lora" else None
    length, positions = math.ceil(data.tokens), math.ceil(data.answer_tokens) + 1
    flops = counts.training_flops(EPOCHS * data.num_train, length, positions, rank, recompute=True)
    return flops / (FLOPS_PER_SECOND * UTILISATION) / 3600


def cells(preset: str) -> list[dict[str, str]]:
    """Returns the cells of a preset's sweep at scale=paper, without those that it excludes."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", [f"experiment={preset}", "scale=paper"], return_hydra_config=True)
    params = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in cfg.hydra.sweeper.params.items()])
    axes = {
        each.key_or_group: list(each.sweep_string_iterator())
        if each.is_sweep_override()
        else [each.get_value_element_as_str()]
        for each in params
    }
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    excluded = [{key: str(value) for key, value in each.items()} for each in cfg.hydra.callbacks.sweep.exclude]
    return [cell for cell in found if not any(each.items() <= cell.items() for each in excluded)]


def memory_table() -> str:
    """Returns memory by model and mode, on the longest rows and on PIQA's, as Markdown."""
    lines = [
        "| model | fine-tune | BillSum: dense, pruned | PIQA: dense, pruned | one 80 GB card |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    modes = {"LoRA": None, "full, `bf16_stochastic`": "bf16_stochastic", "full, `bf16_mixed`": "bf16_mixed"}
    for hub_id in HUB_IDS.values():
        for label, precision in modes.items():
            long, short = (
                [memory_gib(hub_id, DATA[name], precision, is_pruned) for is_pruned in (False, True)]
                for name in ("billsum", "piqa")
            )
            fits = {(True, True): "both", (False, True): "pruned", (False, False): "neither"}
            verdict = fits[long[0] < CARD_GIB, long[1] < CARD_GIB]
            texts = [f"{dense:.0f}, {pruned:.0f}" for dense, pruned in (long, short)]
            lines.append(f"| {hub_id.split('/')[1]} | {label} | {texts[0]} | {texts[1]} | {verdict} |")
    return "\n".join(lines)


def hours_table() -> str:
    """Returns runs, hours of fine-tuning and the command for every preset with runs, as Markdown."""
    lines = ["| preset | runs | hours of fine-tuning | command |", "| --- | ---: | ---: | --- |"]
    numbers = [f"table{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13)]
    for preset in [*numbers, *(f"figure{number}" for number in (1, 2, 5, 6, 7, 8, 9))]:
        own = cells(preset)
        hours = 0.0
        for cell in own:
            data = DATA[cell["dataset"]]
            fraction = float(cell.get("dataset.train_fraction", 1))
            data = dataclasses.replace(data, num_train=round(fraction * data.num_train))
            mode, is_pruned = cell.get("finetune", "full"), cell["method"] not in DENSE_METHODS
            hours += training_hours(HUB_IDS[cell["model"]], data, mode, is_pruned)
        command = f"`python -m experiments.run -m experiment={preset} scale=paper`"
        lines.append(f"| {preset} | {len(own)} | {hours:.0f} | {command} |")
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    print(memory_table(), hours_table(), sep="\n\n")


if __name__ == "__main__":
    main()
