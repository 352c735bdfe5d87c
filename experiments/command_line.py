"""Runs an entry point of hydra's so that an argument that hydra refuses, or an interruption, ends in a clear message.

Hydra itself suggests no name for an unknown one, prints tracebacks for some arguments, and says nothing of the runs
that an interrupted sweep has finished.
"""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from joblib.externals.loky.process_executor import BrokenProcessPool  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.arguments import HELP, check_arguments, quote
from experiments.cli import command_of, version
from experiments.config import CONF, composing, options, use_config_dir
from experiments.own_config import FREE_KEYS, expand
from experiments.schema import ConfigError
from experiments.sweep import cells, describe_broken_off, forget_sweep
from gradpruner import processes
from gradpruner.checks import guess
from gradpruner.messages import first_line

FULL_ERROR = "HYDRA_FULL_ERROR"  # with 1, hydra lets exceptions pass instead of printing them
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def run_command(main: Callable[[], None], config_name: str, module: str, check: bool = True) -> None:
    """Calls a function decorated with `hydra.main`, after checks of the command line's arguments.

    Args:
        main: the function.
        config_name: its primary config.
        module: the entry point, for the command that continues an interrupted one.
        check: whether the arguments are hydra's.

    Raises:
        SystemExit: with 1 if the arguments are refused or a worker of a sweep was killed, with 130 after Ctrl-C.
    """
    if "--version" in sys.argv[1:]:
        print(version())
        return
    several = ["torchrun", f"--nproc-per-node={processes.count_on_machine()}"]
    start = command_of(module) if processes.count() == 1 else [*several, "-m", module]
    again = f"To continue: {shlex.join([*start, *sys.argv[1:]])}"
    try:
        sys.argv[1:] = expand(sys.argv[1:])
        _join_processes()
        if (folder := get_args_parser().parse_known_args()[0].config_dir) is not None:
            use_config_dir(folder)
        if check:
            sys.argv[1:] = check_arguments(sys.argv[1:], config_name)
        with _passing_exceptions():
            main()
    except KeyboardInterrupt as error:
        if not processes.report("Interrupted"):
            raise SystemExit(INTERRUPTED) from None
        where = f", and {error}" if str(error) else ""
        print(f"\nInterrupted; finished stages are kept{where}.{describe_broken_off()}\n{again}", file=sys.stderr)
        processes.leave()
        raise SystemExit(INTERRUPTED) from None
    except BrokenProcessPool as error:
        print(
            "\nError: a worker of the sweep was killed, as the system does when memory runs out. Lower "
            f"hydra.launcher.n_jobs, or finetune.micro_batch_size.{describe_broken_off()}\n{again}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    except RuntimeError as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        print(
            f"\nError: a job of the sweep ended without a result, got {type(error).__name__}: {first_line(error)} Its "
            "log is in the folder .submitit of the sweep; jobs that are killed may need more hydra.launcher.mem_gb or "
            f"timeout_min.{describe_broken_off()}\n{again}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    except ConfigError as error:
        if not processes.report(str(error)):
            raise SystemExit(1) from error
        print(f"\nError: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        if not processes.report(str(error)):
            raise SystemExit(1) from error
        print(f"\nError: {_explain(error, config_name)}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        forget_sweep()


def _join_processes() -> None:
    """Joins the other processes of a run, so that one of them says what is wrong; refuses a sweep on several.

    Raises:
        ConfigError: for a sweep, or if the launcher's variables do not fit this machine.
    """
    if processes.count() == 1:
        return
    try:
        processes.start()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if get_args_parser().parse_known_args()[0].multirun:
        raise ConfigError(
            f"A sweep is one process that starts its runs, got -m on {processes.count()} processes. Start every run "
            "with torchrun of its own, or start the sweep with plain python."
        )


@contextmanager
def _passing_exceptions() -> Iterator[None]:
    """Lets hydra's exceptions pass for a while."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


def _explain(error: Exception, config_name: str) -> str:
    """Returns a message for what hydra refuses to compose."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = [option for option in error.options if option]
        return f"There is no {group} {name!r}{guess(name, known)}. Options of {group}: {', '.join(known)}."
    parsed = get_args_parser().parse_args()
    overrides = OverridesParser.create().parse_overrides(parsed.overrides)
    what = first_line(error).replace("Error merging override", "Cannot use")
    if what.startswith("Ambiguous value"):
        argument = next(str(override.input_line) for override in overrides if override.is_sweep_override())
        key, _, value = argument.partition("=")
        return (
            f"{argument!r} has several values, which only a sweep may have. Add -m for a sweep, or write "
            f"{quote(key, value)} for one text, {shlex.quote(f'{key}=[{value}]')} for a list."
        )
    if parsed.config_name is None:
        with composing(parsed.config_dir) as loader:
            unknown = _find_unknown_key(overrides, loader, config_name)
        if unknown is not None:
            return unknown
    cause = next(iter(str(error.__cause__ or "").strip().splitlines()), "")
    reason = ": ".join(text.rstrip(".:") for text in (what, cause) if text)
    return f"{reason}, got the arguments {shlex.join(sys.argv[1:])}. Correct them; {HELP}."


def _find_unknown_key(overrides: list[Override], loader: ConfigLoader, config_name: str) -> str | None:
    """Returns the message for the first key that the config of its run does not have, or None."""
    configs: dict[tuple[str, ...], DictConfig] = {}  # by choices of options: the other arguments change no keys
    first = None
    for cell in cells(overrides):
        parsed = OverridesParser.create().parse_overrides(cell)
        chosen = [each for each in parsed if loader.get_group_options(each.key_or_group, ObjectType.CONFIG)]
        choices = tuple(str(each.input_line) for each in chosen)
        if choices in configs:
            continue
        configs[choices] = loader.load_configuration(config_name, list(choices), RunMode.RUN)
        for override in parsed:
            if override not in chosen and not override.is_add() and not override.is_force_add():
                message = _check_key(configs[choices], override.key_or_group)
                if message is not None and first is None:
                    first = override.key_or_group, choices, message
    if first is None:
        return None
    key, choices, message = first
    group = key.partition(".")[0]
    own = [choice for choice in choices if choice.startswith(f"{group}=")]
    having = [name for each, config in configs.items() if _check_key(config, key) is None for name in each]
    others = sorted({name for name in having if name.startswith(f"{group}=")} - set(own))
    if not own or not others:
        return message
    return (
        f"All cells of a sweep must have its settings, got {key}, which {', '.join(others)} has and {own[-1]} has not. "
        f"Make two sweeps of it, or leave {own[-1]} or {key} out."
    )


def _check_key(config: DictConfig, key: str) -> str | None:
    """Returns a message if a config does not have a key: near names, and where else the key is."""
    node: Any = config
    parts, depth = key.split("."), 0
    while depth < len(parts) and parts[depth] in _keys(node):
        node = node._get_node(parts[depth])
        depth += 1
    if depth == len(parts):
        return None
    known = _keys(node) if depth else list(dict.fromkeys([*_keys(node), *_groups()]))
    parent, leaf = ".".join(parts[:depth]), parts[-1]
    places = [name for name in _all_keys(config) if name.rsplit(".", 1)[-1] == leaf]
    owners = [
        f"{parts[0]}={name}"
        for name in options(parts[0])
        if Path(file := _file(parts[0], name)).is_file() and leaf in _keys(OmegaConf.load(file))
    ]
    near = difflib.get_close_matches(parts[depth], known, n=1)
    hint = ""
    if parent in FREE_KEYS:
        hint = f" Add it: +{key}=VALUE."
    elif owners and depth == 1:
        hint = f" It belongs to {' or '.join(owners)}: choose that, too."
    elif near:
        hint = f" Did you mean {'.'.join([*parts[:depth], near[0], *parts[depth + 1 :]])}?"
    elif places:
        hint = f" Did you mean {' or '.join(places)}?"
    listed = ", ".join(name for name in known if name != "hydra")
    return f"There is no key {key!r}.{hint} Known{' in ' * bool(parent)}{parent}: {listed or 'none'}."


def _keys(node: Any) -> list[str]:
    """Returns the keys of a mapping, without those that no argument changes."""
    has_keys = isinstance(node, DictConfig) and not node._is_none() and not node._is_missing()
    return [str(key) for key in node if key not in ("_target_", "defaults")] if has_keys else []


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in _keys(node):
        if key == "hydra":
            continue
        yield f"{prefix}{key}"
        yield from _all_keys(node._get_node(key), f"{prefix}{key}.")


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def _file(group: str, name: str) -> str:
    return str(CONF / group / f"{name}.yaml")
