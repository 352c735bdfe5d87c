"""Writes the reference of the config tree from the YAML under conf/: every group, option, key, default and comment."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

TARGET = "_target_"
# Options of these groups are presets: they change values all over the tree and read best as they are written.
PRESETS = ("experiment", "scale", "debug", "hydra")
TITLES = {
    "model": "which model to prune",
    "dataset": "what to train and test on",
    "method": "how to prune",
    "finetune": "how to fine-tune",
    "evaluation": "how to measure",
    "tracker": "where to report a run besides its record",
    "experiment": "presets for tables, figures and comparisons",
    "scale": "the paper's models or what two cores can do",
    "debug": "a run of seconds",
    "hydra": "folders, logging and launchers",
}


@dataclass(frozen=True)
class Setting:
    """One key of a YAML: its dotted name, its value as written, and what the comments beside and above it say."""

    key: str
    value: str
    comment: str


@dataclass(frozen=True)
class Option:
    """One YAML below conf/.

    Attributes:
        name: its path without the suffix, such as `method/base/depth`.
        comment: the comment that it opens with.
        parents: the entries of its defaults list.
        settings: its own keys.
        text: the whole file.
    """

    name: str
    comment: str
    parents: list[str] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    text: str = ""


def make_pages(conf: Path) -> dict[str, str]:
    """Returns the text of every page by its name: `index` and one per config group."""
    roots = [read_option(path, conf) for path in sorted(conf.glob("*.yaml"))]
    roots.sort(key=lambda option: option.name != "config")
    groups = sorted((path.name for path in conf.iterdir() if path.is_dir()), key=_group_order)
    lines = ["# Config reference", ""]
    lines += ["Every choice of a run is a YAML file in a config group below `conf/`. These pages are made from those"]
    lines += ["files. Change a key on the command line with `KEY=VALUE`, choose an option with `GROUP=OPTION`.", ""]
    lines += ["| group | what it decides | options |", "| --- | --- | --- |"]
    pages = {}
    for group in groups:
        paths = sorted(path for path in (conf / group).rglob("*.yaml"))
        options = [read_option(path, conf) for path in paths]
        names = [option.name.split("/")[1] for option in options if option.name.count("/") == 1]
        listed = ", ".join(f"[`{name}`]({group}.md#{_anchor(f'{group}={name}')})" for name in names)
        lines.append(f"| [`{group}`]({group}.md) | {TITLES.get(group, '')} | {listed} |")
        pages[group] = _group_page(group, options)
    lines.append("")
    for option in roots:
        lines += [f"## {option.name}.yaml", "", *_option_body(option), ""]
    pages["index"] = "\n".join(lines)
    return pages


def baselines_page(conf: Path) -> str:
    """Returns a page with the docstrings of every baseline that has a YAML, for mkdocstrings."""
    lines = ["# Baselines reference", "", "Module and settings of every baseline, from their docstrings.", ""]
    for path in sorted((conf / "method").glob("*.yaml")):
        target = next(s.value for s in read_option(path, conf).settings if s.key == TARGET)
        module, _, name = target.rpartition(".")
        if module.startswith("baselines."):
            lines += [f"::: {module}", "    options:", "      heading_level: 2", f"      members: [{name}]", ""]
    return "\n".join(lines)


def read_option(path: Path, conf: Path) -> Option:
    """Returns what a YAML file says, with its comments.

    Raises:
        ValueError: if the file does not hold a mapping.
    """
    text = path.read_text(encoding="utf-8")
    rows = text.splitlines()
    node = yaml.compose(text)
    name = str(path.relative_to(conf).with_suffix(""))
    if node is None:  # nothing but comments
        return Option(name, _opening(rows), text=text)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"A config must be a mapping, got {node.tag} in {path}. Correct the file.")
    defaults = next((value for key, value in node.value if key.value == "defaults"), None)
    parents = [_default(item) for item in defaults.value] if defaults is not None else []
    settings = list(_settings(node, text, ""))
    return Option(name, _opening(rows), [parent for parent in parents if parent != "_self_"], settings, text)


def _settings(node: yaml.MappingNode, text: str, prefix: str) -> Iterator[Setting]:
    rows = text.splitlines()
    for key, value in node.value:
        name = prefix + key.value
        if name == "defaults":
            continue
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _settings(value, text, f"{name}.")
            continue
        above = _comments_above(rows, key.start_mark.line)
        beside = _comment_beside(rows, value) if value.end_mark.line == key.start_mark.line else ""
        separator = " " if above.endswith((".", ";")) else ": "
        comment = separator.join(part for part in (above, beside) if part)
        yield Setting(name, _written(value, text), comment)


def _written(value: yaml.Node, text: str) -> str:
    if isinstance(value, yaml.ScalarNode) and value.style in (">", "|"):
        return str(value.value)
    return text[value.start_mark.index : value.end_mark.index]


def _comment_beside(rows: list[str], value: yaml.Node) -> str:
    rest = rows[value.end_mark.line][value.end_mark.column :]
    match = re.match(r"\s*# ?(.*)", rest)
    return match[1].strip() if match else ""


def _comments_above(rows: list[str], line: int) -> str:
    found: list[str] = []
    while line > 0 and rows[line - 1].lstrip().startswith("#"):
        line -= 1
        found.insert(0, rows[line].strip().removeprefix("#").strip())
    return "" if line == 0 else " ".join(found)  # a comment from the first line on is the file's


def _opening(rows: list[str]) -> str:
    found = []
    for row in rows:
        if not row.startswith("#"):
            break
        if not row.startswith("# @package"):
            found.append(row.removeprefix("#").removeprefix(" "))
    return "\n".join(found)


def _default(item: yaml.Node) -> str:
    if isinstance(item, yaml.MappingNode):
        return ", ".join(f"{key.value}: {value.value}" for key, value in item.value)
    return str(item.value)


def _group_page(group: str, options: list[Option]) -> str:
    lines = [f"# {group}", "", f"`{group}=OPTION`: {TITLES.get(group, '')}.".replace(": .", "."), ""]
    for option in sorted(options, key=lambda option: (option.name.count("/") > 1, option.name)):
        parts = option.name.split("/")
        lines += [f"## {group}={parts[1]}" if len(parts) == 2 else f"## {option.name}", ""]
        lines += [*(_preset_body(option) if group in PRESETS else _option_body(option)), ""]
    return "\n".join(lines)


def _preset_body(option: Option) -> list[str]:
    return [f'```yaml title="conf/{option.name}.yaml"', option.text.rstrip("\n"), "```"]


def _option_body(option: Option) -> list[str]:
    lines = [_prose(option.comment), ""]
    target = [f"Class: `{setting.value}`" for setting in option.settings if setting.key == TARGET]
    parents = ["Starts from: " + ", ".join(map(_parent, option.parents))] if option.parents else []
    lines += [". ".join([*target, *parents]) + ".", ""] if target or parents else []
    rows = [setting for setting in option.settings if setting.key != TARGET]
    if rows:
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{row.key}` | {_code(row.value)} | {_prose(row.comment)} |" for row in rows]
    return lines


def _parent(entry: str) -> str:
    return f"`{entry.removesuffix('@_here_')}`"


def _code(value: str) -> str:
    text = " ".join(value.split()).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def _prose(text: str) -> str:
    """Escapes what Markdown would take for its own in a comment; code in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    escaped = (
        part if part.startswith("`") else re.sub(r"([\\*_|\[\]{}])", r"\\\1", part).replace("<", "&lt;")
        for part in parts
    )
    return "".join(escaped)


def _anchor(heading: str) -> str:
    return heading.replace("=", "")


def _group_order(group: str) -> tuple[int, str]:
    known = list(TITLES)
    return (known.index(group) if group in known else len(known), group)
