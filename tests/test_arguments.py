"""Command lines: what hydra refuses, what it would read as something else, and what a user probably meant."""

import re
import shlex

import pytest
from commands import call
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings, strategies
from omegaconf import OmegaConf

from experiments import report, run
from experiments.arguments import quote
from experiments.config import build_pipeline

AREA = "Paths and overrides"


def case(given_, *arguments, match):
    return pytest.param(list(arguments), match, marks=pytest.mark.bad_input(AREA, given_), id=given_)


def tried(given_, gets):
    return pytest.mark.bad_input(AREA, given_, gets)


@pytest.fixture
def configs(monkeypatch):
    """Configs of the jobs that a command starts; none of them runs."""
    found = []
    monkeypatch.setattr("experiments.job.run_job", found.append)
    return found


@pytest.fixture
def refused(monkeypatch):
    """Returns `refused(*arguments)`, the error of a command that must end before it loads a weight."""
    monkeypatch.setattr("gradpruner.models.spec.ModelSpec.load", lambda *args: pytest.fail("a weight was loaded"))

    def errors(*arguments, main=run.main):
        done = call(main, *arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    return errors


def read(argument):
    [override] = OverridesParser.create().parse_overrides([argument])
    return override.value()


# ---- quotes ----


@pytest.mark.parametrize(("name", "text"), [
    pytest.param(name, text, marks=tried(f"{name}, without hydra's quotes",
                 "error: Hydra cannot read the argument … Write KEY=\"VALUE\", quoted for the shell"), id=name)
    for name, text in {
        "a path with =": "/runs/lr=1e-3/test.jsonl", "a path from home": "~/data", "a path beyond ASCII": "/donné/日本",
        "a path with an apostrophe": "/it's", 'a path with a double quote': '/a"b', "a path with parentheses": "/a (1)",
        "a path with brackets": "/a[1]", "a path with #": "/a#1", "a path with &": "/a&b",
        "a prompt with a field": "Question: {question}\\nAnswer:", "a prompt with = and a comma": "Is 1 = 2, yes?",
        "an open interpolation": "${seed",
    }.items()
])  # fmt: skip
def test_what_the_grammar_refuses_is_named_with_the_quotes_that_work(refused, name, text):
    error = refused("debug=smoke", f"dataset.path={text}")
    assert f"Hydra cannot read the argument {f'dataset.path={text}'!r}. A value with = # ~" in error
    [argument] = shlex.split(error.strip().removesuffix(".").split("Write ", 1)[1])
    assert read(argument) == text and argument.startswith("dataset.path=")


@tried("two paths of a sweep, each with =", 'error: Write … for one text, or for several values KEY="ONE","OTHER"')
def test_quotes_for_several_values(refused):
    error = refused("-m", "dataset.path=/a=1,/b=2")
    assert """Write 'dataset.path="/a=1,/b=2"', or for several values 'dataset.path="/a=1","/b=2"'.""" in error


@settings(max_examples=50, deadline=None)
@given(strategies.text())
def test_any_text_can_be_quoted(text):
    [argument] = shlex.split(quote("dataset.prompt", text))
    assert read(argument) == text


REFUSED = [
    case("several values without -m", "model.path=/a,b/c", match=r"'model.path=/a,b/c' has several values, which only "
         r"a sweep may have\. Add -m for a sweep, or write 'model\.path=\"/a,b/c\"' for one text"),
    case("a word that is no KEY=VALUE", "debug=smoke", "{question}",
         match=r"An argument must be KEY=VALUE, got '{question}'\. If it belongs to the argument before it, quote"),
    case("a value without a key", "=1", match=r"An argument must be KEY=VALUE, got '=1'"),
    case("a space before =", "seed =1", match=r"Hydra cannot read the argument 'seed =1'\. .* Write seed=1\."),
    case("a setting with dashes", "--seed=3", match=r"There is no option '--seed=3'\. Settings have no dashes: write "
         r"seed=3\."),
    case("an option that does not exist", "--foo", match=r"There is no option '--foo'\. .* write foo=VALUE\."),
    # ---- names ----
    case("a misspelt key", "sede=1", match=r"There is no key 'sede'\. Did you mean seed\?"),
    case("a misspelt key of a group", "finetune.learning_rat=1",
         match=r"There is no key 'finetune\.learning_rat'\. Did you mean finetune\.learning_rate\? Known"),
    case("a misspelt group before a dot", "modle.path=x", match=r"no key 'modle\.path'\. Did you mean model\.path\?"),
    case("a misspelt group", "experimnt=table1", match=r"There is no key 'experimnt'\. Did you mean experiment\?"),
    case("a key without its group", "lora_rank=4", match=r"no key 'lora_rank'\. Did you mean method\.lora_rank or "
         r"finetune\.lora_rank\?"),
    case("a key of another option", "dataset.train_file=x", match=r"It belongs to dataset=jsonl: choose that, too\."),
    case("a key that one method of a sweep lacks", "-m", "method=gradpruner,last", "method.density=0.1",
         match=r"All cells of a sweep must have its settings, got method\.density, which method=gradpruner has and "
         r"method=last has not\. Make two sweeps of it, or leave method=last or method\.density out\."),
    case("a misspelt key of hydra's", "hydra.sweep.dri=x", match=r"Did you mean hydra\.sweep\.dir\?"),
    case("a new key of a random model's config", "model=tiny_random", "model.config.head_dim=8",
         match=r"There is no key 'model\.config\.head_dim'\. Add it: \+model\.config\.head_dim=VALUE\."),
    case("an unknown key with a plus", "+sede=1", match=r"There is no key 'sede' \(did you mean 'seed'\?\)\. Known"),
    case("an unknown key with two pluses", "++sparsty=0.3", match=r"no key 'sparsty' \(did you mean 'sparsity'\?\)"),
    case("an unknown key with a plus, in a sweep", "-m", "+sparsty=0.3,0.4",
         match=r"Error: There is no key 'sparsty' \(did you mean 'sparsity'\?\)\. Known: sparsity"),
    case("an unknown group with a plus", "+experimnt=table1", match=r"no key 'experimnt' \(did you mean 'experiment'"),
    case("an unknown key of a group with a plus", "+finetune.learning_rat=1", match=r"There is no key "
         r"'finetune\.learning_rat' \(did you mean 'learning_rate'\?\)\. Known in finetune: "),
    case("a key that was deleted", "~seed", match=r"A run needs seed, got no value\. Give it .*: seed=\.\.\."),
    case("an unknown option of a group", "method=gradpruner-plus", match=r"There is no method 'gradpruner-plus' \(did "
         r"you mean 'gradpruner_plus'\?\)\. Options of method: angular"),
    case("an unknown option in a sweep", "-m", "method=last,dens", match=r"no method 'dens' \(did you mean 'dense'"),
    case("an unknown launcher", "-m", "hydra/launcher=jobli", match=r"did you mean 'joblib'\?\)\. Options of"),
    case("a group that is null", "dataset=null", match=r"dataset must name an option, got dataset=null\. Options"),
    case("a group that is empty", "method=", match=r"method must name an option, got method=\. Options of method"),
    case("null in a sweep over a group", "-m", "experiment=null,table1",
         match=r"experiment must name an option, got experiment=null,table1\. Options of experiment: depth"),
    case("a config that does not exist", "--config-name=x", match=r"Cannot find primary config 'x'"),
    # ---- values ----
    case("a word for a number", "seed=one", match=r"Cannot use seed=one: Value 'one' .* could not be converted"),
    *(case(f"sparsity={value}", "debug=smoke", f"sparsity={value}", match=rf"sparsity is the fraction of decoder "
           rf"layers to prune, in \[0, 1\), got {value}(\.0)?\. For 40 % write sparsity=0\.4\.")
      for value in ("40", "40.0", "-1")),
    case("sparsity=40%", "debug=smoke", "sparsity=40%",
         match=r"sparsity must be a number or auto, got '40%'\. For 40 % write sparsity=0\.4\."),
    case("an empty value for a number", "seed=", match=r"Cannot use seed=: Value '' .* could not be converted"),
    case("a word for a number of a group", "debug=smoke", "evaluation.batch_size=abc",
         match=r"Bad value in evaluation: Value 'abc' of type 'str' could not be converted .*evaluation\.batch_size"),
    case("a commit that looks like a number", "model.revision=12e4567", match=r"model\.revision must be a text, got "
         r"12e4567, which is read as the number inf\. Write 'model\.revision=\"12e4567\"'\."),
    case("a folder that is called true", "dataset.path=true", match=r"dataset\.path must be a text, got true, which is "
         r"read as the boolean True\. Write 'dataset\.path=\"true\"'\."),
    case("an empty model.path", "model.path=", match=r"model\.path must name a model, got ''\. Give it a Hub id"),
    case("an empty results_dir", "results_dir=", match=r"results_dir must be a path, got ''\. Give results_dir=PATH"),
    case("an empty cache_dir", "cache_dir=", match=r"cache_dir must be a path, got ''\. Give cache_dir=PATH"),
    case("an empty output_dir", "output_dir=", match=r"output_dir must be a path, got ''\. Give output_dir=PATH"),
    case("a misspelt interpolation", "results_dir=${oops}/x",
         match=r"results_dir cannot be resolved: Interpolation key 'oops' not found\. Correct what is in \$\{\}"),
    case("an unknown resolver", "results_dir=${oops:x}",
         match=r"results_dir cannot be resolved: Unsupported interpolation type oops\. Correct what is in \$\{\}"),
    case("a job that changes its folder", "hydra.job.chdir=true",
         match=r"Paths start at the folder in which the command was started, got hydra\.job\.chdir=true\. Leave that"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "match"), REFUSED)
def test_refused_command_lines(refused, arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the folder of a sweep
    assert re.search(match, refused(*arguments))


@pytest.mark.parametrize(("arguments", "match"), [
    case("a report: a misspelt key", "tabel=1", match=r"There is no key 'tabel'\. Did you mean table\?"),
    case("a report: a misspelt key with a plus", "+tabel=1", match=r"no key 'tabel' \(did you mean 'table'\?\)"),
    case("a report: a path with = without hydra's quotes", "runs_dir=/a=b",
         match=r"Hydra cannot read the argument 'runs_dir=/a=b'\. .* Write 'runs_dir=\"/a=b\"'\."),
    case("a report: an empty runs_dir", "runs_dir=", match=r"runs_dir must be a path, got ''\. Give runs_dir=PATH"),
    case("a report: no folder in the list of runs_dir", "runs_dir=[]",
         match=r"runs_dir must be a path or a list of paths, got \[\]\. Give runs_dir=PATH or "
         r"runs_dir=\[PATH,PATH\]\."),
    case("a report: an empty folder in the list of runs_dir", "runs_dir=[runs,'']",
         match=r"runs_dir must be a path or a list of paths, got \['runs', ''\]\."),
    case("a report: a misspelt interpolation", "runs_dir=${oops}", match=r"runs_dir cannot be resolved: Interpolation"),
    case("a report: a plan that does not exist", "table=11", "model=tiny_random", "plan=nowhere.json",
         match=r"plan must be the plan\.json of a run, got .*nowhere\.json: .*No such file.*\. Set plan\."),
])  # fmt: skip
def test_refused_command_lines_of_the_report(refused, arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(match, refused(*arguments, main=report.main))


# ---- what works ----


@pytest.mark.parametrize("arguments", [
    pytest.param(["experiment=null"], marks=tried("`experiment=null`", "runs as without it")),
    pytest.param(["experiment="], marks=tried("`experiment=`", "runs as without it")),
    pytest.param(["debug=smoke", "debug=null"], marks=tried("`debug=smoke debug=null`", "runs as without both")),
])  # fmt: skip
def test_a_group_that_is_null_by_default_may_be_null(configs, arguments):
    assert call(run.main, *arguments).returncode == 0
    assert call(run.main).returncode == 0
    assert configs[0] == configs[1]


@tried("`-m experiment=null seed=0,1`", "two runs")
def test_a_sweep_with_a_group_that_is_null(configs, tmp_path):
    assert call(run.main, "-m", "experiment=null", "seed=0,1", f"hydra.sweep.dir={tmp_path}").returncode == 0
    assert [cfg.seed for cfg in configs] == [0, 1]


@tried("one setting twice", "the last one counts; warning: seed is given more than once")
def test_a_repeated_setting_is_warned_about(configs):
    done = call(run.main, "seed=1", "seed=2", "results_dir=a", "results_dir=b c")
    assert "Warning: seed is given more than once, the last counts: seed=1 seed=2" in done.stderr
    assert "the last counts: results_dir=a 'results_dir=b c'" in done.stderr
    assert configs[0].seed == 2 and configs[0].results_dir == "b c"


@tried("settings before and after -m", "all count")
def test_settings_on_both_sides_of_an_option(configs, tmp_path):
    assert call(run.main, "seed=0,1", "-m", "merge_count=1", f"hydra.sweep.dir={tmp_path}").returncode == 0
    assert [(cfg.seed, cfg.merge_count) for cfg in configs] == [(0, 1), (1, 1)]


@pytest.mark.parametrize("value", [
    pytest.param(value, marks=tried(f"`dry_run={value}`", "is true")) for value in ("yes", "True", "on", "'true'", "1")
])  # fmt: skip
def test_words_for_true(configs, value):
    assert call(run.main, f"dry_run={value}").returncode == 0 and configs[0].dry_run is True


@tried("digits as a text: `model.revision=1234567`", "is that text")
def test_digits_as_a_text(configs):
    assert call(run.main, "model.revision=1234567").returncode == 0
    assert OmegaConf.to_container(configs[0])["model"]["revision"] == 1234567
    assert build_pipeline(configs[0]).model.revision == "1234567"
