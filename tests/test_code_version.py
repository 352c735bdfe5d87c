"""The code part of a stage's key: derived from imports, frozen when the process starts, and complete."""

import importlib
import sys
from fnmatch import fnmatch

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.grad_pruner import GradPruner
from gradpruner.pipeline import code_version as module
from gradpruner.pipeline import evaluation_stages as asking
from gradpruner.pipeline import stages
from gradpruner.pipeline.code_version import CANNOT_CHANGE_RESULTS, SOURCES, cannot_change_results, modules_of
from tests.test_imports import MODULES, ROOT

TOY = {
    "__init__": "",
    "stages": '''"""Stages."""
from typing import TYPE_CHECKING
from toy import used
from toy.other import other
from toy.checked import check
if TYPE_CHECKING:
    from toy.typed import Typed
FACTOR = 3
def helper(x):
    return used.work(x) * FACTOR
def make(x: "Typed"):
    """Makes."""
    check(x)
    def compute():
        return helper(x)
    return compute
def another(x):
    return other(x)
''',
    "used": "def work(x):\n    from toy.deep import depth\n    return depth(x)\n",
    "deep": "def depth(x):\n    return x + 1  # why\n",
    "other": "def other(x):\n    return x\n",
    "checked": "def check(x):\n    assert x\n",
    "typed": "Typed = int\n",
}


def forget():
    """Forgets what was derived from the sources."""
    for function in (module._tree, module._module_hash, module.imported_modules):
        function.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Makes a package, and gives a function that edits its files and says what a process started then would hash."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in TOY.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(CANNOT_CHANGE_RESULTS, "toy.checked", "a test")
    make = importlib.import_module("toy.stages").make

    def restart():
        monkeypatch.setattr(module, "SOURCES", module._read_sources(["toy"]))
        forget()

    def edit(name, old, new):
        file = folder / f"{name}.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    def version(restarted=True):
        if restarted:
            restart()
        return module.code_version(make)

    version.edit, version.make = edit, make
    yield version
    forget()
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def test_modules_are_found_through_functions_and_late_imports(toy):
    toy()
    assert modules_of(toy.make) == ["toy.deep", "toy.used"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("deep", "x + 1", "x + 2"),
        ("used", "depth(x)\n", "depth(x) + 0\n"),
        ("stages", "FACTOR = 3", "FACTOR = 4"),
        ("stages", "return helper(x)", "return -helper(x)"),
    ],
)
def test_a_change_of_what_a_stage_does_is_another_version(toy, name, old, new):
    before = toy()
    toy.edit(name, old, new)
    assert toy() != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("deep", "# why", "# for this reason"),
        ("stages", '"""Makes."""', '"""Makes it."""'),
        ("stages", '"""Stages."""', '"""Some stages."""'),
        ("stages", "return other(x)", "return -other(x)"),
        ("other", "return x", "return -x"),
        ("typed", "int", "float"),
        ("checked", "assert x", "assert x > 0"),
    ],
)
def test_prose_and_what_a_stage_does_not_use_are_no_other_version(toy, name, old, new):
    before = toy()
    toy.edit(name, old, new)
    assert toy() == before


def test_code_that_is_edited_while_a_process_runs_does_not_change_its_keys(toy):
    before = toy()
    toy.edit("deep", "x + 1", "x + 2")
    forget()  # as if no key had been asked for yet
    assert toy(restarted=False) == before
    assert toy() != before


def all_modules_of_stages():
    methods = [get_class(OmegaConf.load(file)._target_) for file in sorted((ROOT / "conf/method").glob("*.yaml"))]
    assert len(methods) > 10
    found = set()
    for method in methods:
        for make in (
            stages.measure_stage,
            stages.decide_stage,
            stages.prune_stage,
            stages.repair_stage,
            stages.finetune_stage,
        ):
            found |= set(modules_of(make, method))
    for evaluation in (Likelihood, Generation):
        found |= set(modules_of(asking.predict_stage, evaluation)) | set(modules_of(asking.evaluate_stage, evaluation))
    others = (stages.recover_stage, asking.speed_stage, asking.vllm_stage)
    return found.union(*(modules_of(make) for make in others))


def test_every_module_is_part_of_a_stage_or_said_not_to_matter():
    ours = {name for name in MODULES if not name.startswith("experiments")}
    assert ours == set(SOURCES) & ours
    # The stages themselves count function by function.
    in_neither = {
        name
        for name in ours - all_modules_of_stages() - {stages.__name__, asking.__name__}
        if not cannot_change_results(name)
    }
    assert not in_neither, (
        f"{sorted(in_neither)} is used by no stage. If it cannot change a result, say why in "
        "gradpruner.pipeline.code_version.CANNOT_CHANGE_RESULTS."
    )


def test_no_pattern_is_left_over():
    for pattern, reason in CANNOT_CHANGE_RESULTS.items():
        assert reason and any(fnmatch(name, pattern) for name in MODULES), pattern


@pytest.mark.parametrize(
    ("make", "user", "expected"),
    [
        # With sparsity=auto, deciding prunes, merges and repairs.
        (stages.decide_stage, GradPruner, {"merge", "plan", "models.architectures", "repair", "auto_sparsity"}),
        (
            asking.speed_stage,
            None,
            {"finetune.run", "finetune.trainer", "pipeline.speed_process", "encoding"},
        ),
        (stages.finetune_stage, GradPruner, {"finetune.run", "finetune.trainer", "surgery"}),
        (
            asking.evaluate_stage,
            Generation,
            {"evaluate.accuracy", "evaluate.rouge_l", "evaluate.bertscore_f1"},
        ),
    ],
)
def test_what_had_been_forgotten_counts(make, user, expected):
    assert {f"gradpruner.{name}" for name in expected} <= set(modules_of(make, *([user] if user else [])))
