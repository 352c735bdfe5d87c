"""The cost of Table 1 in docs/scale-out.md: shared stages count once, and the page has the numbers."""

import pytest

from experiments import paper_scale, scale_out
from experiments.config import CONF
from experiments.scale_out import answer_hours, cell_work, table_1

LLAMA = "meta-llama/Llama-3.1-8B"


def work(method, mode, dataset="piqa"):
    cell = {"model": "llama3_1_8b", "dataset": dataset, "finetune": mode, "method": method}
    return {each.stage: each for each in cell_work(cell)}


def test_what_cells_share():
    full, lora, other = (
        work("minitron", mode, name) for mode, name in (("full", "piqa"), ("lora", "piqa"), ("full", "fingpt"))
    )
    shared = {stage for stage in full if full[stage].key == lora[stage].key}
    assert shared == {"measure", "recover", "before"}  # not the fine-tune, nor its answers
    assert not [stage for stage in full if full[stage].key == other[stage].key]
    assert set(work("dense", "full")) == {"finetune", "predict", "before"}
    keys = {work(method, "full")["measure"].key for method in ("gradpruner", "laco", "llm_pruner")}
    assert len(keys) == 3


def test_hours_of_distillation_are_operations_over_speed():
    # Teacher forward 2 FLOPs per parameter and token, student (0.6 of it) 6 and 2 more for recomputation.
    tokens = 52_002 * 118.4
    expected = (2 + 0.6 * 8) * 7.5e9 * tokens / (989e12 * 0.4) / 3600
    assert work("minitron", "full")["recover"].hours == pytest.approx(expected, rel=0.1)


def test_hours_of_answers_are_bytes_over_bandwidth():
    data = paper_scale.DATA["piqa"]
    steps = 100 / 16 * 512  # 7 batches, the last one not full
    expected = steps * 16.06e9 / (3.35e12 * 0.2) / 3600
    assert answer_hours(LLAMA, False, data, 100, 512) == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_the_page_has_these_numbers():
    page = (CONF.parent / "docs/scale-out.md").read_text()
    for table in (scale_out.stage_table(), scale_out.group_table(), scale_out.wall_clock()):
        assert table in page, table
    assert len(table_1()) == 256
    finetunes = sum(each.hours for _, works in table_1() for each in works if each.stage == "finetune")
    assert f"| table1 | 256 | {finetunes:.0f} |" in (CONF.parent / "docs/paper-scale.md").read_text()
