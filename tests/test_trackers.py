"""TensorBoard, with its own package, and Trackio, with a fake one, get losses as they come and metrics at the end."""

import importlib.util
import json
import sys

import pytest
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import CONF
from experiments.job import run_job
from experiments.trainer_trackers import TensorBoardTracker, TrackioTracker
from gradpruner.encoding import TrainingRow
from gradpruner.finetune.run import CHECKPOINTS_FOLDER, finetune
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.record import RunRecord

ROWS = [TrainingRow((*range(2, 8), 60, 1), 2) for _ in range(8)]
TRAINING = TrainingSpec(batch_size=4, micro_batch_size=4, max_steps=3)
FAKE_TRACKIO = """
import json, pathlib, types
__version__ = "0.43.0"
log_file = pathlib.Path(__file__).with_name("trackio.jsonl")
context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
class Config(dict):
    def update(self, values, allow_val_change=False): super().update(values)
config = Config()
def write(*what):
    with log_file.open("a") as stream: stream.write(json.dumps(what) + "\\n")
def init(**settings): write("init", settings["project"], settings["name"], settings["space_id"])
def log(values): write("log", values)
def finish(): write("finish")
"""


@pytest.fixture
def record():
    config = {"seed": 0, "method": {"density": 0.2, "layers": [1]}}
    return RunRecord("finished", config, "id", 0, metrics={"accuracy": 0.5, "accuracy_mode": "likelihood"})


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: [json.loads(line) for line in (tmp_path / "trackio.jsonl").read_text().splitlines()]
    sys.modules.pop("trackio", None)


def train(tracker, run_dir, tiny_llama, folder):
    with tracker.watch(run_dir, {}):
        finetune(tiny_llama(num_hidden_layers=2), ROWS, 1, TRAINING, folder / "finetune" / "key.partial")


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path, tiny_llama, record):
    tracker, run_dir = TensorBoardTracker(), tmp_path / "run"
    tracker.check()
    train(tracker, run_dir, tiny_llama, tmp_path)
    tracker.log(record, [{"step": 1, "loss": 9.0}], run_dir)  # of a stage that was watched: not written again
    losses = scalars(run_dir / "tensorboard" / "finetune")["train/loss"]
    assert [step for step, _ in losses] == [1, 2, 3] and all(0 < loss < 9 for _, loss in losses)
    found = scalars(run_dir / "tensorboard")
    assert found["metrics/accuracy"] == [(0, 0.5)] and "metrics/accuracy_mode" not in found
    assert (run_dir / "tracker.json").is_file()


def test_tensorboard_after_the_run(tmp_path, record):
    TensorBoardTracker().log(record, [{"step": 1, "loss": 2.5, "epoch": 0.5}, {"step": 2, "loss": 2.25}], tmp_path)
    assert scalars(tmp_path / "tensorboard" / "finetune") == {"train/loss": [(1, 2.5), (2, 2.25)]}


def test_a_resumed_training_replaces_the_steps_after_its_checkpoint(tmp_path, tiny_llama):
    class Stop(Exception):
        pass

    tracker, run_dir = TensorBoardTracker(), tmp_path / "run"
    folder, model = tmp_path / "finetune" / "key.partial", tiny_llama(num_hidden_layers=2)
    from transformers import TrainerCallback

    class StopAfterTwo(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Stop

    training = TrainingSpec(batch_size=4, micro_batch_size=4, max_steps=3, save_steps=1)
    with pytest.raises(Stop), tracker.watch(run_dir, {}):
        finetune(model, ROWS, 1, training, folder, callbacks=[StopAfterTwo()])
    assert (folder / CHECKPOINTS_FOLDER).is_dir()
    with tracker.watch(run_dir, {}):
        finetune(tiny_llama(num_hidden_layers=2), ROWS, 1, training, folder)
    steps = [step for step, _ in scalars(run_dir / "tensorboard" / "finetune")["train/loss"]]
    assert steps == [1, 2, 3]


def test_trackio(tmp_path, tiny_llama, record, trackio):
    tracker, run_dir = TrackioTracker(project="mine", space_id="me/space"), tmp_path / "run"
    tracker.check()
    train(tracker, run_dir, tiny_llama, tmp_path)
    tracker.log(record, [{"step": 1, "loss": 2.5}], run_dir)
    calls = trackio()
    inits = [call for call in calls if call[0] == "init"]
    assert [(project, space) for _, project, _, space in inits] == [("mine", "me/space")] * 2
    assert inits[0][2].endswith("run/finetune") and inits[1][2].endswith("run")
    assert [call[0] for call in calls].count("finish") == 2
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [entry["train/global_step"] for entry in logged if "train/loss" in entry] == [1, 2, 3]
    assert logged[-2:] == [{"finetune/step": 1, "finetune/loss": 2.5}, {"metrics/accuracy": 0.5}]


def test_a_tracker_that_fails_fails_no_training(tmp_path, tiny_llama, trackio, caplog, monkeypatch):
    import trackio as fake

    monkeypatch.setenv("HF_TOKEN", "topsecret")
    monkeypatch.setattr(fake, "init", lambda **settings: 1 / 0)
    train(TrackioTracker(), tmp_path / "run", tiny_llama, tmp_path)
    assert "The tracker failed, the run and its record are complete: ZeroDivisionError" in caplog.text
    monkeypatch.setattr(fake, "init", lambda **settings: (_ for _ in ()).throw(OSError("token topsecret")))
    train(TrackioTracker(), tmp_path / "run", tiny_llama, tmp_path / "again")
    assert "token ***" in caplog.text and "topsecret" not in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_refused_before_any_work(name, tmp_path, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: original(module, *rest) if module != name else None
    )
    monkeypatch.setattr("experiments.job.check_prunes", lambda pipeline: pytest.fail("checked later"))
    folders = [f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]
    expected = (
        rf"tracker={name} needs the package {name}, got an environment without it. Install it with: pip install "
        rf"'gradpruner\[{name}\]'"
    )
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"), pytest.raises(ValueError, match=expected):
        run_job(compose("config", overrides=["debug=smoke", f"tracker={name}", *folders]))
