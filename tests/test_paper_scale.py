"""The estimates behind docs/paper-scale.md."""

import pytest

from experiments import paper_scale
from experiments.config import CONF
from experiments.paper_scale import DATA, cells, training_hours
from gradpruner.tasks.published_sizes import PublishedSize

LLAMA = "meta-llama/Llama-3.1-8B"


def test_cells_are_those_of_the_preset():
    own = cells("table3")
    assert len(own) == 8 * 3 * 3  # datasets, methods, merge counts
    assert {cell["model"] for cell in own} == {"llama3_1_8b"}
    assert not [cell for cell in cells("table1") if cell["method"] == "apt" and cell["finetune"] == "full"]
    assert {cell["dataset"] for cell in own} <= set(DATA)


def test_hours_are_operations_over_speed():
    # 6 FLOPs per parameter and token for full fine-tuning, 2 more for recomputation, over 8 B parameters less the
    # embedding, which does no arithmetic; attention adds a little at 128 tokens.
    data = PublishedSize(1000, 0, 0, 128, 127, 128, 127)
    tokens = 3 * 1000 * 128
    expected = 8 * 7.5e9 * tokens / (989e12 * 0.4) / 3600
    assert training_hours(LLAMA, data, "full", False) == pytest.approx(expected, rel=0.05)
    pruned = training_hours(LLAMA, data, "full", True) / training_hours(LLAMA, data, "full", False)
    assert pruned == pytest.approx(19 / 32, abs=0.05)


@pytest.mark.slow
def test_the_page_has_these_numbers():
    page = (CONF.parent / "docs/paper-scale.md").read_text()
    assert paper_scale.hours_table() in page and paper_scale.memory_table() in page
