"""What a run says while it works: a line per stage, on a terminal the current one with the time that is left."""

import io
import logging
import sys

import pytest
from commands import call
from transformers import modeling_gguf_pytorch_utils

from baselines.laco import LaCo
from baselines.perplexity import Perplexity
from experiments import progress
from experiments.progress import RunProgress, describe_seconds
from experiments.run import main
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.counting import count_model
from gradpruner.pipeline.work import PlannedStage, stage_flops, tokens_per_row
from gradpruner.progress import Steps, track
from gradpruner.runtime import quiet_libraries

PLAN = [
    PlannedStage("measure", "m", 100.0, False),
    PlannedStage("prune", "p", 0.0, False),
    PlannedStage("finetune", "f", 400.0, False),
    PlannedStage("speed", None, 0.0, False),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_measured(clock):
    run = RunProgress([("dense", [PlannedStage("finetune", "d", 300.0, True)]), ("gradpruner", PLAN)])
    assert run.seconds_left() is None
    run.stage_begins("finetune", "d")
    run.stage_ends("finetune", "d", None)
    assert run.seconds_left() is None  # nothing was computed yet
    run.begin_arm(1)
    run.stage_begins("measure", "m")
    steps = Steps("measure", "step", total=10)
    run.steps_change(steps)
    clock[0], steps.done = 4.0, 2
    run.steps_change(steps)
    assert run.seconds_left() == pytest.approx(8 * 2.0 + 400 * 20.0 / 100)
    run.stage_ends("measure", "m", 10.0)
    assert run.seconds_left() == pytest.approx(40.0)
    run.stage_begins("finetune", "f")
    clock[0] += 15.0
    assert run.seconds_left() == pytest.approx(25.0)
    resumed = Steps("finetune", "step", total=100, done=60)
    run.steps_change(resumed)
    clock[0], resumed.done = clock[0] + 10.0, 80
    assert run.seconds_left() == pytest.approx(10.0)  # 20 steps, as fast as the 20 of this process
    run.stage_ends("finetune", "f", 30.0)
    run.stage_ends("prune", "p", 0.1)
    run.stage_ends("speed", "whatever", 5.0)
    assert run.seconds_left() is None  # nothing is left


def test_arms_that_were_finished_are_not_waited_for(clock):
    run = RunProgress([("dense", PLAN), ("gradpruner", PLAN)])
    run.begin_arm(1)
    run.stage_begins("measure", "m")
    run.stage_ends("measure", "m", 1.0)
    assert run.seconds_left() == pytest.approx(4.0)


def test_stages_behind_a_teacher_are_named_only_while_they_take_time(clock, caplog):
    run = RunProgress([("gradpruner", PLAN)])
    with caplog.at_level(logging.INFO):
        for seconds, stage_id in ((None, "dense's"), (2.0, "dense's"), (None, "p")):
            run.stage_begins("prune", stage_id)
            run.stage_ends("prune", stage_id, seconds)
    assert caplog.messages == ["[-/4] gradpruner: prune took 2.0 s", "[2/4] gradpruner: prune is cached"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "a few seconds"), (12, "about 10 s"), (58, "about 1 min"), (3000, "about 50 min"), (9000, "about 2.5 h")],
)
def test_times_are_rough(seconds, text):
    assert describe_seconds(seconds) == text


def test_a_terminal_shows_one_line(monkeypatch, clock, caplog):
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    root = logging.getLogger()
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(root, "handlers", [handler])
    run = RunProgress([("gradpruner", PLAN)], "run 2 of 3 ")
    with run.shown():
        run.stage_begins("measure", "m")
        for _ in track(range(4), "measure", "step"):
            clock[0] += 1.0
        run.stage_ends("measure", "m", 4.0)
        run.stage_begins("prune", "p")
    lines = [line.strip() for line in terminal.getvalue().replace("\r", "\n").splitlines()]
    assert "run 2 of 3 [1/4] gradpruner: measure took 4.0 s, about 20 s left" in lines
    assert any(line.startswith("run 2 of 3 [1/4] gradpruner: measure |") and "2/4 step" in line for line in lines)
    assert "run 2 of 3 [2/4] gradpruner: prune, about 20 s left" in lines
    assert root.handlers == [handler]


def test_the_library_has_bars_on_a_terminal_and_none_elsewhere(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(track([1, 2], "repair", "run")) == [1, 2]
        assert ("repair: 100%" in stream.getvalue()) == shown and bool(stream.getvalue()) == shown


def test_the_bar_of_a_gguf_file_is_for_terminals(monkeypatch):
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "tqdm", modeling_gguf_pytorch_utils.tqdm)  # put back
    quiet_libraries()
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(modeling_gguf_pytorch_utils.tqdm([1, 2], desc="tensors")) == [1, 2]
        assert bool(stream.getvalue()) == shown


@pytest.mark.parametrize(("method", "at_least"), [(LaCo(sparsity=0.5), 0.5), (Perplexity(sparsity=0.5), 0.99)])
def test_methods_that_try_each_layer_are_expected_to_take_longer(
    method, at_least, make_pipeline, tiny_llama, make_batches, tmp_path
):
    config = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    pipeline = make_pipeline(config, method, TrainingSpec(max_steps=1))
    length, _ = tokens_per_row(pipeline.rows)
    one_row = count_model(pipeline.config).flops(1, length, logit_positions=1)
    expected = stage_flops(pipeline)["measure"] / one_row / len(pipeline.rows)

    model, calls = tiny_llama(num_hidden_layers=6), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    method.resolve(6).measure(model, make_batches(1), tmp_path)
    assert at_least * expected <= len(calls) / 6 <= 2 * expected


def test_a_log_has_a_line_per_stage(tmp_path):
    arguments = ("debug=smoke", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", "reference=null")
    computed = call(main, *arguments)
    assert computed.returncode == 0, computed.stderr
    assert "\r" not in computed.stderr and "it/s" not in computed.stderr
    names = ("measure", "prune", "predict before", "evaluate before", "finetune", "predict", "evaluate")
    for number, name in enumerate(names, start=1):
        assert computed.stderr.count(f"[{number}/7] gradpruner: {name} took ") == 1
    again = call(main, *arguments, "rerun=true")
    for number, name in ((2, "prune"), (5, "finetune"), (7, "evaluate")):
        assert again.stderr.count(f"[{number}/7] gradpruner: {name} is cached") == 1
    assert " took " not in again.stderr and " left" not in again.stderr
