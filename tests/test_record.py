"""Every committed record has the keys and types that `gradpruner.record` declares."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from gradpruner.record import RunRecord, portable
from gradpruner.record_sections import metric_stderr, metric_value

RECORDS = Path(__file__).resolve().parents[1] / "results" / "records"
SECTIONS = ("model", "pruning", "finetune", "metrics", "metrics_before", "efficiency", "environment")
MAY_BE_EMPTY = ("metrics_before", "pruning.recovery", "efficiency.speed")


def committed():
    """Finished records by file."""
    found = {path: json.loads(path.read_text()) for path in sorted(RECORDS.rglob("*.json"))}
    return {path: data for path, data in found.items() if data.get("status") == "finished"}


def problems(value, declared, where):
    """Yields where a JSON value differs from its declared type."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared is typing.Any or (value == {} and where in MAY_BE_EMPTY):
        return
    if typing.is_typeddict(declared):
        types = typing.get_type_hints(declared)
        yield from (f"{where} lacks {key}" for key in declared.__required_keys__ - value.keys())
        yield from (f"{where}.{key} is not declared" for key in value.keys() - types.keys())
        for key in value.keys() & types.keys():
            yield from problems(value[key], types[key], f"{where}.{key}")
    elif origin is list and isinstance(value, list):
        for each in value:
            yield from problems(each, arguments[0], f"{where}[]")
    elif origin is dict and isinstance(value, dict):
        for key, each in value.items():
            yield from problems(each, arguments[1], f"{where}.{key}")
    elif type(value) not in (arguments or (declared,)):
        yield f"{where} is {value!s:.40}, not {declared}"


def section_problems(data):
    types = typing.get_type_hints(RunRecord)
    return [line for name in SECTIONS for line in problems(data[name], types[name], name)]


def test_committed_records_are_as_declared():
    records = committed()
    assert records
    assert {str(path): lines for path, data in records.items() if (lines := section_problems(data))} == {}


def test_committed_records_are_saved_as_they_were_read(tmp_path):
    path, data = next(iter(committed().items()))
    RunRecord.from_dict(data, path).save(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text()) == data
    assert RunRecord.load(tmp_path) == RunRecord.from_dict(data, path)


def test_differences_are_found():
    data = next(iter(committed().values()))
    del data["model"]["name"]
    data["pruning"] |= {"num_hidden_layers": 1.0, "pruned_layers": [None], "more": 1}
    data["environment"] = {}
    found = section_problems(data)
    assert {"model lacks name", "pruning.more is not declared", "environment lacks device"} <= set(found)
    assert "pruning.num_hidden_layers is 1.0, not <class 'int'>" in found
    assert "pruning.pruned_layers[] is None, not <class 'int'>" in found


def test_a_failed_run_has_empty_sections(tmp_path):
    RunRecord("failed", {}, "x", 0, error="ValueError: no").save(tmp_path)
    data = json.loads((tmp_path / "record.json").read_text())
    assert [data[name] for name in SECTIONS] == [{}] * len(SECTIONS)
    one, other = (RunRecord("failed", {}, "x", 0) for _ in range(2))
    assert one.model is not other.model


def test_metrics_by_name():
    metrics = {"num_examples": 4, "accuracy": 0.0, "accuracy_stderr": 0.1, "accuracy_mode": "likelihood"}
    record = dataclasses.replace(RunRecord("finished", {}, "x", 0), metrics=metrics)
    assert record.metric("accuracy") == 0.0 and record.stderr("accuracy") == 0.1
    assert record.metric("rouge_l") is None and record.metric("accuracy_mode") is None
    assert metric_value({}, "accuracy") is None
    with pytest.raises(KeyError, match="rouge_l_stderr"):
        metric_stderr(metrics, "rouge_l")


def test_a_portable_config_names_no_folder_of_the_machine():
    config = {
        "cache_dir": "/home/someone/study/cache",
        "results_dir": "results/runs",
        "output_dir": None,
        "dataset": {"path": "/data", "train_file": "/mnt/x/y/train.jsonl", "prompt": "/no_think {question}"},
        "model": {"path": "org/model"},
        "evaluation": {"vllm_python": "/opt/venv/bin/python"},
    }
    shortened = {"cache_dir": "study/cache", "evaluation": {"vllm_python": "bin/python"}}
    dataset = {**config["dataset"], "path": "data", "train_file": "y/train.jsonl"}
    assert portable(config) == {**config, **shortened, "dataset": dataset}
    assert portable(portable(config)) == portable(config) and config["dataset"]["path"] == "/data"


def test_committed_records_name_no_folder_of_a_machine():
    found = committed()
    assert found
    for file, data in found.items():
        assert portable(data["config"]) == data["config"], file
