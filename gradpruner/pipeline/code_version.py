"""What code the result of a stage depends on, as a hash for its key.

The code of a stage is the function that makes it, and every module of our packages that this function uses, directly
or through other modules. Both are read off the source, so no list of them can go stale. The one list that is written by
hand, `CANNOT_CHANGE_RESULTS`, names modules that do not count; a test fails for a module that is neither on it nor part
of any stage.

Sources are read when this module is imported, which is when the process starts: code that is edited during a long run
cannot file results of the old code under a key of the new one.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("gradpruner", "baselines")
# Pattern -> why a change in such a module cannot change the result of a stage.
CANNOT_CHANGE_RESULTS = {
    "baselines": "imports for users",
    "baselines.apt": "imports for users",
    "gradpruner": "imports for users",
    "gradpruner.evaluate": "imports nothing",
    "gradpruner.finetune": "imports for users",
    "gradpruner.models": "imports for users",
    "gradpruner.evaluate.vllm_python": "finds vLLM, whose version is in the keys themselves",
    "gradpruner.pipeline.vllm_checks": "refuses a run or lets it pass, unchanged",
    "gradpruner.in_memory": "serves use without the runner",
    "gradpruner.lease": "holds locks",
    "gradpruner.checks": "refuses settings or lets them pass, unchanged",
    "gradpruner.messages": "makes texts for people",
    "gradpruner.conversation_rows": "makes rows, which are in the keys themselves",
    "gradpruner.data_warnings": "warns",
    "gradpruner.finetune.few_steps": "warns",
    "gradpruner.checkpoints*": "writes files from the results of stages",
    "gradpruner.models.memory": "serves dry runs and the refusal of runs that do not fit",
    "gradpruner.models.origin": "serves cards",
    "gradpruner.models.offline_configs": "serves dry runs alone",
    "gradpruner.pipeline": "imports nothing",
    "gradpruner.pipeline.cache": "files results under the keys that it is given",
    "gradpruner.pipeline.code_version": "makes keys",
    "gradpruner.pipeline.disk": "refuses a run or lets it pass, unchanged",
    "gradpruner.pipeline.estimate": "refuses a run or lets it pass, unchanged; serves dry runs",
    "gradpruner.pipeline.run": "calls the stages and collects their results",
    "gradpruner.pipeline.setup": "what it makes definite (rows, method, evaluation) is in the keys itself",
    "gradpruner.progress": "shows how far work is",
    "gradpruner.pipeline.stand_in_rows": "serves dry runs alone",
    "gradpruner.pipeline.work": "estimates how long stages take",
    "gradpruner.processes": "names this process and carries messages; results do not depend on how many there are",
    "gradpruner.record*": "holds results of finished runs",
    "gradpruner.reporting*": "reads records",
    "gradpruner.waiting": "logs, and holds locks",
    "gradpruner.tasks*": "makes rows and examples, which are in the keys themselves",
}


def code_version(stage: Callable[..., Any], *users: type) -> str:
    """Hash of the code that a stage's result depends on; comments, docstrings and layout do not count.

    Args:
        stage: the function that makes the stage.
        users: classes that the stage works with but does not import, such as its method.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256("".join(_used_definitions(stage)).encode())
    for module in modules_of(stage, *users):
        digest.update(f"{module} {_module_hash(module)}".encode())
    return digest.hexdigest()[:16]


def modules_of(stage: Callable[..., Any], *users: type) -> list[str]:
    """Names of the modules in `code_version`, sorted; see there."""
    home = imported_modules(stage.__module__)
    waiting = {module for name in _used_names(stage) for module in home.get(name, ())}
    waiting |= {user.__module__ for user in users}
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module not in found and not cannot_change_results(module):
            found.add(module)
            waiting |= set().union(*imported_modules(module).values())
    return sorted(found)


def cannot_change_results(module: str) -> bool:
    """Whether a module is in `CANNOT_CHANGE_RESULTS`."""
    return any(fnmatch(module, pattern) for pattern in CANNOT_CHANGE_RESULTS)


@cache  # a run asks for each module once per stage, and walking all of them takes longer than a step of training
def imported_modules(module: str) -> dict[str, set[str]]:
    """Modules of our packages by the names under which a module imports them or something out of them.

    Imports within functions count. Those for type checkers do not: nothing of them is there when the code runs.
    """
    found: dict[str, set[str]] = {}
    for node in _running_statements(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                source = submodule if submodule in SOURCES else node.module
                found.setdefault(alias.asname or alias.name, set()).add(source)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault((alias.asname or alias.name).split(".")[0], set()).add(alias.name)
    ours = {name: {module for module in modules if module in SOURCES} for name, modules in found.items()}
    return {name: modules for name, modules in ours.items() if modules}


def _running_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement but those under `if TYPE_CHECKING:`; expressions hold no imports."""
    waiting = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                continue
            if not isinstance(node, ast.expr):
                yield node
                waiting.append(node)


def _used_definitions(function: Callable[..., Any]) -> list[str]:
    """What a function does, and what the other definitions of its module do that it uses."""
    definitions = _definitions(_tree(function.__module__))
    return [ast.dump(definitions[name]) for name in sorted(_used_names(function)) if name in definitions]


def _used_names(function: Callable[..., Any]) -> set[str]:
    """The function's own name and all names that it uses, or that definitions of its module use for it."""
    definitions = _definitions(_tree(function.__module__))
    waiting, found = {function.__name__}, set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        if name in definitions:
            used = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
            waiting |= used - found
    return found


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Functions, classes and values at the top level of a module."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _read_sources(packages: Iterable[str]) -> dict[str, str]:
    """Text of every module of the packages, by module name; of packages that are not installed, none."""
    found = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(folder.rglob("*.py")):
                parts = file.relative_to(folder.parent).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = file.read_text(encoding="utf-8")
    return found


SOURCES = _read_sources(PACKAGES)


@cache
def _module_hash(module: str) -> str:
    return hashlib.sha256(ast.dump(_tree(module)).encode()).hexdigest()


@cache
def _tree(module: str) -> ast.Module:
    """What a module does: its syntax tree without docstrings, comments and layout.

    A module that is not ours, such as that of a user's method, is read when it is first asked for.
    """
    if module not in SOURCES:
        file = sys.modules[module].__file__
        assert file is not None
        SOURCES[module] = Path(file).read_text(encoding="utf-8")
    tree = ast.parse(SOURCES[module])
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
    return tree
