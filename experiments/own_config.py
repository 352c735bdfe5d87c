"""`--config FILE`: a YAML file with the keys of the command line, for one's own model and data.

    gradpruner run --config my.yaml sparsity=0.3

Each line is one argument: `dataset: jsonl` is `dataset=jsonl`, `dataset.train_file: train.jsonl` is
`dataset.train_file=train.jsonl`. Arguments behind the file win over it, and what is refused as an argument is refused
in the file. Relative paths in it count from its folder. `config_dir` names a folder of options, as `--config-dir` does.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from experiments.schema import ConfigError
from gradpruner.files import user_path
from gradpruner.messages import one_line
from gradpruner.record import PATH_SETTINGS

OPTION = "--config"
CONFIG_DIR = "config_dir"
FREE_KEYS = ("model.config", "dataset.test_settings", "method.recover_settings")  # mappings that take any key
# Texts that hydra reads as texts without quotes.
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][A-Za-z_0-9./-]*", re.IGNORECASE)


def expand(arguments: Sequence[str]) -> list[str]:
    """Returns arguments with those of the file of `--config` in its place.

    Raises:
        ConfigError: if the file is missing, or is not a mapping of keys to values.
    """
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        name, separator, value = argument.partition("=")
        if name != OPTION:
            others.append(argument)
        elif separator:
            files.append(value)
        else:
            files.append(next(rest, ""))
    if not files:
        return others
    if len(files) > 1 or not files[0]:
        raise ConfigError(
            f"{OPTION} takes one file, got {', '.join(files) or 'none'}. Write {OPTION} my.yaml; `gradpruner init` "
            "makes such a file."
        )
    file = user_path(files[0])
    settings = dict(_settings(_read(file), ""))
    given = {argument.lstrip("+~").partition("=")[0] for argument in others}
    folder = settings.pop(CONFIG_DIR, None)
    own = [] if folder is None else [f"--config-dir={_anchored(CONFIG_DIR, str(folder), file.parent)}"]
    for key, value in settings.items():
        if key not in given:  # an argument wins
            prefix = "++" if key in FREE_KEYS else ""
            own.append(f"{prefix}{key}={_literal(_with_paths(key, value, file.parent), f'{key} in {file}')}")
    return [*own, *others]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"{OPTION} must name a YAML file, got {file.absolute()}, which is "
            f"{'a folder' if file.is_dir() else 'not there'}. Correct the path, or make one with `gradpruner init`."
        )
    try:
        content = OmegaConf.load(file)
        plain = OmegaConf.to_container(content)
    except Exception as error:  # of yaml, omegaconf or the file system
        raise ConfigError(
            f"{OPTION} must name a YAML file, got {file.absolute()}, which cannot be read: {one_line(error)}. Correct "
            "it; a text with : # or { needs quotes."
        ) from error
    if not isinstance(plain, dict):
        raise ConfigError(
            f"{OPTION} must name a YAML file of KEY: VALUE lines, got a list in {file.absolute()}. Write for example "
            "sparsity: 0.4."
        )
    return {str(key): value for key, value in plain.items()}


def _settings(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value); `dataset: {train_file: x}` is `dataset.train_file: x`."""
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted not in FREE_KEYS:
            yield from _settings(value, f"{dotted}.")
        else:
            yield dotted, value


def _with_paths(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {name: _with_paths(f"{key}.{name}", each, folder) for name, each in value.items()}
    if isinstance(value, str) and value and key.endswith(PATH_SETTINGS):
        return _anchored(key, value, folder)
    return value


def _anchored(key: str, value: str, folder: Path) -> str:
    """Returns a path that counts from `folder` as one that counts from the current folder.

    Addresses (`hf://`, `packaged:`) stay, and so does what may be an id of the Hub and is no path in `folder`.
    """
    path = Path(value)
    may_be_id = key == "model.path" and not value.startswith(".") and not (folder / path).exists()
    if path.is_absolute() or value.startswith("~") or ":" in value or may_be_id:
        return value
    whole = Path(os.path.abspath(folder / path))
    here = Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def _literal(value: Any, what: str) -> str:
    """Returns a value as hydra's grammar of arguments has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(_literal(each, what) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_literal(str(key), what)}:{_literal(each, what)}' for key, each in value.items())}}}"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else QuotedString(value, Quote.double).with_quotes()
    raise ConfigError(
        f"A value must be a text, a number, true, false, null, a list or a mapping, got {what}: "
        f"{type(value).__name__}. Put it in quotes for a text."
    )
