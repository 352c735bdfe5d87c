"""The recipes of docs/extending.md, and of classes and YAML that lack something, from a folder outside of the tree."""

import json
import re
import shlex
import sys

import pytest
from commands import call

from experiments import report, run
from experiments.config import CONF
from gradpruner.record import RunRecord

PAGE = (CONF.parent / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^```bash\ngradpruner run (.*?)\n```", PAGE, re.MULTILINE)
SHORT = ("debug=smoke", "reference=null", "evaluate_before=false", "results_dir=runs", "cache_dir=cache")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of someone who has the files of the page, with another model path, and rows of the dataset."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    rows = [{"riddle": f"{n}?", "first": "day", "second": "night", "label": n % 2} for n in range(16)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("surprise", "riddles"):
        sys.modules.pop(name, None)


def test_the_recipes_in_one_run_and_its_reports(folder, tiny_spec, assets_dir):
    assert [shlex.split(each)[:2] for each in COMMANDS] == [["--config-dir", "conf"]] * 3 and len(FILES) == 6
    model = folder / "conf/model/my_model.yaml"
    model.write_text(model.read_text().replace("path: org/model", f"path: {tiny_spec.source(assets_dir)}"))
    choices = [argument for each in COMMANDS for argument in shlex.split(each)[2:]]
    source = ("dataset.source=local", "dataset.path=.", "dataset.max_length=128", "model.dtype=float32")
    done = call(run.main, "--config-dir", "conf", *choices, *SHORT, *source)
    assert done.returncode == 0, done.stderr
    [file] = (folder / "runs").rglob("record.json")
    record = RunRecord.load(file.parent)
    assert len(set(record.pruning["layer_importance"])) == 6 and record.pruning["method"] == "surprise"
    assert record.model["num_hidden_layers"] == 6 and "/riddles/" in str(file)

    for what in ((), ("table=all", "figure=plans", "figures_dir=figures")):
        done = call(report.main, "runs_dir=runs", *what)
        assert done.returncode == 0 and "surprise" in done.stdout and "riddles" in done.stdout, done.stderr


def test_a_dataset_and_a_method_of_ones_own_as_second_ones(folder):
    second = ("dataset.test=riddles", "dataset.test_settings={source: local, path: .}", "reference=surprise")
    done = call(run.main, "--config-dir", "conf", *SHORT, *second, "dry_run=true")
    assert done.returncode == 0, done.stderr


CLASS = FILES["surprise.py"]


@pytest.mark.parametrize(("change", "match"), [
    ({"surprise.py": CLASS.replace('    name: ClassVar[str] = "surprise"\n', "")}, r"surprise\.Surprise must have a "
     r'name, for folders and tables, got a class without one\. Add `name: ClassVar\[str\] = "surprise"` to it\.'),
    ({"surprise.py": CLASS.replace("CalibratedLayerDropping", "LayerDropping"), "conf/method/surprise.yaml":
      "_target_: surprise.Surprise\nsparsity: 0.4\n"}, r"method=surprise looks at data, got no batches\. Extend "
     r"CalibratedLayerDropping or define calibration\(\)"),
    ({"surprise.py": "import nothing_of_the_kind"}, r"method\._target_ must be a class, got surprise\.Surprise, which "
     r"cannot be imported: ModuleNotFoundError: No module named 'nothing_of_the_kind'\. Correct the name, or start in"),
    ({"conf/method/surprise.yaml": "sparsity: 0.4\n"}, r"method must name its class, got no _target_\. Write "
     r"`_target_: MODULE\.CLASS` into the YAML, or start from one of conf/method/base/ in its defaults\."),
    ({"conf/method/surprise.yaml": "defaults: [base/depth@_here_]\n"}, r"method must name its class, got no _target_"),
])  # fmt: skip
def test_what_a_class_or_yaml_lacks_is_named(folder, change, match):
    for name, text in change.items():
        (folder / name).write_text(text)
    done = call(run.main, "--config-dir", "conf", "method=surprise", *SHORT)
    assert done.returncode == 1 and "Traceback" not in done.stderr and re.search(match, done.stderr), done.stderr
