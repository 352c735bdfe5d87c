"""What a sweep shows of its cells: costs in a dry run, a comparison at the end, labels in joblib's output."""

import io
import shutil

import pytest
from commands import call

from experiments import run
from experiments.config import CONF
from experiments.sweep import _Labelled
from experiments.sweep_tables import Costs, Work, comparison_of, costs_table
from gradpruner.models.spec import ModelSpec
from gradpruner.record import RECORD_FILE

GIB = 2**30


def cell(steps, memory, **work):
    return Costs(18, 92_000_000, steps, memory * GIB, {name: Work(*each) for name, each in work.items()})


def test_costs_count_shared_stages_once():
    measured, tuned = ("m", 3600.0, GIB, False), ("a", 7200.0, 2 * GIB, False)
    done = ("b", 7200.0, 2 * GIB, True)
    cells = {"#0 seed=0": cell(10, 2, measure=measured, finetune=tuned), "#1": cell(20, 3, measure=measured, tune=done)}
    table = costs_table(cells)
    assert table.headers == ["cell", "layers", "params", "steps", "hours", "memory GiB", "disk GiB", "cached"]
    assert table.rows == [
        ["#0 seed=0", "18", "92.0 M", "10", "3.00", "2.00", "3.00", "none"],
        ["#1", "18", "92.0 M", "20", "1.00", "3.00", "1.00", "tune"],
        ["2 cells", "", "", "30", "3.00", "3.00", "3.00", "1 of 3 stages"],
    ]


def test_a_dry_run_of_a_sweep_is_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    arguments = ("-m", "debug=smoke", "method=last,igia_only", "sparsity=0.4", "dry_run=true")
    done = call(run.main, *arguments, f"cache_dir={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.returncode == 0 and done.stdout.count("dry run") == 1 and "Answer:" not in done.stderr
    rows = {
        cells[1].strip(): [each.strip() for each in cells[2:-1]]
        for line in done.stdout.splitlines()
        if len(cells := line.split("│")) > 2
    }
    assert list(rows) == ["#0 method=last", "#1 method=igia_only", "2 cells"]
    assert rows["#0 method=last"][:3] == ["4", "45.4 k", "2"] and rows["2 cells"][-1] == "0 of 10 stages"


def test_finished_cells_are_compared(tmp_path):
    for name in ("dense", "last", "random"):
        (tmp_path / name).mkdir()
        shutil.copy(CONF.parent / f"results/records/depth/{name}.json", tmp_path / name / RECORD_FILE)
    (tmp_path / "missing").mkdir()
    [table] = comparison_of([tmp_path / name for name in ("dense", "last", "dense", "random", "missing")])
    assert [row[0] for row in table.rows] == ["Dense", "Last but the final one", "Random"]
    assert comparison_of([tmp_path / "last"]) == []


def test_every_line_of_a_labelled_stream_has_the_label():
    stream = io.StringIO()
    labelled = _Labelled(stream, "[#1 a] ")
    for text in ("", "one", " line\n", "\rhalf", "\rwhole\n\n", "last"):
        labelled.write(text)
    assert stream.getvalue() == "[#1 a] one line\n\r[#1 a] half\r[#1 a] whole\n\n[#1 a] last"
