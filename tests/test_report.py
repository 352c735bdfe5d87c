"""Tests of the report over run folders."""

import csv
import dataclasses
import io
import re
from pathlib import Path

import pytest
from commands import call
from hydra import compose, initialize_config_dir
from rich.console import Console

from experiments.config import CONF
from experiments.job import run_job
from experiments.records import read_records
from experiments.report import main, show
from gradpruner.files import write_json
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.record import RunRecord
from gradpruner.reporting.tables import Table


@pytest.fixture
def run(tmp_path, shared_cache):
    def run(*overrides):
        folders = [f"results_dir={tmp_path}/runs", f"cache_dir={shared_cache}", "reference=null"]
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return run_job(compose("config", overrides=["debug=smoke", *folders, *overrides]))

    return run


def report(*arguments):
    return call(main, *arguments)


def test_finished_runs_are_compared_and_others_named(run, tmp_path):
    for method in ("random", "dense", "last"):
        run(f"method={method}")
    write_json(tmp_path / "runs/old/record.json", {"schema_version": 0})
    dataclasses.replace(run("method=last"), status="failed").save(tmp_path / "runs/bad")
    done = report(f"runs_dir={tmp_path}/runs", f"output={tmp_path}/table.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("Dense") < done.stdout.index("Last but the final one") < done.stdout.index("Random")
    assert "schema version 0" in done.stderr and "has status failed" in done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("## random-llama on arc_easy, lora") and "| Random | 4 |" in text

    # A number can be traced: to the run's folder, by a link in HTML and by columns in CSV.
    done = report(f"runs_dir={tmp_path}/runs", f"output={tmp_path}/pages/table.html", "figure=plans")
    [link] = set(re.findall(r'<a href="([^"#]*/last/[^"]*)">', (tmp_path / "pages/table.html").read_text()))
    assert (tmp_path / "pages" / link / "record.json").is_file() and link.startswith("../runs/random-llama/")
    done = report(f"runs_dir={tmp_path}/runs", f"output={tmp_path}/table.csv")
    rows = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    [last] = [row for row in rows if row["method"].startswith("Last")]
    record = RunRecord.load(Path(last["runs"]))
    assert record.pruning["method"] == "last" and last["commits"].startswith(record.environment["git_commit"])
    done = report(f"runs_dir={tmp_path}/runs", f"output={tmp_path}/all.csv", "table=all", "model=tiny_random",
                  f"cache_dir={tmp_path}/cache")  # fmt: skip
    assert "tables: one CSV file for each, and tables.csv with their titles" in done.stdout
    titles = dict(csv.reader((tmp_path / "all/tables.csv").read_text().splitlines()))
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"tables.csv", *titles} - {"file"}
    assert titles["1-random-llama-on-arc-easy-lora.csv"] == "random-llama on arc_easy, lora"
    assert all(len(name) < 50 for name in titles)


@pytest.mark.bad_input("Sweeps and records", "a runs_dir without runs", "error: There is no finished run to report")
def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match=rf"no finished run to report, searched {tmp_path} .*experiment=quickstart"):
        read_records(tmp_path)
    done = report(f"runs_dir={tmp_path}")
    assert done.returncode == 1 and "Error: There is no finished run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "folder", "shown"), [
    ((), "small", "smollm2-135m on arc_easy, lora"),
    (("table=3",), "small", "Table 3: with and without merging"),
    (("table=importance",), "importance", "Importance runs: smollm2-135m on arc_easy, lora"),
    (("table=learning_rate",), "learning_rate", "Learning rates: smollm2-135m on arc_easy"),
    (("table=recipe",), "recipe", "LoRA, distilled, tuned teacher 0.5, 320 training rows, 40 % of the layers"),
    (("figure=9",), "", "Written: "),
])  # fmt: skip
def test_a_fresh_clone_shows_the_committed_records(tmp_path, monkeypatch, arguments, folder, shown):
    monkeypatch.chdir(tmp_path)
    done = report(*arguments, "output=page.md")
    assert done.returncode == 0 and shown in done.stdout, done.stderr
    searched = rf"searched {tmp_path}/results/runs for record\.json and other records\. Run something first"
    assert re.search(searched, done.stderr)
    folder = f"results/records/{folder}".rstrip("/")
    assert re.search(rf"Shown instead: the \d+ committed records in {CONF.parent}/{folder}\.\n", done.stderr)
    said = f"Of the committed records in {folder}, not of runs in results/runs"
    assert (said in (tmp_path / "page.md").read_text()) == (not arguments or "figure" not in arguments[0])
    assert not (tmp_path / "results").exists()  # figures are beside the report
    assert (tmp_path / "page-figures/figure9.png").is_file() == ("figure=9" in arguments)


def test_help_is_its_own():
    done = report("--help")
    assert done.returncode == 0 and "Usage: python -m experiments.report" in done.stdout and "runs_dir" in done.stdout


def test_table_11_takes_any_model_and_plan(tmp_path):
    done = report("table=11", "model=tiny_random", f"cache_dir={tmp_path}/cache")
    assert done.returncode == 0, done.stderr
    assert (
        "original" in done.stdout
        and "pruned, 20% of layers" in done.stdout
        and "paper" not in done.stdout.split("*")[0]
    )
    plan = PruningPlan(6, (1,), width=WidthPlan(((0, 1),) * 5, ((0, 3),) * 5), method="by_hand")
    plan.save(tmp_path / "plan.json")
    done = report("table=11", "model=tiny_random", f"cache_dir={tmp_path}/cache", f"plan={tmp_path}/plan.json")
    assert done.returncode == 0 and "by_hand" in done.stdout, done.stderr


@pytest.mark.parametrize(("table", "lacks", "match", "wanted", "shown"), [
    ("2", "last", "Run method=dense with the same settings", ["method=dense"], "time and memory (Table 2)"),
    ("importance", "random", "needs runs that rank layers by gradients, got none among 1 in", ["method=gradpruner"],
     "Importance runs: random-llama on arc_easy, lora"),
    ("learning_rate", "last", "needs runs that differ in the learning rate of the fine-tune alone, got none among 1 in",
     ["method=last", "finetune.learning_rate=0.01"], "Learning rates: random-llama on arc_easy, lora"),
])  # fmt: skip
def test_tables_that_want_a_certain_run(run, tmp_path, table, lacks, match, wanted, shown):
    run(f"method={lacks}")
    done = report(f"table={table}", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 1 and match in done.stderr
    run(*wanted)
    done = report(f"table={table}", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0 and shown in done.stdout, done.stderr


@pytest.mark.parametrize("width", [None, 60], ids=["pipe", "terminal"])
def test_no_number_is_cut_off(width):
    values = [f"{index / 7:.3f} ±0.0{index}" for index in range(20)]
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=width is not None, color_system=None)
    show(Table("a [b] title", ["method", *("[red]" for _ in values)], [["[x]", *values]], ["a [note]"]), console)
    text = stream.getvalue()
    assert all(text.count(part) for part in ("a [b] title", "[x]", "a [note]")) and "…" not in text
    if width is None:
        assert all(value in text for value in values) and text.count("[red]") == 20


def test_tables_of_the_paper_with_ours(run, tmp_path):
    for method in ("dense", "laco"):
        run(f"method={method}")
    done = report("table=1", f"runs_dir={tmp_path}/runs", f"output={tmp_path}/table.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("## Table 1: main results at 40 % sparsity; random-llama with ")
    assert " [-] |" in text and "[-]: not the same measure: ours is the likeliest option" in text
    assert ", answer NLL\n" in text and "paired on the same test rows" in text
    done = report("table=6", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "Table 6 (lower sparsity) needs runs of dense, llm_pruner" in done.stderr and "experiment=table6" in done.stderr
    )


def test_figures_as_tables(run, tmp_path):
    for density in (0.1, 0.2):
        run("method=gradpruner", f"method.density={density}")
    done = report("table=figure6", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0 and "Figure 6: density of merged weights" in done.stdout, done.stderr


def test_one_page_with_everything(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("dense", "gradpruner"):
        run(f"method={method}")
    done = report("runs_dir=runs", "output=report.html", "model=tiny_random", "cache_dir=cache")
    assert done.returncode == 0 and "Written: report.html" in done.stdout, done.stderr
    assert "Not drawn" not in done.stderr and "Table 3" not in done.stdout  # the terminal has the comparison alone
    assert not (tmp_path / "results").exists() and not list(tmp_path.rglob("*.svg"))
    text = (tmp_path / "report.html").read_text()
    for section in ("Table 3: with and", "Table 11: work and size", "Figure 1: training loss", "Figure 2: layer",
                    "Layer importance", "Pruned layers", "Importance runs"):  # fmt: skip
        assert re.search(rf"<h3[^>]*>{section}", text), section
    assert "No run here belongs in: Table 1 (main results at 40 % sparsity)" in text
    assert "random-llama on ARC-Easy, LoRA" in text and "Answers that changed" in text
    assert "python -m experiments.run model=tiny_random dataset=arc_easy method=gradpruner finetune=lora" in text


def test_figures_of_a_page_can_be_kept(run, tmp_path):
    run("method=gradpruner")
    folder = tmp_path / "figures"
    done = report("figure=all", f"runs_dir={tmp_path}/runs", f"figures_dir={folder}", f"output={tmp_path}/page.html")
    assert done.returncode == 0 and "Not drawn: Figure 9 shows" in done.stderr
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert {"figure1-arc-easy", "figure2", "importance", "plans"} <= drawn and f"Written: {folder}" in done.stdout
    assert "Table 3" not in (tmp_path / "page.html").read_text()


def test_the_headline_chart_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = CONF.parent / "results/records/depth"
    done = report(f"runs_dir={records}", "headline=images/headline.svg")
    assert done.returncode == 0 and "Written: images/headline.svg" in done.stdout
    assert "640 training rows" in (tmp_path / "images/headline.svg").read_text()
    done = report(f"runs_dir={records}", "headline=images/headline.pdf")
    assert done.returncode == 1 and "headline must end with one of .svg, .png, got images/headline.pdf" in done.stderr
    done = report(f"runs_dir={records}", "methods=[]", "headline=a.png")
    assert done.returncode == 1 and "shows runs of methods that prune, got none among 1 in" in done.stderr


def test_records_alone_have_the_losses_and_the_scores_of_rows(run, tmp_path):
    record = run("method=last")
    scores = [int(score) for score in record.row_scores["accuracy"]]
    assert len(scores) == record.metrics["num_examples"] and sum(scores) / len(scores) == record.metrics["accuracy"]
    assert len(record.finetune["losses"].split()) == record.finetune["steps"]
    record.save(tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "record.json").rename(tmp_path / "records/last.json")  # as in results/records, without the run's folder
    done = report("figure=1", f"runs_dir={tmp_path}/records", f"figures_dir={tmp_path}/figures")
    assert done.returncode == 0 and (tmp_path / "figures/figure1-arc-easy.png").is_file(), done.stderr


def test_some_methods_alone(run, tmp_path):
    for method in ("dense", "last", "random"):
        run(f"method={method}")
    done = report("methods=[last]", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0 and "Last but" in done.stdout and "Random" not in done.stdout, done.stderr
    done = report("methods=[lst]", f"runs_dir={tmp_path}/runs")
    assert (
        done.returncode == 1
        and "methods must be among those that were run, dense, last, random, got lst" in done.stderr
    )


def test_one_figure(run, tmp_path):
    run("method=gradpruner")
    done = report("figure=plans", f"runs_dir={tmp_path}/runs", f"figures_dir={tmp_path}/figures")
    assert done.returncode == 0 and f"Written: {tmp_path}/figures/plans.png" in done.stdout, done.stderr
    assert "random-llama on" not in done.stdout  # no table was asked for


@pytest.mark.parametrize(("setting", "match"), [
    ("figure=3", "figure must be one of 1, 2, 5, 6, 7, 8, 9, importance, plans, all, or null, got '3'"),
    ("output=report.pdf", "output must end with one of md, tex, csv, html, got report.pdf. Name it so."),
])  # fmt: skip
def test_other_figures_and_formats_are_refused(setting, match):
    done = report(setting)
    assert done.returncode == 1 and match in done.stderr


@pytest.mark.parametrize(("name", "shown"), [("99", "'99'"), ("figure1", "'figure1'")])
def test_other_tables_are_refused(name, shown):
    done = report(f"table={name}")
    assert done.returncode == 1 and "table must be one of 1, 2, 3, " in done.stderr
    assert f"figure9, importance, learning_rate, recipe, all, or null, got {shown}." in done.stderr
