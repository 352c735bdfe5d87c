"""`gradpruner init` and `--config FILE`: its keys, its paths, what it refuses; and folders of options beside it."""

import json
import re

import pytest
import yaml
from commands import call
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import init, run, status
from experiments.config import CONF, build_pipeline, composing
from experiments.own_config import _literal, expand
from experiments.schema import ConfigError
from gradpruner.tasks.jsonl import JsonLines


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that `gradpruner init` made, as the current one."""
    monkeypatch.chdir(tmp_path)
    done = call(lambda: init.main(["my project"]))
    assert "Run it: cd 'my project' && python -m experiments.run --config my.yaml" in done.stdout
    monkeypatch.chdir(tmp_path / "my project")
    return tmp_path / "my project"


def config(*arguments):
    from hydra import compose

    with composing():
        return compose("config", overrides=[each for each in expand(arguments) if not each.startswith("-")])


def test_init_writes_a_config_that_builds(project):
    pipeline = build_pipeline(config("--config", "my.yaml"))
    assert (pipeline.method.name, pipeline.training.num_steps(160)) == ("gradpruner_plus", 120)
    assert isinstance(pipeline.task, JsonLines) and pipeline.task.name == "messages"
    assert (len(pipeline.train_examples), len(pipeline.test_examples)) == (160, 40)
    assert pipeline.train_examples[0].prompt.endswith("\nTopic:") and len(pipeline.test_examples[0].choices) == 4


def test_its_commented_settings_exist(project):
    """What a comment offers must be a key, or the user's first change is refused."""
    lines = [line.removeprefix("# ") for line in (project / "my.yaml").read_text().splitlines()]
    offered = [line.partition(": ")[0] for line in lines if ": " in line and line.split(":")[0].count(".") == 1]
    offered = [key for key in offered if " " not in key]
    assert {"model.chat_template", "dataset.validation_fraction", "finetune.learning_rate"} <= set(offered)
    cfg = config("--config", "my.yaml")
    for key in offered:
        group, name = key.split(".")
        assert name in cfg[group], key


def test_its_test_messages_are_not_training_messages(project):
    train, test = (
        {json.loads(line)["message"] for line in (project / f"{split}.jsonl").read_text().splitlines()}
        for split in ("train", "test")
    )
    assert len(train) == 160 and len(test) == 40 and not train & test


def test_init_overwrites_nothing(project):
    (project / "my.yaml").write_text("mine")
    (project / "train.jsonl").unlink()
    done = call(lambda: exit(init.main([])))
    assert done.returncode == 1 and (project / "my.yaml").read_text() == "mine"
    assert f"init overwrites nothing, got {project}, which has my.yaml, test.jsonl. Give another fo" in done.stderr
    assert not (project / "train.jsonl").exists()


def write(folder, text, name="my.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return f"--config={folder / name}"


def test_each_line_is_an_argument_and_arguments_win(tmp_path):
    file = write(
        tmp_path, 'dataset: jsonl\ndataset.answer_field: "答 案"\nfinetune: {epochs: 2, mode: full}\nsparsity: 0.3\n'
    )
    assert expand([file, "-m", "sparsity=0.2,0.4"]) == [
        *("dataset=jsonl", 'dataset.answer_field="答 案"', "finetune.epochs=2", "finetune.mode=full"),
        *("-m", "sparsity=0.2,0.4"),
    ]
    assert expand(["sparsity=0.2"]) == ["sparsity=0.2"]


def test_mappings_that_take_any_key_stay_mappings(tmp_path):
    file = write(tmp_path, "model: tiny_random\nmodel.config:\n  num_hidden_layers: 4\n")
    assert expand([file])[1] == "++model.config={num_hidden_layers:4}"
    assert config(file).model.config.num_hidden_layers == 4


def test_paths_count_from_the_files_folder(tmp_path, monkeypatch):
    text = (
        "dataset.train_file: data/a.jsonl\ndataset.test_file: hf://datasets/o/n\nmodel.path: MODEL\noutput_dir: out\n"
        "cache_dir: /c\nresults_dir: ~/r\ndataset.test_settings: {path: rows, source: local}\n"
    )
    (tmp_path / "mine/llama").mkdir(parents=True)
    for current, prefix in ((tmp_path, "mine/"), (tmp_path / "mine", ""), (CONF, f"{tmp_path}/mine/")):
        monkeypatch.chdir(current)
        for model, expected in (("llama", f"{prefix}llama"), ("org/llama", "org/llama"), ("./x", f"{prefix}x")):
            found = config(write(tmp_path / "mine", text.replace("MODEL", model)), "dataset=jsonl")
            assert found.model.path == expected
        assert (found.dataset.train_file, found.output_dir) == (f"{prefix}data/a.jsonl", f"{prefix}out")
        assert (found.dataset.test_file, found.cache_dir, found.results_dir) == ("hf://datasets/o/n", "/c", "~/r")
        assert found.dataset.test_settings.path == f"{prefix}rows"


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z"), inner, max_size=3)
        ),
        max_leaves=5,
    )
)
def test_hydra_reads_the_values_of_the_file(value):
    [override] = OverridesParser.create().parse_overrides([f"key={_literal(value, 'key')}"])
    assert not override.is_sweep_override() and override.value() == value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sparsty: 0.3", r"There is no key 'sparsty'\. Did you mean sparsity\?"),
        ("dataset: jsonl\ndataset.promt: x", r"There is no key 'dataset\.promt'\. Did you mean dataset\.prompt\?"),
        ("dataset: {train_file: a.jsonl}", r"'dataset\.train_file'\. It belongs to dataset=jsonl: choose that, too"),
        ("method: gradprunr", r"There is no method 'gradprunr' \(did you mean 'gradpruner'\?\)"),
        ("sparsity: 0.3\nsparsity: 0.4", r"must name a YAML file, got .*my\.yaml, which cannot be read: .*dupli"),
        ("dataset.prompt: Q: {q}", r"cannot be read: ScannerError: mapping values are not allowed.*a text with"),
        ("- sparsity", r"must name a YAML file of KEY: VALUE lines, got a list in .*my\.yaml\."),
        ("sparsity: !!binary aGk=", r"A value must be a text, a .* got sparsity in .*my\.yaml: bytes\. Put"),
        ("config_dir: nowhere", r"--config-dir must be a folder with options of config groups, got .*/nowhere, wh"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_refused(text, match, tmp_path):
    done = call(run.main, write(tmp_path, text), f"cache_dir={tmp_path}/cache", f"results_dir={tmp_path}/runs")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(match, " ".join(done.stderr.split())), done.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            ["--config", "nowhere.yaml"],
            r"--config must name a YAML file, got .*nowhere\.yaml, which is not there\. Cor",
        ),
        (["--config=."], r"--config must name a YAML file, got .*, which is a folder\."),
        (["--config"], r"--config takes one file, got none\. Write --config my\.yaml"),
        (["--config", "a.yaml", "--config=b.yaml"], r"--config takes one file, got a\.yaml, b\.yaml\."),
    ],
)
def test_a_file_that_cannot_be_had(arguments, match):
    with pytest.raises(ConfigError, match=match):
        expand(arguments)


def test_the_file_brings_its_folder_of_options(tmp_path, monkeypatch):
    """As `--config-dir` does: for run, and for status, which did not read it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/method").mkdir(parents=True)
    (tmp_path / "mine/ours.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom baselines.last import Last\n\n\n"
        '@dataclass(frozen=True)\nclass Ours(Last):\n    """Last."""\n\n    name: ClassVar[str] = "ours"\n'
    )
    (tmp_path / "mine/method/ours.yaml").write_text("defaults: [base/depth@_here_, _self_]\n_target_: ours.Ours\n")
    file = write(tmp_path, "config_dir: mine\nmethod: ours\ndebug: smoke\nreference: null\nevaluate_before: false\n")
    folders = ("results_dir=runs", "cache_dir=cache", "hydra.sweep.dir=sweeps/one")
    asked = call(status.main, file, "-m", "seed=0,1", *folders)
    assert asked.returncode == 1 and "2 missing of 2 cells" in asked.stdout, asked.stderr
    assert f"To continue: python -m experiments.run {file} -m seed=0,1" in asked.stdout
    done = call(run.main, file, "-m", "seed=0", *folders, "dry_run=true")
    assert done.returncode == 0, done.stderr
    asked = call(status.main, "sweeps/one")
    assert "1 missing of 1 cells" in asked.stdout and f"--config-dir={tmp_path}/mine" in asked.stdout, asked.stderr


def test_home_is_where_results_and_the_cache_go(tmp_path, monkeypatch):
    assert (config().results_dir, config().cache_dir) == ("results/runs", ".cache")
    monkeypatch.setenv("GRADPRUNER_HOME", str(tmp_path))
    assert (config().results_dir, config().cache_dir) == (f"{tmp_path}/results/runs", f"{tmp_path}/.cache")


def test_the_config_of_init_is_yaml_for_other_tools(project):
    assert yaml.safe_load((project / "my.yaml").read_text())["dataset.choices"] == [
        *("delivery", "payment", "return", "account")
    ]
