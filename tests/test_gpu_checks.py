"""The rehearsal of `make test-gpu` on a CPU, and what it says where it cannot run or a check fails."""

import importlib.util
import subprocess

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import common, evaluation, pruning, ratios, training
from experiments.records import read_records
from experiments.report import PAPER, runs_of
from gradpruner import runtime
from gradpruner.models.memory import MemoryEstimate
from gradpruner.reporting.efficiency import efficiency_tables
from gradpruner.reporting.published import load_published

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")


def test_the_rehearsal_passes_and_its_records_make_table_2(in_process, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--records", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(": ")[0].split(maxsplit=1)[1].removeprefix("checked ") for line in lines if "]" in line}
    assert found == {
        *("importance", "merge and repair", "evaluation", "device_map", "precision", "memory", "tests", "ratios")
    }
    assert not [line for line in lines if line.startswith("FAILED")]
    assert any("flash_attn is not installed" in line for line in lines)
    assert any("the importance run refuses the spread model" in line for line in lines)
    records, problems = read_records(tmp_path)
    assert not problems
    tables = efficiency_tables(list(records.values()), load_published(PAPER, "table2"))
    assert [len(table.rows) for table in tables] == [2, 2]  # full and LoRA; dense and GradPruner
    for table in tables:
        cells = dict(zip(table.headers, table.rows[1], strict=False))
        assert cells["method"] == "GradPruner" and cells["train time % ↓"] == "-"
        assert all(float(cells[f"{name} % ↓"]) > 0 for name in ("train step", "train memory", "prefill", "decode"))
        assert any("timings of random weights alone (`make test-gpu`)" in note for note in table.notes)
    text = "".join(path.read_text() for path in records)
    assert str(tmp_path) not in text and "/work" not in text
    assert {record.config["finetune"]["precision"] for record in records.values()} == {"auto", "float32"}
    with pytest.raises(ValueError, match=r"need runs, got records of timings alone .*Set table=2, .* or runs_dir"):
        runs_of(records.values())


@pytest.mark.parametrize(
    ("device", "change", "match"),
    [
        ("cuda", None, r"needs a CUDA device, got none \(torch \S+, built .*\)\. Run it on a machine with .*rehearses"),
        ("cpu", "cuda", r"rehearses without a GPU, got Pretended 9000, .*Hide it with CUDA_VISIBLE_DEVICES= .*cuda\."),
        ("cuda", "lacking", r"need the packages torch, .*, got an environment without datasets, peft\. Install them,"),
    ],
)
def test_where_nothing_can_be_checked(device, change, match, monkeypatch, capsys):
    if change == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended 9000")
    if change == "lacking":
        monkeypatch.setattr(gpu, "NEEDED", ("torch", "datasets", "peft"))
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name == "torch" else None)
    assert gpu.main(["--device", device]) == 2
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(capsys.readouterr().err.replace("\n", " "))


def test_a_check_that_raises_is_a_failed_one(monkeypatch, capsys, tmp_path):
    def broken(scale, folder):
        yield common.judged(True, "so far")
        raise RuntimeError("no kernel image")

    names = {
        pruning: ("check_importance", "check_merge_and_repair", "check_device_map"),
        evaluation: ("check_evaluation",),
        training: ("check_precision", "check_memory"),
    }
    for module, checks in names.items():
        for name in checks:
            monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(ratios, "check_ratios", lambda scale, records, deadline: iter(()))
    assert gpu.main(["--device", "cpu", "--records", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out.count("so far") == output.out.count("FAILED      ") == 6
    assert "importance: RuntimeError: no kernel image" in output.out and "Traceback" in output.err


@pytest.mark.parametrize(
    ("decrease", "changed", "status"),
    [(1.019, 1.0, "ok"), (0.981, 1.0, "ok"), (1.021, 1.0, "FAILED"), (0.2, 1.0, "FAILED"), (1.0, 0.9, "FAILED")],
)
def test_bounds_of_low_precision(decrease, changed, status, monkeypatch, tmp_path):
    def train(scale, rows, precision, folder):
        weights = torch.arange(1000) < 1000 * (changed if precision == "bf16_mixed" else 1.0)
        return (decrease if precision == "bf16_mixed" else 1.0), weights

    monkeypatch.setattr(training, "_train", train)
    found = list(training.check_precision(common.REHEARSAL, tmp_path))
    assert [finding.status for finding in found] == ["ok", status]


@pytest.mark.parametrize(("measured", "status"), [(100, "ok"), (92, "ok"), (90, "FAILED"), (112, "FAILED")])
def test_bounds_of_memory(measured, status, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "finetune", lambda *args, **kwargs: None)
    monkeypatch.setattr(training, "_peak_bytes", lambda *args: measured)
    monkeypatch.setattr(training, "estimate_training_memory", lambda *args, **kwargs: MemoryEstimate(100, 0, 0, 0, 0))
    assert {finding.status for finding in training.check_memory(common.REHEARSAL, tmp_path)} == {status}


@pytest.mark.parametrize(("ratio", "status"), [(0.6, "ok"), (0.8, "FAILED")])
def test_bounds_of_the_ratios_and_what_is_left_out(ratio, status, monkeypatch, tmp_path):
    phase = {"median_seconds": 1.0, "peak_memory_bytes": 1}

    def compare(dense, own, workload, roles):
        phases = ("train",) if roles == ("train",) else ("prefill", "decode")
        timed = dict.fromkeys(phases, phase)
        ratios_ = {name: {"time": ratio, "memory": 0.6} for name in phases}
        return {"workload": {"mode": workload.mode}, "dense": timed, "own": timed, "ratios": ratios_}

    monkeypatch.setattr(ratios, "compare", compare)
    small = common.REHEARSAL
    scale = common.replace(small, max_ratio=common.ON_GPU.max_ratio, full_precision="bf16_stochastic")
    found = list(ratios.check_ratios(scale, tmp_path, deadline=0.0))
    assert [finding.status for finding in found] == [status] * 3 + ["not checked"]
    assert found[-1].text == "full fine-tuning with bf16_stochastic: less than 240 s are left"
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert list(ratios.check_ratios(scale, tmp_path, 0.0))[-1].text.endswith("torchao is not installed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"random-llama-0.00022B-lora-{method}" for method in ("dense", "gradpruner")
    ]


def test_the_8b_model_is_the_papers():
    scale = common.ON_GPU
    dense, pruned = ratios._shapes(scale)
    assert (len(dense.layers), len(pruned.layers), scale.timed().hidden_size) == (32, 19, 4096)


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (1, "FAILED"), (5, "FAILED")])
def test_marked_tests_are_run_by_file(code, status, monkeypatch, tmp_path, capsys):
    called = []

    def run(command, **settings):
        called.extend(command)
        return subprocess.CompletedProcess(command, code, "...\n3 passed\n", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr("gradpruner.runtime.default_device", lambda: torch.device("cuda"))
    [finding] = gpu.check_marked_tests(common.ON_GPU, tmp_path)
    assert (finding.status, finding.text) == (status, "pytest -m gpu: 3 passed")
    files = {name.rsplit("/", 1)[-1] for name in called if name.endswith(".py")}
    assert {"test_devices.py", "test_loading.py"} <= files and "test_report.py" not in files


def test_a_spread_model_may_be_measured_instead_of_refused(monkeypatch, tmp_path):
    """Another error than the refusal must not pass for one."""

    def measure(self, model, batches, directory):
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("something else")

    monkeypatch.setattr(pruning.GradPruner, "measure", measure)
    *_, last = pruning.check_device_map(common.REHEARSAL, tmp_path)
    assert last.status == "FAILED" and "something else" in last.text


def test_packages_that_are_not_installed_are_left_out_of_the_environment(monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGES", ("torch", "no-such-package"))
    assert list(runtime.environment()["packages"]) == ["torch"]


def test_rows_of_the_memory_check_have_padding():
    lengths = [len(row.input_ids) for row in common.random_rows({"vocab_size": 50}, 12, 20, 4)]
    assert max(lengths) == 20 and 17 <= min(lengths) < 20
