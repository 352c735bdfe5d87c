"""Imports point one way, from experiments down to checks; there is no circle, and private names stay private.

`docs/architecture.md` shows the same layers as a picture.
"""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gradpruner", "baselines", "experiments")
# From the top down: a module may import from its own layer and from those below.
LAYERS = {
    "experiments": ("experiments*",),
    "reporting": ("gradpruner.reporting*", "gradpruner.record"),
    "baselines": ("baselines*",),
    "pipeline": ("gradpruner.pipeline*",),
    "method": (
        "gradpruner",
        *(
            f"gradpruner.{name}"
            for name in (
                "method",
                "depth_method",
                "dense",
                "grad_pruner",
                "gradpruner_plus",
                "in_memory",
                "auto_sparsity",
                "budget",
            )
        ),
        *(f"gradpruner.{name}" for name in ("candidates", "halving", "importance", "importance_spec", "stability")),
    ),
    "rooms": ("gradpruner.finetune*", "gradpruner.repair*", "gradpruner.evaluate*", "gradpruner.checkpoints*"),
    "surgery": tuple(
        f"gradpruner.{name}"
        for name in ("surgery", "width_surgery", "hidden_states", "layer_scores", "partial_pass", "answer_judge")
    ),
    "parts": (
        *("gradpruner.models*", "gradpruner.tasks*", "gradpruner.encoding"),
        *("gradpruner.conversation_rows", "gradpruner.data_warnings", "gradpruner.batch_rows"),
        *(f"gradpruner.{name}" for name in ("plan", "igia", "merge", "gradients")),
    ),
    "ground": tuple(
        f"gradpruner.{name}"
        for name in (
            *(
                "caveats",
                "checks",
                "files",
                "runtime",
                "cost",
                "messages",
                "record_sections",
                "waiting",
                "processes",
                "progress",
                "lease",
            ),
        )
    ),
}
LIBRARIES_OF_EXPERIMENTS = ("hydra", "omegaconf", "wandb")


def read_modules():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = [file.relative_to(ROOT).with_suffix("").parts for file in files]
    dotted = [".".join(part for part in parts if part != "__init__") for parts in names]
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(dotted, files, strict=True)}


MODULES = read_modules()


def imports(tree):
    """(module, name) of every import, wherever it is in the file; name is None for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def imported(tree):
    """Our own modules among them."""
    candidates = {f"{module}.{name}" if f"{module}.{name}" in MODULES else module for module, name in imports(tree)}
    return candidates & set(MODULES)


def layers_of(module):
    return [layer for layer, patterns in LAYERS.items() if any(fnmatch(module, pattern) for pattern in patterns)]


def test_there_are_modules_to_test():
    assert {"gradpruner.merge", "baselines.laco", "experiments.run"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_is_in_one_layer_and_imports_nothing_from_above(module):
    [layer] = layers_of(module)
    order = list(LAYERS)
    above = {
        other
        for other in imported(MODULES[module])
        for upper in layers_of(other)
        if order.index(upper) < order.index(layer)
    }
    assert not above, f"{module} ({layer}) imports {sorted(above)}"


def test_there_is_no_circle():
    left = {module: imported(tree) - {module} for module, tree in MODULES.items()}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("experiments")))
def test_only_experiments_know_hydra_and_wandb(module):
    tops = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert not tops & set(LIBRARIES_OF_EXPERIMENTS)


def private_definitions(tree):
    """Private names that a module defines: functions, classes, values, and attributes of instances."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Name):
                        yield part.id
                    elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        yield part.attr


PRIVATE = {
    module: {name for name in private_definitions(tree) if name.startswith("_") and not name.startswith("__")}
    for module, tree in MODULES.items()
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_names_stay_private(module):
    others = set().union(*(names for other, names in PRIVATE.items() if other != module)) - PRIVATE[module]
    taken = {f"{source}.{name}" for source, name in imports(MODULES[module]) if name in others and source in MODULES}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Attribute) and node.attr in others:
            whose = node.value.id if isinstance(node.value, ast.Name) else ""
            if whose not in ("self", "cls"):  # a base class of ours may have it
                taken.add(ast.unparse(node))
    assert not taken, f"{module} reaches into {sorted(taken)}"


def test_files_of_the_library_fit_in_a_readers_head():
    long = {
        str(file.relative_to(ROOT)): count
        for file in (ROOT / "gradpruner").rglob("*.py")
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert not long
