"""The command of a record makes a run with the settings of the record."""

import dataclasses
import json
import shlex

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import CONF, resolve
from experiments.rerun_command import rerun_command
from gradpruner.record import NOT_IDENTITY, RunRecord, portable

RECORDS = CONF.parent / "results" / "records"
NAMES = (
    "small/arc_easy-lora-gradpruner-0.3-seed1",
    "small/fingpt-lora-igia_only-0.5-seed0",
    "small/piqa-full-gradpruner-0.367-merge_count-2-seed0",
    "methods/apt",
    "gradpruner_plus/arc_easy-lora-shortgpt-judged-distill-tuned0.5-lr0.003-seed0",
)


def load(name):
    path = RECORDS / f"{name}.json"
    return RunRecord.from_dict(json.loads(path.read_text()), path)


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", NAMES)
def test_the_command_gives_the_settings_of_the_record(name):
    record = load(name)
    python, flag, module, *overrides = shlex.split(rerun_command(record))
    assert (python, flag, module) == ("python", "-m", "experiments.run")
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        made = dict(leaves(portable(resolve(compose("config", overrides=overrides)))))
    ignored = {*NOT_IDENTITY} - {"sparsity", "merge_count"}
    wanted = {key: value for key, value in leaves(record.config) if key.split(".")[0] not in ignored}
    assert {key: made.get(key) for key in wanted if not key.endswith("save_steps")} == {
        key: value for key, value in wanted.items() if not key.endswith("save_steps")
    }


def test_a_setting_of_the_method_alone_is_repeated():
    record = load(NAMES[0])
    method = record.config["method"] | {"sparsity": 0.25}
    command = rerun_command(dataclasses.replace(record, config=record.config | {"method": method}))
    assert " sparsity=0.3 " in command and " method.sparsity=0.25 " in command


def test_text_is_quoted_for_hydra_and_the_shell():
    record = load(NAMES[0])
    dataset = record.config["dataset"] | {"prompt": "It's {question}\nAnswer:"}
    record = dataclasses.replace(record, config=record.config | {"dataset": dataset})
    overrides = shlex.split(rerun_command(record))[3:]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        assert compose("config", overrides=overrides).dataset.prompt == "It's {question}\nAnswer:"


def test_there_is_no_command_for_methods_that_are_not_here():
    record = load(NAMES[0])
    assert rerun_command(dataclasses.replace(record, pruning=record.pruning | {"method": "elsewhere"})) == ""
    model = record.config["model"] | {"path": "someone/else"}
    record = dataclasses.replace(record, config=record.config | {"model": model})
    assert "model.path=someone/else" in rerun_command(record)
