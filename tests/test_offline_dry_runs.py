"""Dry runs of every preset, model and dataset answer without a network, and read no more than they need."""

import dataclasses
import functools
import io
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments import dry_run
from experiments.config import CONF, build_pipeline, identity
from experiments.dry_run import cell_costs, prepare_dry_run, show_dry_run
from gradpruner.files import content_hash
from gradpruner.models import hub
from gradpruner.models.memory import MemoryEstimate
from gradpruner.models.offline_configs import OfflineModelSpec, UnconvertedModelSpec, shipped_ids
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline import stand_in_rows
from gradpruner.pipeline.stand_in_rows import has_stand_in_rows
from gradpruner.tasks import DataError, Task
from gradpruner.tasks.published_sizes import SIZES

PRESETS = [(path.stem, "paper") for path in sorted((CONF / "experiment").glob("*.yaml"))] + [("table1", "small")]
HUB_MODELS = [path.stem for path in sorted((CONF / "model").glob("*.yaml")) if "base/hub" in path.read_text()]
DATASETS = [path.stem for path in sorted((CONF / "dataset").glob("*.yaml")) if path.stem != "jsonl"]


@pytest.fixture(scope="module")
def seen():
    """Returns the configs that were tested."""
    return set()


@pytest.fixture(scope="module")
def read():
    """Returns `Task.load`, which reads equal rows once."""
    return functools.cache(Task.load)


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer with a token per word: the real one takes seconds to load, and bytes are too many."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch, read, tokenizer, tmp_path):
    """No Hub, no weights, a tokenizer that is loaded once, and no measurements."""
    functions = (hub.use_cache_without_hub, hub.resolve_commit)
    for function in functions:
        function.cache_clear()
    monkeypatch.setattr(hub, "unreachable_reason", lambda: "no route")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **settings: _raise(ConnectionError("no route")))
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    monkeypatch.setattr(OfflineModelSpec, "load_tokenizer", lambda self, folder: tokenizer)
    monkeypatch.setattr(Task, "load", read)
    monkeypatch.setattr(dry_run, "measure_matmul_flops", lambda *args: 1e12)
    stand_in_rows.warn_once.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def _raise(error):
    raise error


def config(tmp_path, *overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"cache_dir={tmp_path}/cache", *overrides])


def prepared(tmp_path, *overrides, cfg=None):
    pipeline = prepare_dry_run(build_pipeline(cfg or config(tmp_path, *overrides)))
    pipeline.check(resources=False)
    return pipeline


@pytest.fixture
def no_memory_estimates(monkeypatch):
    """Leaves out what takes a second per estimate; `test_dry_run` has it."""
    parts = dict.fromkeys(("total", *(field.name for field in dataclasses.fields(MemoryEstimate))), 1)
    for function in ("training_memory", "importance_memory"):
        monkeypatch.setattr(dry_run, function, lambda *args: SimpleNamespace(**parts))


@pytest.mark.parametrize(("name", "scale"), PRESETS)
def test_every_preset(name, scale, tmp_path, no_memory_estimates, seen):
    cfg = config(tmp_path, f"experiment={name}", f"scale={scale}")
    if (same := content_hash(identity(cfg))) in seen:  # only the cells of their sweeps differ
        return
    seen.add(same)
    pipeline = prepared(tmp_path, cfg=cfg)
    costs = cell_costs(pipeline)
    assert costs.steps == pipeline.training.num_steps(len(pipeline.rows)) > 0 and costs.num_parameters > 1e6
    assert costs.work["finetune"].seconds > 0
    assert [stage.label for stage in pipeline.planned() if stage.flops]
    assert isinstance(pipeline.model, OfflineModelSpec)
    if scale == "small":
        assert isinstance(pipeline.model, UnconvertedModelSpec) and not has_stand_in_rows(pipeline)


@pytest.mark.parametrize("model", HUB_MODELS)
def test_every_hub_model(model, tmp_path):
    pipeline = prepared(tmp_path, f"model={model}", "dataset=billsum")
    assert pipeline.config.num_hidden_layers >= 16 and pipeline.shape.layers


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset(name, tmp_path, caplog):
    size = SIZES[name]
    for split, count in (("train", size.num_train), ("test", size.num_test)):
        if count == 0:
            with pytest.raises(DataError, match=rf"{name} has no {split} split"):
                prepared(tmp_path, f"dataset={name}")
            return
    pipeline = prepared(tmp_path, f"dataset={name}")
    drawn = {"medmcqa": 40_000, "fingpt": 40_000, "winogrande": 10_234}.get(name, size.num_train)
    assert (len(pipeline.rows), len(pipeline.test_examples)) == (drawn, size.num_test)
    if name == "arc_easy":
        assert not has_stand_in_rows(pipeline) and "this dry run takes" not in caplog.text
        return
    tokens = sum(len(row.input_ids) for row in pipeline.rows) / drawn
    assert tokens == pytest.approx(min(size.tokens, pipeline.task.max_length), rel=0.01)
    assert max(len(row.input_ids) for row in pipeline.rows) <= pipeline.task.max_length
    reason = "has more than 4,000 rows" if drawn > 4_000 else "cannot be read without the Hub"
    assert any(f"The train split of {name} {reason}: this dry run takes the pub" in each for each in caplog.messages)


def test_the_output_says_what_is_estimated(tmp_path, no_memory_estimates):
    console = Console(record=True, width=140, file=io.StringIO())
    show_dry_run(prepared(tmp_path, "dataset=billsum", "model=llama3_2_1b"), tmp_path, console)
    output = console.export_text()
    assert "estimated tokens an epoch" in output and "18,949" in output and "3,269" in output
    assert "The rows of billsum were not read: their number is the published one, and lengths" in output
    assert "meta-llama/Llama-3.2-1B cannot be read from the Hub: layers and sizes are from the config" in output
    assert "Cached stages: unknown without the Hub" in output


def test_draws_are_counted(tmp_path):
    pipeline = prepared(tmp_path, "dataset=piqa", "dataset.validation_fraction=0.25", "dataset.train_fraction=0.5")
    assert len(pipeline.rows) == round(0.5 * (16_113 - round(0.25 * 16_113)))
    rows = prepared(tmp_path, "dataset=pubmedqa", "dataset.max_train_samples=30", "dataset.max_test_samples=20")
    assert (len(rows.rows), len(rows.test_examples)) == (30, 20)


def test_own_data_are_always_read(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n' * 3)
    (tmp_path / "test.jsonl").write_text('{"goal": "h", "sol1": "a", "sol2": "b", "label": 0}\n')
    pipeline = prepared(tmp_path, "dataset=piqa", "dataset.source=local", f"dataset.path={tmp_path}")
    assert len(pipeline.rows) == 3 and not has_stand_in_rows(pipeline)


def test_a_dataset_that_the_hub_refuses_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in_rows, "use_cache_without_hub", lambda: None)
    with pytest.raises(DataError, match="cannot be reached, asked for qiaojin/PubMedQA"):
        prepared(tmp_path, "dataset=pubmedqa")


def test_a_packaged_model_is_not_converted(tmp_path):
    pipeline = prepared(tmp_path, "dataset.max_train_samples=20", "dataset.max_test_samples=4")
    assert pipeline.config.num_hidden_layers == 30 and pipeline.fingerprint == "packaged:smollm2-135m@None"
    assert not (tmp_path / "cache" / "assets").exists() and "packaged:smollm2-135m" in shipped_ids()
