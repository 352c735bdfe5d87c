"""Every table and figure of the paper has a preset in two scales: it composes, and every cell of its sweep builds.

A cell passes all checks that a run makes before it loads weights. Data and Hub configs are faked: no network is needed.
"""

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import open_dict
from transformers import LlamaConfig

from experiments.config import CONF, build_pipeline, run_directory
from experiments.job import check_prunes
from experiments.paper_scale import DATA
from experiments.schema import ConfigError
from experiments.sweep import is_left_out
from gradpruner.encoding import TrainingRow
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.offline_configs import shipped_config, shipped_ids
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.run import Pipeline

SCALES = ("small", "paper")
OURS = {"importance", "repair", "learning_rate", "recipe"}  # also in both scales
NOT_OF_THE_PAPER = {"quickstart", "depth", "width", "paper", *OURS}
TABLES = {path.stem for path in (CONF / "experiment").glob("*.yaml")} - NOT_OF_THE_PAPER
PRESETS = [(name, scale) for name in sorted(TABLES | OURS) for scale in SCALES]
SMOLLM2 = LlamaConfig(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                      num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192)  # fmt: skip


def number_of_rows(task):
    """Returns the training rows that a task has at its scale, less those held out."""
    rows = DATA[task.name].num_train if task.source == "hub" and task.name in DATA else 320
    return round(rows * (1 - (task.validation_fraction or 0)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def load_config(self, folder):
        return shipped_config(self.path) if self.path in shipped_ids() else SMOLLM2

    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(ModelSpec, "load_config", load_config)
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    monkeypatch.setattr(ModelSpec, "check_weights", lambda *args: None)
    row = TrainingRow((0, 1), 1)
    monkeypatch.setattr(Pipeline, "rows", property(lambda setup: [row] * number_of_rows(setup.task)))
    empty = {name: [] for name in ("recovery_rows", "questions", "train_examples", "test_examples")}
    encoder = SimpleNamespace(tokenizer=SimpleNamespace(bos_token=None, bos_token_id=None))
    for name, value in {**empty, "num_dense_parameters": 1, "encoder": lambda *args: encoder}.items():
        monkeypatch.setattr(Pipeline, name, value)


def config(*overrides):
    """Returns the config as a sweep's job gets it, with hydra's own node."""
    return copy.deepcopy(composed(*overrides))


@functools.cache  # several tests look at the same cells
def composed(*overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


@functools.cache
def axes(name, scale):
    """Returns the values of each key in a preset's sweep."""
    params = config(f"experiment={name}", f"scale={scale}").hydra.sweeper.params or {}
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    values = [o.sweep_string_iterator() if o.is_sweep_override() else [o.get_value_element_as_str()] for o in overrides]
    return {override.key_or_group: list(each) for override, each in zip(overrides, values, strict=True)}


def all_cells(name, scale):
    values = axes(name, scale)
    return [
        [f"{key}={value}" for key, value in zip(values, cell, strict=True)]
        for cell in itertools.product(*values.values())
    ]


def some_cells(name, scale):
    """Returns the fewest cells that contain every value of every key except the dataset; datasets rotate."""
    values = axes(name, scale)
    count = max(len(each) for key, each in values.items() if key != "dataset")
    return [[f"{key}={each[index % len(each)]}" for key, each in values.items()] for index in range(count)]


def check_cell(name, scale, cell, tmp_path):
    """Does what a run does before it loads weights; returns the pipeline, or None for a skipped cell."""
    cfg = config(f"experiment={name}", f"scale={scale}", *cell)
    cfg.cache_dir = str(tmp_path)
    HydraConfig.instance().cfg = cfg  # `no_network` restores it
    left_out = is_left_out(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if left_out:
        return None
    pipeline = build_pipeline(cfg)
    pipeline.check(resources=False)
    check_prunes(pipeline)
    run_directory(cfg, pipeline)
    return pipeline


def test_there_is_a_preset_for_every_table_and_figure_with_runs():
    numbers = {*(f"table{n}" for n in range(1, 14) if n != 11), *(f"figure{n}" for n in (1, 2, 5, 6, 7, 8, 9))}
    assert numbers == TABLES


@functools.cache
def files_of(*overrides):
    """Returns the files of conf/experiment/ that make up a config, except those that only include another file."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults
    paths = {default.config_path for default in defaults if default.config_path.startswith("experiment/")}
    return sorted(path for path in paths if set(yaml.safe_load((CONF / f"{path}.yaml").read_text())) != {"defaults"})


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(TABLES | NOT_OF_THE_PAPER))
def test_a_preset_is_understood_from_three_files(name, scale):
    methods = axes(name, scale).get("method", ["gradpruner"])
    with_file = {
        path.stem.removeprefix(f"{scale}_") for path in (CONF / "experiment/base/methods").glob(f"{scale}_*.yaml")
    }
    rest = [method for method in methods if method not in with_file]
    for method in [*(method for method in methods if method in with_file), *rest[:1]]:
        files = files_of(f"experiment={name}", f"scale={scale}", f"method={method}")
        assert 1 <= len(files) <= 3, files


@pytest.mark.parametrize(("name", "scale"), PRESETS)
def test_values_of_a_sweep_build(name, scale, tmp_path):
    pipelines = [check_cell(name, scale, cell, tmp_path) for cell in some_cells(name, scale)]
    assert any(pipelines)
    for pipeline in filter(None, pipelines):
        hub = not pipeline.model.path.startswith("packaged:")
        assert hub == (scale == "paper") and pipeline.task.source == ("hub" if hub else "packaged")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), PRESETS)
def test_every_cell_of_a_sweep_builds(name, scale, tmp_path):
    assert any([check_cell(name, scale, cell, tmp_path) for cell in all_cells(name, scale)])


@pytest.mark.parametrize(
    ("name", "scale", "cell", "expected"),
    [
        ("table1", "paper", ["model=llama3_1_8b", "method=gradpruner"], (13, 3)),
        ("table1", "paper", ["model=mistral_7b_v0_3", "method=gradpruner"], (13, 2)),
        ("table1", "small", ["method=gradpruner"], (12, 3)),
        ("table3", "paper", ["model=llama3_1_8b", "method=gradpruner", "merge_count=1"], (11, 1)),
        ("table3", "paper", ["model=llama3_1_8b", "method=igia_only", "merge_count=3"], (13, 0)),
        ("table3", "small", ["method=gradpruner", "merge_count=3"], (12, 3)),
        ("table4", "paper", ["model=mistral_7b_v0_3", "method=gradpruner", "merge_count=1"], (12, 1)),
        ("table4", "paper", ["model=llama3_1_8b", "method=igia_only", "merge_count=2"], (12, 0)),
        ("table7", "paper", ["model=llama3_2_1b", "method=gradpruner"], (6, 3)),
        ("table7", "paper", ["model=llama2_13b", "method=gradpruner"], (16, 3)),
    ],
)
def test_layers_are_the_papers(name, scale, cell, expected, tmp_path):
    method = check_cell(name, scale, cell, tmp_path).resolved_method
    assert (method.num_pruned_layers, method.merge_count) == expected


def test_a_table_gives_methods_what_they_need_at_its_scale():
    small, paper = (config("experiment=table1", f"scale={scale}", "method=gradpruner").method for scale in SCALES)
    assert (small.merge_rule, small.steps, small.fraction) == ("sign_average", 12, None)
    assert (paper.merge_rule, paper.steps, paper.fraction) == ("sign_sum", None, 0.01)
    ours = ("igia_only", "kernel_igia", "gradpruner_plus")  # rank layers by as many steps
    assert [config("experiment=table1", f"method={name}").method.steps for name in ours] == [12] * 3
    assert config("experiment=table8", "method=gradpruner", "method.steps=5").method.steps == 5
    assert config("experiment=table1", "method=minitron").method.recover_on is None
    assert config("experiment=table1", "scale=paper", "method=minitron").method.recover_on == "alpaca"


@pytest.mark.parametrize("name", sorted(TABLES | OURS | {"paper"}))
def test_an_importance_step_sees_the_rows_of_a_training_step(name):
    cells = some_cells(name, "paper") if axes(name, "paper") else [[]]
    configs = [config(f"experiment={name}", "scale=paper", *cell) for cell in cells]
    targets = [get_class(cfg.method._target_) for cfg in configs]
    rows = [
        (cfg.method.batch_size * cfg.method.accumulation, cfg.finetune.batch_size)
        for cfg, target in zip(configs, targets, strict=True)
        if issubclass(target, GradPruner)
    ]
    assert bool(rows) == (name != "figure1")  # whose runs are all dense
    assert set(rows) <= {(64, 64)}


@pytest.mark.parametrize("overrides", [[], ["method=apt"], ["experiment=depth", "method=minitron"]])
def test_scale_changes_the_finetune_alone_elsewhere(overrides):
    """Rate and batch, which a preset that sets them (depth) keeps; see test_configs.py for the values."""
    small, paper = (config(f"scale={scale}", *overrides) for scale in SCALES)
    assert (small.finetune == paper.finetune) == ("experiment=depth" in overrides)
    for cfg in (small, paper):
        with open_dict(cfg):
            del cfg["hydra"], cfg["finetune"]
    assert small == paper and "scale" not in small


@pytest.mark.parametrize(
    ("name", "cell", "left_out"),
    [
        ("table1", ["method=apt", "finetune=full"], True),
        ("table1", ["method=apt", "finetune=lora"], False),
        ("table1", ["method=small_dense", "model=mistral_7b_v0_3"], True),
        ("learning_rate", ["method=apt", "finetune=full"], True),
        ("learning_rate", ["method=apt", "finetune=lora"], False),
        ("table4", ["model=mistral_7b_v0_3", "merge_count=3"], True),
        ("table4", ["model=llama3_1_8b", "merge_count=3", "finetune=lora"], False),
    ],
)
def test_cells_that_make_no_sense_are_left_out(name, cell, left_out, tmp_path):
    assert (check_cell(name, "paper", cell, tmp_path) is None) == left_out


@pytest.mark.parametrize("name", [*sorted(TABLES), "paper"])
def test_the_papers_scale_measures_as_the_papers_evaluation(name, tmp_path):
    cell = some_cells(name, "paper")[0] if axes(name, "paper") else []
    evaluation = build_pipeline(config(f"experiment={name}", "scale=paper", f"cache_dir={tmp_path}", *cell)).evaluation
    assert (evaluation.name, evaluation.accuracy, evaluation.rouge_stemming) == ("generate", "raw", True)
    assert (evaluation.max_new_tokens, evaluation.bertscore_model) == (512, "roberta-large")


def test_table_12_asks_for_letters_as_the_papers_file_does(tmp_path):
    for scale, target in (("small", "text"), ("paper", "letter")):
        pipeline = check_cell("table12", scale, some_cells("table12", scale)[0], tmp_path)
        assert pipeline.test_task.target == target and getattr(pipeline.task, "target", target) == target


def test_an_unknown_key_to_exclude_is_refused():
    HydraConfig.instance().cfg = config("hydra.callbacks.sweep.exclude=[{methd: apt}]")
    with pytest.raises(
        ConfigError, match=r"exclude may name config groups and keys, got 'methd'\. Correct it in the YAML"
    ):
        is_left_out(config())


def test_apt_has_room_for_its_cuts_on_every_dataset(tmp_path):
    found = {}
    for dataset in DATA:  # this preset has the fewest rows: some are held out
        pipeline = check_cell("learning_rate", "paper", [f"dataset={dataset}", "method=apt", "finetune=lora"], tmp_path)
        found[dataset] = pipeline.resolved_method.num_cuts, pipeline.resolved_method.min_interval
    small = dict.fromkeys(("pubmedqa", "arc_easy", "winogrande"), (1, 1))
    large = dict.fromkeys(("medmcqa", "fingpt", "hellaswag"), (2, 200))
    assert found == {**small, **large, "billsum": (1, 200), "piqa": (1, 200)}  # 200: the authors' least interval


def test_table_1_has_both_schedules_of_sat():
    for scale in SCALES:
        assert {"sat", "sat_constant"} <= set(axes("table1", scale)["method"])


def test_learning_rates_are_chosen_on_validation_rows(tmp_path):
    values = axes("learning_rate", "small")
    assert values["finetune"] == ["full"] and len(values["finetune.learning_rate"]) == 3
    pipeline = check_cell("learning_rate", "small", all_cells("learning_rate", "small")[0], tmp_path)
    assert pipeline.task.validation_fraction == 0.1 and not pipeline.evaluate_before


def test_a_table_is_a_sweep_without_asking():
    assert config("experiment=table6").hydra.mode == RunMode.MULTIRUN
    assert config("experiment=paper").hydra.mode != RunMode.MULTIRUN
