"""Every YAML under conf/ composes and builds; the command line refuses invalid settings."""

import dataclasses
import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_class
from omegaconf import OmegaConf

from baselines.calibration import Calibrated
from baselines.width_pruning import WidthPruning
from experiments import schema
from experiments.config import CONF, build_pipeline, identity, run_directory
from gradpruner.depth_method import DepthMethod
from gradpruner.files import content_hash
from gradpruner.finetune import TrainingSpec
from gradpruner.models import ModelSpec
from gradpruner.tasks import Task

GROUPS = ("model", "dataset", "finetune", "method", "evaluation", "tracker", "debug", "experiment")
CASES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
BASES = {
    "dataset/base/task": Task,
    "model/base/model": ModelSpec,
    "method/base/depth": DepthMethod,
    "method/base/width": WidthPruning,
    "method/base/calibrated": Calibrated,
    "finetune/base/paper": TrainingSpec,  # whose defaults are the paper's
}
# Fields in which an option may differ from its class: many options share the class, so one default cannot fit all.
OPTIONS_OWN = {
    "model": {"dtype", "config"},
    "dataset": {"prompt_with_options", "show_options", "max_train_samples", "max_length", "max_new_tokens", "metrics"},
    "method": {"recover_on", "recover_training"},  # off by default in the library, the authors' in experiments
    "finetune": {"mode", "learning_rate", "batch_size", "micro_batch_size"},  # the class has the paper's
    "evaluation": {"accuracy", "rouge_stemming", "max_new_tokens", "bertscore_model"},  # the paper's
}
OWN_DATA = [
    "dataset.train_file=train.jsonl",
    "dataset.test_file=test.jsonl",
    "dataset.prompt='{question}'",
    "dataset.answer_field=answer",
]


@functools.cache  # several tests look at the same config, and none changes it
def config(*overrides):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_there_is_something_to_test():
    assert {group for group, _ in CASES} == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), CASES)
def test_every_yaml_composes_and_builds(group, name):
    overrides = [f"{group}={name}", *(OWN_DATA if name == "jsonl" else [])]
    cfg = config(*overrides)
    build_pipeline(cfg)
    schema.build(cfg.tracker, "tracker")


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "method").glob("*.yaml"))])
def test_a_method_has_the_name_of_its_yaml(name):
    assert build_pipeline(config(f"method={name}")).method.name == name


def test_model_path_takes_any_hub_id_or_folder():
    cfg = config("model.path=org/Some-Model")
    assert build_pipeline(cfg).model.name == "Some-Model"
    assert "Some-Model/arc_easy/lora/gradpruner/sparsity0.4-merge3-" in str(run_directory(cfg, build_pipeline(cfg)))


def test_names_of_folders_have_rounded_numbers():
    cfg = config("model.path=org/m", "sparsity=0.36666666666666664")
    assert "/sparsity0.3667-merge3-" in str(run_directory(cfg, build_pipeline(cfg)))


def test_root_keys_reach_the_method():
    method = build_pipeline(config("sparsity=0.3", "merge_count=1", "seed=7")).method
    assert (method.sparsity, method.merge_count, method.seed) == (0.3, 1, 7)


def test_identity_is_what_results_depend_on():
    def key(*overrides):
        return content_hash(identity(config(*overrides)))

    assert key() == key("tracker=wandb", "save_checkpoint=true", "reference=null", "output_dir=/tmp/x")
    assert key() != key("method.density=0.3")
    assert key() != key("seed=1")
    assert key("method=dense") == key("method=dense", "sparsity=0.3", "merge_count=0")  # one dense run per sweep


def test_engines_are_part_of_the_identity_but_not_where_one_is_or_what_older_runs_had():
    def key(*overrides):
        return content_hash(identity(config("evaluation=generate", *overrides)))

    assert key() == key("evaluation.vllm_python=/x/python")
    assert not {"engine", "vllm_dtype", "vllm_python"} & set(identity(config("evaluation=generate"))["evaluation"])
    vllm = "evaluation.engine=vllm"
    assert len({key(), key(vllm), key(vllm, "evaluation.vllm_dtype=bfloat16")}) == 3


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(MissingConfigException, match=r"(?s)method/gradprunr.*gradpruner"):
        config("method=gradprunr")


def test_unknown_key_is_refused():
    with pytest.raises(ConfigCompositionException, match="sparsty"):
        config("sparsty=0.3")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["method.steps=many"], r"steps must be a number or auto, got .many."),
        (["finetune.batch_size=2.5"], r"Bad value in finetune.*finetune\.batch_size"),
        (["+model.flavour=mild"], r"There is no key 'model\.flavour'\. Known in model: path, revision, "),
        (["dataset=jsonl"], r"JsonLines needs .*dataset\.train_file.*Give it on the command line"),
        (["sparsity=1.5"], r"sparsity is the fraction of decoder layers to prune, in \[0, 1\), got 1\.5"),
        (["sparsity=null"], r"Give either sparsity or num_pruned_layers, got sparsity=None and num_pruned_layers=None"),
        (["method.num_pruned_layers=3"], r"Give either sparsity or num_pruned_layers, got sparsity=0\.4"),
        (["method.steps=1"], r"at least 2 steps, got steps=1"),
        (["method.fraction=0.01"], r"Give either steps or fraction, got steps=40 and fraction=0\.01"),
        (["finetune.mode=half"], r"finetune\.mode must be one of full, lora, got 'half'"),
        (["finetune.epochs=0"], r"epochs must be above 0, got 0.*finetune\.epochs"),
        (["finetune.micro_batch_size=7"], r"batch_size must be a multiple of micro_batch_size, got 4 and 7"),
        (["finetune.max_steps=0"], r"max_steps must be 1 or more"),
        (["finetune.warmup_fraction=3"], r"warmup_fraction must be in \[0, 1\), got 3"),
        (["model.dtype=float8"], r"model\.dtype must be one of auto, float32"),
        (["+model.config={num_hidden_layers: 2}"], r"model\.config only describes random: models"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(overrides, match):
    with pytest.raises(ValueError, match=match):
        build_pipeline(config(*overrides))


def test_bad_tracker_mode():
    with pytest.raises(ValueError, match=r"tracker\.mode must be one of online, offline, got 'loud'"):
        schema.build(config("tracker=wandb", "tracker.mode=loud").tracker, "tracker")


def test_yaml_fields_are_all_the_fields_of_the_class():
    """A field missing from its YAML could not be set on the command line."""
    for group, name in CASES:
        if group in ("debug", "experiment", "evaluation", "tracker"):
            continue
        node = config(f"{group}={name}")[group]
        fields = {field for field in schema._unfrozen(schema.get_class(node._target_)).__dataclass_fields__}
        optional = {"config"} if group == "model" else set()
        missing = fields - set(node) - optional
        assert not missing - {"source", "path", "revision"} or name != "jsonl", (name, missing)
        if name != "jsonl":
            assert not missing, (name, missing)


def differing(node, target):
    """Returns {key: (value, default)} where a node differs from the defaults of its class; skips interpolations."""
    fields = {field.name: field.default for field in dataclasses.fields(target)}
    found = {}
    for key, value in OmegaConf.to_container(node, resolve=False).items():
        default = fields.get(key, dataclasses.MISSING)
        value = tuple(value) if isinstance(value, list) else value
        if default is dataclasses.MISSING or str(value).startswith("${"):
            continue
        if value != default:
            found[key] = (value, default)
    return found


@pytest.mark.parametrize(("group", "name"), [case for case in CASES if case[0] not in ("debug", "experiment")])
def test_a_yaml_repeats_no_default_wrongly(group, name):
    node = config(f"{group}={name}")[group]
    found = differing(node, get_class(node._target_))
    assert not set(found) - OPTIONS_OWN.get(group, set()), found


@pytest.mark.parametrize(("file", "target"), BASES.items())
def test_a_base_has_the_defaults_of_its_class(file, target):
    node = OmegaConf.load(CONF / f"{file}.yaml")
    assert set(node) & {field.name for field in dataclasses.fields(target)} and not differing(node, target)


def test_every_base_is_compared():
    files = {
        str(path.relative_to(CONF).with_suffix("")) for group in GROUPS[:-1] for path in CONF.glob(f"{group}/base/*")
    }
    assert files - {"model/base/hub"} == set(BASES)


PAPERS_FINETUNE = (1e-5, 64, 8, 3)  # learning rate, batch, micro batch, epochs
TUNED = {"lora": (1e-3, 4, 4, 3), "full": (1e-4, 4, 4, 3)}  # outside of scale=paper
SHORT = {"quickstart", "depth", "width"}  # presets with base/short.yaml, whatever the scale


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", [None, *(path.stem for path in sorted((CONF / "experiment").glob("*.yaml")))])
def test_presets_do_not_depend_on_the_defaults_of_the_finetune(name, mode):
    small = {"lora": (1e-3, 4, 4, 1), "full": (1e-4, 4, 4, 1)}[mode]
    if name is None:
        small = TUNED[mode]
    paper = PAPERS_FINETUNE
    if name == "paper":
        small = PAPERS_FINETUNE
    elif name in SHORT:
        small = paper = (1e-3, 4, 4, 1)
    for scale, expected in (("small", small), ("paper", paper)):
        chosen = [f"finetune={mode}", f"scale={scale}", *([f"experiment={name}"] if name else [])]
        node = config(*chosen).finetune
        assert (node.learning_rate, node.batch_size, node.micro_batch_size, node.epochs) == expected


def test_conf_is_where_the_runner_looks():
    assert Path(CONF, "config.yaml").is_file()
