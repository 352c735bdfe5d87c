"""`debug=smoke` makes a short run of every preset, with any seed."""

import pytest
from commands import call
from hydra import compose, initialize_config_dir

from experiments.config import CONF, build_pipeline
from experiments.job import run_job
from experiments.run import main
from gradpruner.record import RunRecord

PRESETS = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))]


def config(*overrides, **settings):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides=["debug=smoke", *overrides], **settings)


@pytest.mark.parametrize("name", PRESETS)
def test_smoke_wins_over_every_preset(name):
    for scale in ("small", "paper"):
        cfg = config(f"experiment={name}", f"scale={scale}", return_hydra_config=True)
        assert cfg.hydra.mode is None and not cfg.hydra.sweeper.params
        pipeline = build_pipeline(cfg)
        task, training, method = pipeline.task, pipeline.training, pipeline.method
        assert (pipeline.model.path, task.name, task.source) == ("random:llama", "arc_easy", "packaged")
        assert (task.max_train_samples, task.max_test_samples, pipeline.test_task) == (16, 8, None)
        assert (training.max_steps, training.batch_size, training.micro_batch_size) == (2, 4, 2)
        assert (method.steps, method.fraction, method.batch_size, method.accumulation) == (8, None, 2, 1)
        assert (method.sparsity, method.merge_count) == (0.4, 1)
        assert pipeline.evaluation.name == "likelihood" and not pipeline.measure_speed


@pytest.mark.parametrize(
    ("method", "expected"), [("igia_only", (8, 100)), ("kernel_igia", (8, 100)), ("gradpruner_plus", ("auto", 8))]
)
def test_importance_runs_are_short(method, expected):
    method = build_pipeline(config(f"method={method}")).method
    assert (method.steps, method.max_steps) == expected


def test_minitron_needs_no_hub():
    assert build_pipeline(config("method=minitron")).recovery_task is None


def test_arguments_win_over_smoke():
    cfg = config("experiment=table3", "model=smollm2_135m", "dataset=piqa", "finetune.max_steps=5", "method.steps=3")
    pipeline = build_pipeline(cfg)
    assert (pipeline.model.path, pipeline.task.name) == ("packaged:smollm2-135m", "piqa")
    assert (pipeline.training.max_steps, pipeline.method.steps) == (5, 3)


def test_every_row_fits(tmp_path):
    """A random model's tokens are bytes: with this seed, a row has more of them than a dataset's default max_length."""
    cfg = config("experiment=paper", "seed=29", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache")
    longest = max(len(prompt) + len(each) for prompt, each in _tokens(build_pipeline(cfg)))
    assert longest > 512
    record = run_job(cfg)
    assert record.status == "finished" and record.config["finetune"]["mode"] == "full"


def _tokens(pipeline):
    return ((question.prompt, each) for question in pipeline.questions for each in question.completions)


def test_of_a_sweep_one_run_is_left(tmp_path, shared_cache):
    folders = [f"results_dir={tmp_path}/runs", f"cache_dir={shared_cache}"]
    done = call(main, "experiment=table3", "debug=smoke", *folders)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "runs").rglob("record.json")
    assert RunRecord.load(file.parent).config["method"]["_target_"] == "gradpruner.grad_pruner.GradPruner"
