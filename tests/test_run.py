"""Tests of the runner: folders, records, resuming, sweeps, trackers."""

import functools
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import call
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import prune_checkpoint
from experiments.config import CONF, build_pipeline, load_option, reference_configs, run_directory
from experiments.job import run_job
from experiments.run import main
from experiments.tracker import WandbTracker
from gradpruner.pipeline.run import Pipeline
from gradpruner.record import RunRecord
from gradpruner.tasks import Task

ROOT = CONF.parent
COUNTS = ("num_parameters", "num_parameters_without_embedding", "num_macs")
KEYS = {
    "model": {"name", "num_hidden_layers", *COUNTS},
    "pruning": {"pruned_layers", "absorbed_by", "layer_importance", "num_hidden_layers", *COUNTS},
    "finetune": {"steps", "tokens", "train_seconds", "peak_memory_bytes", "loss"},
    "metrics": {"accuracy", "accuracy_norm", "accuracy_mode", "answer_nll"},
}


@pytest.fixture
def folders(tmp_path, shared_cache):
    return [f"results_dir={tmp_path}/runs", f"cache_dir={shared_cache}"]


def run(*overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return run_job(compose("config", overrides=["debug=smoke", *overrides]))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_run_writes_its_folder(folders, tmp_path, capsys):
    record = run("save_checkpoint=true", "merge_count=2", folders[0], f"cache_dir={tmp_path}/cache")
    [run_dir] = (tmp_path / "runs/random-llama/arc_easy/lora/gradpruner").iterdir()
    assert run_dir.name.startswith("sparsity0.4-merge2-") and run_dir.name.endswith("-seed0")
    written = {path.name for path in run_dir.iterdir()}
    assert written == {
        *("config.yaml", "run.log", "plan.json", "predictions.jsonl", "questions.jsonl", "record.json"),
        *("history.json", "loss.png", "importance.png", "checkpoint"),
    }
    data = json.loads((run_dir / "record.json").read_text())
    assert data["status"] == "finished" and data["schema_version"] == 3 and data["seed"] == 0
    for part, keys in KEYS.items():
        assert keys <= set(data[part]), part
    assert {"config", "efficiency", "environment"} <= set(data)
    assert data["pruning"]["num_hidden_layers"] == 4 and data["model"]["num_hidden_layers"] == 6
    embedding = {part: data[part]["num_parameters"] - data[part][COUNTS[1]] for part in ("model", "pruning")}
    assert embedding["model"] == embedding["pruning"] > 0 and data["pruning"]["num_macs"] < data["model"]["num_macs"]
    assert len((run_dir / "predictions.jsonl").read_text().splitlines()) == 8
    assert RunRecord.load(run_dir) == record

    model = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoint")
    assert model.config.num_hidden_layers == 4
    assert model.generate(**tokenizer("Question:", return_tensors="pt"), max_new_tokens=3).shape[1] > 0
    assert not [path for path in (run_dir / "checkpoint").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]

    # Its record names the gradients that its plan was made from.
    [config] = (tmp_path / "cache" / "assets").glob("*/config.json")
    assert prune_checkpoint.main([str(run_dir), str(config.parent), str(tmp_path / "pruned")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_hidden_layers == 4

    output = capsys.readouterr()
    for text in ("dense + lora", "gradpruner + lora", "Pruned layers", "always the most frequent label", str(run_dir)):
        assert text in output.out
    assert "Question:" in output.err  # the preview


def test_the_dense_reference_has_its_own_record(folders, tmp_path):
    run(*folders)
    [run_dir] = (tmp_path / "runs/random-llama/arc_easy/lora/dense").iterdir()
    assert RunRecord.load(run_dir).pruning["pruned_layers"] == []


def test_both_runs_share_the_examples(folders, monkeypatch):
    splits, original = [], Task.load
    monkeypatch.setattr(Task, "load", lambda task, split, seed: splits.append(split) or original(task, split, seed))
    run(*folders)
    assert sorted(splits) == ["test", "train"]


def test_no_reference(folders, tmp_path):
    run("reference=null", *folders)
    assert not (tmp_path / "runs/random-llama/arc_easy/lora/dense").exists()


def test_a_reference_whose_yaml_inherits():
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        (cfg,) = reference_configs(compose("config", overrides=["debug=smoke", "reference=igia_only"]), "gradpruner")
        method = build_pipeline(cfg).method
    assert (method.name, method.merge_count, method.seed) == ("igia_only", 0, 0)
    assert cfg.method.merge_count == 0


def test_the_dense_reference_is_the_model_that_is_compressed():
    """It is fine-tuned once, also where the run compresses it after that; another method compresses it, too."""
    overrides = ["debug=smoke", "reference=[dense,last]", "finetune.tune_dense_first=true"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        dense, last = (build_pipeline(cfg) for cfg in reference_configs(compose("config", overrides), "gradpruner"))
    assert (dense.method.name, dense.training.tune_dense_first) == ("dense", False)
    assert (last.method.name, last.training.tune_dense_first) == ("last", True)
    assert last.stage_ids()["tuned_dense"] == dense.stage_ids()["finetune"]


def test_a_reference_has_the_settings_of_the_preset(monkeypatch):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", ["experiment=quickstart", "seed=3"], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
        _, reference = reference_configs(cfg, "gradpruner_plus")
        assert reference.method.steps == cfg.method.steps == 10 != load_option("method", "gradpruner").steps
        assert reference.method.seed == 3 and reference.method.merge_count == cfg.merge_count


def test_several_references(folders, tmp_path, capsys):
    record = run(
        "reference=[dense,last,igia_only]",
        "method=last",
        "evaluate_before=false",
        f"output_dir={tmp_path}/run",
        *folders,
    )
    assert record.pruning["method"] == "last"  # which is not run twice
    names = [RunRecord.load(each).pruning["method"] for each in sorted((tmp_path / "run/reference").iterdir())]
    assert names == ["dense", "igia_only"]
    lines = capsys.readouterr().out.splitlines()
    order = [line.split()[1] for line in lines if " + lora" in line]
    assert order == ["dense", "igia_only", "last"]


@pytest.mark.bad_input("Paths and overrides", "a misspelt reference", "error: reference must name a method")
def test_unknown_reference(folders):
    message = r"reference must name a method, or a list of methods, got 'dens'\. Known: angular, apt, apt_fast, dense, "
    for reference in ("dens", "[dense,dens]"):
        with pytest.raises(ValueError, match=message):
            run(f"reference={reference}", *folders)
    with pytest.raises(ValueError, match="or a list of methods, got 3"):
        run("reference=3", *folders)


def test_a_finished_run_is_not_run_again(folders, tmp_path, caplog):
    first = run(*folders)
    with caplog.at_level(logging.INFO):
        assert run(*folders) == first
    assert "Already finished" in caplog.text


def test_a_checkpoint_can_be_asked_for_later(folders, tmp_path):
    run(*folders)
    run("save_checkpoint=true", *folders)
    [run_dir] = (tmp_path / "runs/random-llama/arc_easy/lora/gradpruner").iterdir()
    assert (run_dir / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.bad_input(
    "Sweeps and records", "the folder of a run with another config", "error: … holds a run with another config"
)
def test_another_config_in_the_same_folder_is_refused(folders, tmp_path):
    folder = f"output_dir={tmp_path}/mine"
    run(folder, "reference=null", *folders)
    with pytest.raises(ValueError, match=r"mine holds a run with another config.*Give output_dir another folder"):
        run(folder, "reference=null", "method.density=0.9", *folders)


@pytest.mark.bad_input("Sweeps and records", "a run that fails", "is recorded with its error, and can be repeated")
def test_a_failed_run_is_recorded_and_can_be_repeated(folders, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("power cut")

    folder = tmp_path / "mine"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run(f"output_dir={folder}", "reference=null", *folders)
    failed = RunRecord.load(folder)
    assert failed.status == "failed" and failed.error == "RuntimeError: power cut"
    assert run(f"output_dir={folder}", "reference=null", *folders).status == "finished"


def test_dry_run_loads_no_weights(folders, tmp_path, monkeypatch, capsys):
    from gradpruner.models.spec import ModelSpec

    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    assert run("dry_run=true", *folders, f"cache_dir={tmp_path}/cache") is None
    output = capsys.readouterr().out
    assert "decoder layers" in output and "0.667" in output and "Cached stages: none" in output
    assert not (tmp_path / "runs").exists()


def test_unmerged_adapter_is_saved_beside_the_model(folders, tmp_path, capsys):
    folder = tmp_path / "mine"
    settings = ["reference=null", "save_checkpoint=true", "finetune.merge_adapter=false", *folders]
    run(f"output_dir={folder}", *settings)
    assert (
        "Checkpoint (the model before fine-tuning with plain transformers, adapter/ on it with"
        in capsys.readouterr().out
    )
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        pipeline = build_pipeline(compose("config", overrides=["debug=smoke", *settings]))
    assert all(pipeline.stages().values())
    tokens = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder / "checkpoint" / "adapter")
    with torch.no_grad():
        evaluated = pipeline.load_result()(tokens).logits
        assert torch.equal(tuned.eval()(input_ids=tokens).logits, evaluated)
        assert not torch.equal(base.eval()(tokens).logits, evaluated)


def test_full_fine_tuning(folders):
    assert run("finetune=full", *folders).config["finetune"]["mode"] == "full"


def write_rows(folder, name, *rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def medmcqa(tmp_path):
    row = {"opa": "a", "opb": "b", "opc": "c", "opd": "d"}
    rows = [{"id": str(n), "question": f"Q{n}", **row, "cop": n % 4} for n in range(8)]
    write_rows(tmp_path / "medmcqa", "train", *rows)
    write_rows(tmp_path / "medmcqa", "test", *rows[:4])
    return ["dataset=medmcqa", "dataset.source=local", f"dataset.path={tmp_path}/medmcqa"]


def test_generated_answers_with_every_metric(folders, tmp_path, medmcqa, capsys):
    record = run("evaluation=generate", "evaluation.bertscore_model=packaged:minilm", *medmcqa, *folders)
    assert {"accuracy", "rouge_l", "bertscore_f1", "similarity", "answer_nll"} <= set(record.metrics)
    assert {f"{name}_stderr" for name in ("accuracy", "rouge_l", "similarity")} <= set(record.metrics)
    assert (record.metrics["bertscore_encoder"], record.metrics["bertscore_layer"]) == ("packaged:minilm", 5)
    output = capsys.readouterr()
    assert "BERTScore F1 with packaged:minilm, layer 5" in output.out and "similarity" in output.out
    assert "A. a" in output.err  # the preview shows the options


def test_trained_on_one_dataset_and_tested_on_another(folders, tmp_path, medmcqa):
    other = ["dataset.test=mmlu_clinical_knowledge", "dataset.test_settings={max_test_samples: 3}"]
    record = run(*other, *medmcqa, *folders)
    assert record.metrics["num_examples"] == 3 and record.metrics["chance_accuracy"] == 0.25
    assert (tmp_path / "runs/random-llama/medmcqa-to-mmlu_clinical_knowledge/lora/gradpruner").is_dir()
    assert record.config["dataset"]["test"] == "mmlu_clinical_knowledge"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            ["dataset.test=piqa", "dataset.validation_fraction=0.1"],
            r"another dataset or validation rows, got dataset\.test=piqa and .*=0\.1\. Set one of them to null\.",
        ),
        (["dataset.test=mmlu_clinical"], r"dataset\.test must name a dataset, got 'mmlu_clinical' \(did you mean"),
        (["dataset.test_settings={path: x}"], r"test_settings belongs to dataset\.test, got .* and dataset\.test=null"),
        (
            ["dataset.test=piqa", "dataset.test_settings={flavour: mild}"],
            r"There is no key 'dataset\.flavour'\. Known in dataset: ",
        ),
        (["dataset=mmlu_clinical_knowledge"], r"mmlu_clinical_knowledge has no train split .*dataset=medmcqa"),
    ],
)
def test_what_a_test_dataset_cannot_be(folders, overrides, match):
    with pytest.raises(ValueError, match=match):
        run(*overrides, *folders)


@pytest.mark.parametrize(("overrides", "match"), [
    (["method=minitron", "method.recover_on=alpaca", "method.recover_settings={source: local, path: nowhere}"],
     r"nowhere/train\.jsonl.* These are rows of method\.recover_on, on which minitron trains "
     r".* method\.recover_settings=\{\.\.\.\}, and "),
    (["method=last", "dataset.test=piqa", "dataset.test_settings={source: local, path: nowhere}"],
     r"nowhere/test\.jsonl.* These are rows of dataset\.test\. Its settings belong into dataset\.test_settings="),
])  # fmt: skip
def test_rows_of_a_second_dataset_name_its_settings(tmp_path, overrides, match):
    with pytest.raises(ValueError, match=match):
        run(*overrides, "reference=null", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache")


def wandb_records(folder):
    """Yields what an offline run wrote in LevelDB's log format: blocks of 32 kB, of chunks with a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("*.wandb")
    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            return  # still being written
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            yield Record.FromString(record)
            record = b""


def finished_wandb_records(folder):
    """Returns what an offline run wrote; wandb's own process writes the end of the file after `finish` returned."""
    for _ in range(600):
        written = list(wandb_records(folder))
        if written and written[-1].HasField("exit"):
            return written
        time.sleep(0.1)
    raise AssertionError(f"{folder} never got to its end")


def by_key(items):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_wandb_offline(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "tracker").mkdir()
    own = [folders[0], f"cache_dir={tmp_path}/cache"]  # so that the importance run is not one of another test
    found = run("tracker=wandb", "tracker.mode=offline", f"tracker.directory={tmp_path}/tracker", *own)
    runs = sorted((tmp_path / "tracker" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2  # the method and its reference, each finished
    records = {}
    for folder in runs:
        written = finished_wandb_records(folder)
        [method] = {by_key(each.run.config.update)["method"]["_target_"] for each in written if each.HasField("run")}
        records[method.rsplit(".", 1)[-1]] = folder, written
    folder, written = records["GradPruner"]
    history = [by_key(each.history.item) for each in written if each.HasField("history")]
    # Losses are there once, in the order in which they came, before the tables of the finished run.
    steps = [(key.split("/")[0], entry[key]) for entry in history for key in entry if key.endswith("/step")]
    assert steps == [*(("importance", step) for step in range(1, 9)), ("finetune", 1), ("finetune", 2)]
    assert [entry["finetune/loss"] for entry in history if "finetune/loss" in entry]
    summary = {}
    for each in written:
        summary |= by_key(each.summary.update)
    assert summary["metrics/accuracy"] == found.metrics["accuracy"]
    assert {"loss/path", "importance/path", "layers/path", "predictions/path"} <= set().union(*history)
    assert not records["Dense"][1][0].run.run_group

    [layers] = (folder / "files" / "media" / "table").glob("layers*.json")
    layers = json.loads(layers.read_text())
    assert layers["columns"] == ["layer", "importance", "fate"]
    assert [row[1] for row in layers["data"]] == found.pruning["layer_importance"]
    fates = {row[0]: row[2] for row in layers["data"]}
    assert {layer for layer, fate in fates.items() if fate != "kept"} == set(found.pruning["pruned_layers"])
    merged = {int(layer): into for layer, into in found.pruning["absorbed_by"].items() if into is not None}
    assert {layer: f"merged into {into}" for layer, into in merged.items()}.items() <= fates.items()
    [predictions] = (folder / "files" / "media" / "table").glob("predictions*.json")
    assert len(json.loads(predictions.read_text())["data"]) == 8
    assert {file.name.split("_")[0] for file in (folder / "files" / "media" / "images").iterdir()} == {
        *("loss", "importance"),
    }

    # A finished run can be logged later, and is logged once.
    [marked] = (tmp_path / "runs/random-llama/arc_easy/lora/gradpruner").glob("*/tracker.json")
    settings = ("tracker=wandb", "tracker.mode=offline", f"tracker.directory={tmp_path}/tracker", *own)
    run(*settings)
    assert len(list((tmp_path / "tracker" / "wandb").glob("offline-run-*"))) == 2
    marked.unlink()
    run(*settings)
    assert len(list((tmp_path / "tracker" / "wandb").glob("offline-run-*"))) == 3 and marked.is_file()


@pytest.mark.parametrize(("mode", "environment", "match"), [
    ("online", {}, r"tracker\.mode=online needs a login, got no API key\. Run `wandb login` or set WANDB_API_KEY, or"),
    ("online", {"WANDB_MODE": "offline"}, r"that of WANDB_MODE, got tracker\.mode=online and WANDB_MODE=offline"),
    ("offline", {}, None), ("online", {"WANDB_API_KEY": "x"}, None),
    ("online", {"NETRC": "machine api.wandb.ai login user password x"}, None),
])  # fmt: skip
def test_a_tracker_is_checked_before_the_run(tmp_path, monkeypatch, mode, environment, match):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "netrc").write_text(environment.pop("NETRC", ""))
    for key, value in {"NETRC": str(tmp_path / "netrc"), **environment}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("experiments.job.check_prunes", lambda pipeline: pytest.fail("checked later"))
    if match is None:
        return WandbTracker(mode=mode).check()
    with pytest.raises(ValueError, match=match):
        run("tracker=wandb", f"tracker.mode={mode}", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache")


def test_no_key_in_the_log(folders, monkeypatch, caplog):
    import wandb

    def fail(**kwargs):
        raise wandb.errors.CommError("bad key topsecret")

    monkeypatch.setenv("WANDB_API_KEY", "topsecret")
    monkeypatch.setattr(wandb, "init", fail)
    run("tracker=wandb", "reference=null", *folders)
    assert "bad key ***" in caplog.text and "topsecret" not in caplog.text


@pytest.mark.bad_input("Sweeps and records", "a tracker without connection", "a warning; the run is recorded")
def test_a_failing_tracker_fails_no_run(folders, monkeypatch, caplog):
    import wandb

    def fail(**kwargs):
        raise wandb.errors.CommError("no connection")

    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setattr(wandb, "init", fail)
    assert run("tracker=wandb", "reference=null", *folders).status == "finished"
    assert "The tracker failed, the run and its record are complete: CommError: no connection" in caplog.text


@pytest.mark.slow
def test_sweep_with_joblib_measures_once(tmp_path):
    done = command(
        *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/sweep"),
        *("debug=smoke", "sparsity=0.4,0.5"),
        *(f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"),
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/random-llama/arc_easy/lora"
    records = [RunRecord.load(path) for path in sorted((folder / "gradpruner").iterdir())]
    assert [record.status for record in records] == ["finished"] * 2
    assert len({tuple(record.pruning["pruned_layers"]) for record in records}) == 2
    assert len(list((folder / "dense").iterdir())) == 1
    measured = [path for path in (tmp_path / "cache/stages/measure").iterdir() if path.is_dir()]
    assert len(measured) == 2  # GradPruner's importance and the dense model's empty measurement
    # What two jobs print at the same time has labels; the sweep ends with one table of all cells.
    for number, label in enumerate(("0.4", "0.5")):
        label = f"[#{number} sparsity={label}] "
        assert f"{label}INFO " in done.stderr and f"{label}Run folder: " in done.stdout
    assert "sparsity=0.5" in done.stdout[done.stdout.rindex("random-llama on arc_easy, lora") :]


@pytest.mark.bad_input(
    "Sweeps and records", "a sweep with impossible runs", "the others go on; exit code 1; the failures are listed"
)
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], marks=pytest.mark.slow)]
)
def test_a_sweep_goes_on_after_a_failure(tmp_path, launcher):
    arguments = (
        *("-m", *launcher, f"hydra.sweep.dir={tmp_path}/sweep", "debug=smoke", "reference=null", "method=last"),
        *(
            f"results_dir={tmp_path}/runs",
            f"cache_dir={tmp_path}/cache",
            "hydra.callbacks.sweep.exclude=[{sparsity: 0.3}]",
        ),
    )
    # In processes of their own, joblib's workers write to their own stderr.
    start = command if launcher else functools.partial(call, main)
    done = start(*arguments, "sparsity=0.9,0.3,0.4,0.95")
    assert done.returncode == 1
    assert "2 runs of this sweep failed, the others are done:\n  #0: " in done.stderr
    listed = done.stderr[done.stderr.index("2 runs of this sweep failed") :]
    assert "sparsity=0.9\n" in listed and "sparsity=0.95" in listed and "#3" in listed
    assert "num_pruned_layers must leave at least 2 of the model's 6 decoder layers, got 5." in listed
    assert "Traceback" not in done.stderr
    [run_dir] = (tmp_path / "runs/random-llama/arc_easy/lora/last").iterdir()
    assert RunRecord.load(run_dir).status == "finished"

    again = start(*arguments, "sparsity=0.4,0.3")
    assert again.returncode == 0, again.stderr
    assert "Already finished" in again.stderr and "Left out of the sweep" in again.stderr


@pytest.mark.bad_input(
    "Sweeps and records", "a bug in one run of a sweep", "a traceback; the others go on; exit code 1"
)
def test_a_bug_in_a_sweep_is_listed(tmp_path, monkeypatch):
    original = Pipeline.run

    def broken(self):
        if self.seed == 0:
            raise TypeError("a bug")
        return original(self)

    monkeypatch.setattr(Pipeline, "run", broken)
    arguments = (
        *("-m", f"hydra.sweep.dir={tmp_path}/sweep", "debug=smoke", "reference=null", "method=dense", "seed=0,1"),
        *(f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"),
    )
    done = call(main, *arguments)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert list((tmp_path / "runs").rglob("*seed1/record.json"))
    assert "1 runs of this sweep failed" in done.stderr and "\n    TypeError: a bug\n" in done.stderr
    failed = json.loads((tmp_path / "sweep/0/failed.json").read_text())
    assert "in broken" in "".join(failed["traceback"])


def test_a_bug_in_a_run_ends_with_its_traceback(monkeypatch):
    def broken(cfg):
        return cfg.no_such_key

    monkeypatch.setattr("experiments.job.run_job", broken)
    done = call(main)
    assert done.returncode == 1 and "in broken" in done.stderr and "ConfigAttributeError" in done.stderr


def test_runs_of_a_sweep_share_a_group(tmp_path, monkeypatch):
    from hydra.core.hydra_config import HydraConfig

    from experiments.tracker import _sweep_name

    assert _sweep_name() is None
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", [f"hydra.sweep.dir={tmp_path}/mine", "hydra.mode=MULTIRUN"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert _sweep_name() == "mine"


def test_a_run_that_lacks_speed_is_completed(folders, in_process):
    assert run("reference=null", *folders).efficiency["speed"] == {}
    assert run("reference=null", "measure_speed=true", *folders).efficiency["speed"]["ratios"]


def test_importance_with_qlora(folders):
    record = run("method.adapter=qlora", "reference=null", *folders)
    assert record.status == "finished" and any(record.pruning["layer_importance"])


def test_errors_are_one_readable_line(tmp_path):
    done = call(main, "debug=smoke", "sparsity=0.9", f"results_dir={tmp_path}", f"cache_dir={tmp_path}/cache")
    assert done.returncode == 1
    assert "Error: num_pruned_layers must leave at least 2 of the model's 6 decoder layers, got 5." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("group", "name"), [("method", "igia_only"), ("dataset", "piqa")])
def test_an_option_by_itself_is_that_of_the_config(group, name):
    outside = load_option(group, name)  # hydra is not initialized here
    assert not GlobalHydra.instance().is_initialized()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        inside = load_option(group, name)
        composed = compose("config", overrides=[f"{group}={name}"])
    expected = OmegaConf.to_container(composed[group])  # interpolations are not resolved
    for node in (outside, inside):
        assert list(node) == list(expected) and OmegaConf.to_container(node) == expected
        assert not OmegaConf.is_struct(node)


@pytest.mark.bad_input("Paths and overrides", "a sparsity that prunes nothing", "error: … would prune nothing")
def test_pruning_none_is_refused(folders):
    with pytest.raises(ValueError, match=r"gradpruner would prune nothing of the 6 decoder layers\. Raise sparsity"):
        run("sparsity=0.05", "merge_count=0", *folders)


def test_unwritable_output_is_refused(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir must be a folder .*file is a file\). Set output_dir to another"):
        run(f"output_dir={tmp_path}/file/run", *folders)


@pytest.mark.bad_input("Paths and overrides", "model.path=../../escape", "a run folder inside results_dir")
def test_a_model_path_cannot_lead_out_of_the_results(folders, tmp_path, monkeypatch):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        for path in ("../../escape", "/etc/..", "..", "a/../.."):
            cfg = compose("config", overrides=[f"model.path={path}", *folders])
            run_dir = run_directory(cfg, build_pipeline(cfg)).resolve()
            assert run_dir.is_relative_to(tmp_path / "runs"), path


def test_a_typo_costs_no_import_of_torch():
    code = "import sys\nfrom experiments.run import main\ntry: main()\nfinally: print(sorted(sys.modules))"
    arguments = [sys.executable, "-c", code, "-m", "method=dense,lcao"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "There is no method 'lcao' (did you mean 'laco'?)" in done.stderr
    assert "'hydra'" in done.stdout
    for library in ("torch", "transformers", "peft", "datasets", "matplotlib"):
        assert f"'{library}'" not in done.stdout


def test_help_lists_groups_and_examples():
    done = command("--help")
    assert done.returncode == 0
    for text in ("experiment=quickstart", "model:", "smollm2_135m", "sparsity: 0.4"):
        assert text in done.stdout
    assert not Path(ROOT, "run.log").exists()
