"""README and docs: links lead somewhere, commands are accepted, and the settings that they name exist."""

import importlib.util
import re
import shlex

import pytest
import yaml
from config_reference import make_pages, read_option
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from links import anchors, relative_links, slugify

from experiments.cli import COMMANDS as WORDS
from experiments.config import CONF, build_pipeline

ROOT = CONF.parent
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "results/**/README.md", "benchmarks/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
LINKS = [(page, link) for page, text in TEXTS.items() for link in relative_links(text, page)]
WRITTEN = {page: text for page, text in TEXTS.items() if page != "docs/bad-inputs.md"}  # that one is generated
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
OPTIONS = [read_option(path, CONF) for path in CONF.rglob("*.yaml")]
SETTINGS = {
    (option.name.split("/")[0], setting.key.removeprefix("evaluation.").split(".")[0])
    for option in OPTIONS
    for setting in option.settings
}
KEYS = {option.name: {setting.key for setting in option.settings} for option in OPTIONS if "/" not in option.name}
CONFIGS = {  # of each entry point
    "experiments.run": "config",
    "experiments.status": "config",
    "experiments.report": "report",
    "experiments.lm_eval_tasks": "lm_eval_tasks",
}


def missing_options(group, names):
    return [name for name in names.split(",") if not (CONF / group / f"{name}.yaml").is_file()]


def test_there_are_pages_to_test():
    assert {"README.md", "CONTRIBUTING.md", "docs/methods.md", "results/README.md"} <= set(TEXTS) and len(LINKS) > 50


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_to_files_and_headings(page):
    for source, link in LINKS:
        if source == page:
            assert (ROOT / link.path).exists(), f"{page}: {link.target}"
            if link.anchor:
                assert link.anchor in anchors((ROOT / link.path).read_text()), f"{page}: {link.target}"


def test_readme_is_short_and_names_every_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    linked = {link.path for page, link in LINKS if page == "README.md"}
    top = {page for page in TEXTS if re.fullmatch(r"docs/[^/]+\.md", page)}
    assert not top - linked


def test_lines_of_my_yaml_are_in_the_file_that_init_writes():
    starter = (ROOT / "experiments/starter/my.yaml").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    keys = {key for block in blocks for key in yaml.safe_load(block)}
    assert len(keys) >= 5
    assert all(re.search(rf"^(# )?{re.escape(key)}:", starter, re.MULTILINE) for key in keys)


def test_anchors_are_those_of_github():
    text = "# `a.b` and C++\n\n```\n# no heading\n```\n\n## Time & memory\n## [A link](x.md)\n## A link\n"
    assert anchors(text) == {"ab-and-c", "time--memory", "a-link", "a-link-1"}
    assert slugify("The cut: repair judged by answers") == "the-cut-repair-judged-by-answers"


def commands(text):
    """Yields the words of each command in the bash blocks of a page, without comments, with variables put in."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in re.findall(r'^([A-Z]+)="(.*)"$', text, re.MULTILINE):
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and not re.fullmatch(r"[A-Z]+=.*", words[0]):
                yield words


def entry_points(text):
    """Yields module and arguments of each of our commands on a page, `gradpruner run ...` or `python -m MODULE ...`.

    Commands with a folder or file of one's own are left out: test_extending.py and test_own_config.py run those.
    """
    for words in commands(text):
        if words[0].endswith("gradpruner"):
            module, arguments = WORDS[words[1]].module, words[2:]
        elif "-m" in words and words[0].endswith("python"):
            module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        else:
            continue
        if not {"pip", "--config", "--config-dir"} & {module, *arguments}:
            yield module, arguments


COMMANDS = [
    pytest.param(module, arguments, id=f"{page}-{number}")
    for page, text in WRITTEN.items()
    for number, (module, arguments) in enumerate(entry_points(text))
]
FIRST_PAGES = ("README.md", "docs/own-data.md")
PARSER = OverridesParser.create()


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_commands_name_modules_and_keys_that_exist(module, arguments):
    assert importlib.util.find_spec(module)
    if module in CONFIGS:
        overrides = [each for each in arguments if each not in ("-m", "--help")]
        for override in PARSER.parse_overrides(overrides):
            key, value = override.input_line.split("=", 1)
            root = key.split(".")[0]
            assert root in KEYS[CONFIGS[module]] | GROUPS or root.startswith("hydra"), key
            assert key != root or root not in GROUPS or not missing_options(root, value), value
            assert "." not in key or root == "hydra" or (root, key.split(".")[1]) in SETTINGS, key


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(*each.values[1:], id=each.id)
        for each in COMMANDS
        if each.id.startswith(FIRST_PAGES) and each.values[0] == "experiments.run"
    ],
)
def test_commands_of_the_first_pages_build(arguments):
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        build_pipeline(compose("config", overrides=arguments))


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for text in WRITTEN.values() for word in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.M)}
    named = {one or other for one, other in named}
    assert {"run", "test", "docs"} <= named <= targets


def test_settings_in_the_text_exist():
    """`method.tolerance=0.2` and `method=laco` in backticks, wherever they are."""
    wrong = []
    for page, text in WRITTEN.items():
        for word in " ".join(re.findall(r"`([^`\n]+)`", text)).split():
            if match := re.fullmatch(r"(\w+)\.(?!safetensors|json|yaml)(\w+)(=.*)?", word):
                is_known = match[1] not in GROUPS - {"experiment"} or (match[1], match[2]) in SETTINGS
            else:
                match = re.fullmatch(r"(\w+)=([a-z0-9_,]+)", word)
                is_known = not match or match[1] not in GROUPS or not missing_options(match[1], match[2])
            wrong += [] if is_known else [(page, word)]
    assert not wrong


def test_the_config_reference_has_every_option_and_key():
    pages = make_pages(CONF)
    text = "\n".join(pages.values())
    files = sorted(CONF.rglob("*.yaml"))
    assert len(files) > 50
    for path in files:
        name = str(path.relative_to(CONF).with_suffix(""))
        group, _, option = name.partition("/")
        assert f"## {group}={option}\n" in text or f"## {name}" in text
        if group not in ("experiment", "debug", "scale", "hydra"):
            for key in yaml.safe_load(path.read_text()) or {}:
                assert key in ("defaults", "_target_", "evaluation", "hydra") or f"| `{key}" in text, (name, key)


def test_the_config_reference_has_defaults_and_comments(tmp_path):
    folder = tmp_path / "method"
    folder.mkdir()
    (tmp_path / "config.yaml").write_text("# Root.\nseed: 0 # of <all> | draws\n")
    (folder / "mine.yaml").write_text(
        "# My method.\ndefaults:\n  - base/depth@_here_\n  - _self_\n\n_target_: mine.Mine\n"
        'a: "x # y" # what a is\n# above b:\n# two lines\nb: [1, 2] # beside b\nc:\n  d: null\n'
    )
    pages = make_pages(tmp_path)
    assert "| `seed` | `0` | of &lt;all> \\| draws |" in pages["index"]
    page = pages["method"]
    assert "## method=mine\n\nMy method.\n\nClass: `mine.Mine`. Starts from: `base/depth`.\n" in page
    assert '| `a` | `"x # y"` | what a is |' in page
    assert "| `b` | `[1, 2]` | above b: two lines: beside b |" in page
    assert "| `c.d` | `null` |  |" in page
