"""Checks of command-line arguments before hydra reads them, with the quotes that a refused one needs.

Hydra's own messages name neither the argument that its grammar refuses nor the quotes that it needs in a shell.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from experiments.config import CONF, options
from experiments.schema import ConfigError, is_text, unknown_key

HELP = "--help lists groups and keys"


def check_arguments(arguments: list[str], config_name: str) -> list[str]:
    """Returns the arguments in the form that hydra reads, and warns of repeated ones.

    Hydra takes no `GROUP=null` on a command line, even if that is the group's default: it is left out. Hydra also takes
    no KEY=VALUE on both sides of an option: all move behind it.

    Args:
        arguments: those after the command's name.
        config_name: primary config, in `conf/`.

    Raises:
        ConfigError: if an argument cannot be read or adds a key that the config does not have, or if a group is empty
            or null that must have an option.
    """
    parsed, unknown = get_args_parser().parse_known_args(arguments)
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.lstrip("-")
            example = name if "=" in name else f"{name}=VALUE"
            raise ConfigError(f"There is no option {argument!r}. Settings have no dashes: write {example}. {HELP}.")
    if unknown:
        moved = [*parsed.overrides, *unknown]
        arguments = [*(argument for argument in arguments if argument not in moved), *moved]
    overrides = [_parse(argument, parsed.multirun) for argument in (*parsed.overrides, *unknown)]
    _check_added(overrides, config_name)
    _warn_of_repeated(overrides)
    last = {override.key_or_group: override for override in overrides}
    dropped = {key for key, override in last.items() if _is_empty_group(override)}
    for key in dropped:
        if key not in _optional_groups(config_name) or last[key].is_sweep_override():
            raise ConfigError(
                f"{key} must name an option, got {last[key].input_line}. Options of {key}: {', '.join(options(key))}."
            )
    left_out = {override.input_line for override in overrides if override.key_or_group in dropped}
    return [argument for argument in arguments if argument not in left_out]


def check_texts(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses an argument for a text if hydra reads it as a number or boolean, which would become another text.

    Args:
        cfg: the config of a run.
        overrides: its arguments.

    Raises:
        ConfigError: for example for model.revision=12e4567, whose value as a number is infinite.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value, (key, _, text) = override.value(), str(override.input_line).partition("=")
        if isinstance(value, bool | int | float) and str(value) != text and is_text(cfg, override.key_or_group):
            kind = "boolean" if isinstance(value, bool) else "number"
            raise ConfigError(
                f"{override.key_or_group} must be a text, got {text}, which is read as the {kind} {value}. Write "
                f"{quote(key, text)}."
            )


def quote(key: str, *values: str) -> str:
    """Returns an argument to paste into a shell, from which hydra reads these very texts."""
    texts = [QuotedString(value, Quote.double).with_quotes() for value in values]
    return shlex.quote(f"{key}={','.join(texts)}")


def _parse(argument: str, is_sweep: bool) -> Override:
    override = _read(argument)
    if override is not None:
        return override
    key, separator, value = argument.partition("=")
    if not separator or _read(f"{key.strip()}=1") is None:
        raise ConfigError(
            f"An argument must be KEY=VALUE, got {argument!r}. If it belongs to the argument before it, quote them "
            f"together: {quote('KEY', 'TEXT WITH SPACES')}. {HELP}."
        )
    stripped = f"{key.strip()}={value}"
    remedy = f"Write {quote(key.strip(), value) if _read(stripped) is None else shlex.quote(stripped)}"
    if is_sweep and "," in value:
        remedy += f", or for several values {quote(key.strip(), *value.split(','))}"
    raise ConfigError(
        f"Hydra cannot read the argument {argument!r}. A value with = # ~ & ! ; ' \" ( ) [ ] {{ }} or letters beyond "
        f"ASCII needs quotes of its own inside those of the shell. {remedy}."
    )


def _read(argument: str) -> Override | None:
    try:
        [override] = OverridesParser.create().parse_overrides([argument])
    except OverrideParseException:
        return None
    is_key = isinstance(override.key_or_group, str) and override.key_or_group != ""  # unlike in "=1"
    return override if is_key else None


def _check_added(overrides: Sequence[Override], config_name: str) -> None:
    """Raises ConfigError for `+sparsty=0.3`, which hydra would add to the config, where nothing reads it."""
    config = _primary_config(config_name)
    groups = [str(key) for entry in config.pop("defaults") if isinstance(entry, dict) for key in entry]
    known = [*config, *(group for group in groups if " " not in group), "hydra"]
    for override in overrides:
        root = str(override.key_or_group).replace("/", ".").split(".")[0]
        if (override.is_add() or override.is_force_add()) and root not in known:
            raise unknown_key(root, known)


def _warn_of_repeated(overrides: Sequence[Override]) -> None:
    given: dict[str, list[str]] = {}
    for override in overrides:
        given.setdefault(override.get_key_element(), []).append(str(override.input_line))
    for key, arguments in given.items():
        if len(arguments) > 1:
            print(f"Warning: {key} is given more than once, the last counts: {shlex.join(arguments)}", file=sys.stderr)


def _is_empty_group(override: Override) -> bool:
    """Returns whether an argument chooses no option for a group of ours, as the value or as one of a sweep's."""
    if override.package is not None or override.is_delete() or not (CONF / override.key_or_group).is_dir():
        return False
    if override.is_sweep_override():
        return override.is_discrete_sweep() and "null" in override.sweep_string_iterator()
    return override.value() in (None, "")


def _optional_groups(config_name: str) -> set[str]:
    """Returns the groups that are null in the defaults list of a primary config."""
    entries = [entry for entry in _primary_config(config_name)["defaults"] if isinstance(entry, dict)]
    return {str(key) for entry in entries for key, value in entry.items() if value is None}


def _primary_config(config_name: str) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{config_name}.yaml"))
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
