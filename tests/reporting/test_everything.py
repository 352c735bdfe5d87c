"""All runs of the paper's presets in one folder: every table has the paper's rows and columns, full, and no others."""

import dataclasses
import itertools
import json
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict
from reporting.test_tables import record, shape

from experiments.config import CONF, resolve
from gradpruner.models.offline_configs import shipped_config
from gradpruner.record import NOT_IDENTITY
from gradpruner.reporting.appendix import appendix_tables
from gradpruner.reporting.comparison_figures import draw
from gradpruner.reporting.coordinates import coordinates
from gradpruner.reporting.efficiency import efficiency_tables
from gradpruner.reporting.measures import BY_SIMILARITY
from gradpruner.reporting.paper_tables import other_runs, paper_table
from gradpruner.reporting.published import load_published
from gradpruner.tasks import MedMcqa

PAPER = CONF.parent / "results" / "paper"
TABLES = [f"table{number}" for number in (1, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13)]
FIGURES = [f"figure{number}" for number in (5, 6, 7, 8, 9)]
# Presets with the runs of others: table2 of table1, table9 of table8, table10 of table5.
PRESETS = [f"table{number}" for number in (1, 3, 4, 5, 6, 7, 8, 12, 13)] + [f"figure{n}" for n in (1, 2, 5, 6, 7, 8, 9)]
DROP_LAYERS = ("laco", "igia_only", "gradpruner")
LEAST_RUNS = 435
IS_OTHER = not getattr(MedMcqa, "paper_comparable", True)  # whether the paper's MedMCQA was another task than ours


def preset_configs(name, parts):
    """Yields method and config of every cell of a preset.

    Hydra composes each preset once, as that takes a quarter of a second; methods, models and datasets are put in as the
    parts that they are.
    """
    cfg = compose(
        "config", overrides=[f"experiment={name}", "scale=paper", "evaluation=generate"], return_hydra_config=True
    )
    overrides = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    axes = {
        each.key_or_group: [str(value) for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.get_value_element_as_str())]
        for each in OverridesParser.create().parse_overrides(overrides)
    }
    excluded = OmegaConf.to_container(cfg.hydra.callbacks.sweep.exclude)
    tested = cfg.dataset.test
    with open_dict(cfg):
        del cfg["hydra"]
    # Every cell sets every key of the sweep, so one config serves all of them.
    for cell in (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())):
        if any(all(cell.get(key) == str(value) for key, value in out.items()) for out in excluded):
            continue
        with open_dict(cfg):
            cfg.model = parts(f"model={cell['model']}").model
            cfg.method = parts("experiment=table1", "scale=paper", f"method={cell['method']}").method
            cfg.dataset = parts("experiment=table1", "scale=paper", f"dataset={cell['dataset']}").dataset
            cfg.dataset.test = tested
            cfg.finetune.mode = cell["finetune"]
        for key, value in cell.items():
            if key not in ("model", "dataset", "finetune", "evaluation", "method"):
                OmegaConf.update(cfg, key, OmegaConf.create(f"v: {value}").v)
        yield cell["method"], resolve(cfg)


def finished(method, config):
    """Makes the record of a run; it scores higher the more layers it keeps."""
    num_layers = shipped_config(config["model"]["path"]).num_hidden_layers
    settings, num_kept = config["method"], num_layers
    if method in DROP_LAYERS:
        sparsity, given = settings.get("sparsity"), settings.get("num_pruned_layers")
        num_kept -= given if given is not None else round(sparsity * num_layers)
    dataset = config["dataset"]["test"] or config["dataset"]["_target_"].split(".")[-2]
    value = num_kept / 100 + 0.1
    metrics = {"num_examples": 1000, "answer_nll": value, "answer_nll_stderr": 0.01}
    if dataset in BY_SIMILARITY:
        metrics |= {"similarity": value, "similarity_stderr": 0.01}
        metrics |= {"bertscore_encoder": "roberta-large", "bertscore_layer": 17, "rouge_stemming": True}
    else:
        metrics |= {"accuracy": value, "accuracy_stderr": 0.01, "accuracy_mode": "generate"}
        metrics["accuracy_match"] = "raw"
    made = record(method, config=config, metrics=metrics, layers=num_kept)
    absorbed = {str(layer): 0 for layer in range(1, 1 + (settings.get("merge_count") or 0))}
    pruned = list(range(1, 1 + num_layers - num_kept))
    return dataclasses.replace(
        made,
        identity=json.dumps({key: value for key, value in config.items() if key not in NOT_IDENTITY}, sort_keys=True),
        model=made.model | {"name": config["model"]["path"].split("/")[1], "num_hidden_layers": num_layers,
                            "shape": shape(num_layers)},
        pruning=made.pruning | {"pruned_layers": pruned, "absorbed_by": absorbed},
        finetune=made.finetune | {"steps": 1000, "losses": "2 1.5 1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def everything():
    composed = {}

    def parts(*overrides):
        if overrides not in composed:
            composed[overrides] = compose("config", overrides=list(overrides))
        return composed[overrides]

    runs = {}
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        for name in PRESETS:
            for method, config in preset_configs(name, parts):
                made = finished(method, config)
                runs[made.identity] = made
    return list(runs.values())


def published(name):
    return load_published(PAPER, name)


def blocks(paper):
    """Returns the published rows by model and kind of fine-tuning: each is a table of ours."""
    found = {}
    for row in paper.rows:
        found.setdefault((row.coordinates.get("model"), row.coordinates.get("finetune")), []).append(row)
    return list(found.values())


def own_rows(table):
    """Returns the rows without those of our variant of SAT, which stands beside the paper's value."""
    return [row for row in table.rows if row[0] != "SAT (no dense tail)"]


def test_these_are_the_runs_of_the_presets(everything):
    assert len(everything) >= LEAST_RUNS


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_the_papers(name, everything):
    paper = published(name)
    tables = [table for table in paper_table(paper, everything) if not re.search("NLL|difference", table.title)]
    assert len(tables) == len(blocks(paper))
    found = {tuple(re.findall(r"\[(.*?)\]", " ".join(row))) for table in tables for row in table.rows}
    for table in tables:
        width = len(paper.columns)
        assert len(table.headers) == 1 + width + (width > 1 and paper.axis == "dataset"), table.headers
        assert not any(re.search(r"[,=]", header) for header in table.headers)
        assert not any("- [" in cell or cell == "-" for row in table.rows for cell in row[1:]), table.markdown()
    # With the digits of every published value, in the order of the columns, beside ours.
    for row in paper.rows:
        is_other = [column == "medmcqa" and IS_OTHER for column in paper.columns]
        values = ["-" if other else str(value) for value, other in zip(row.values, is_other, strict=True)]
        if len(values) > 1 and paper.axis == "dataset":
            printed = row.average if row.average is not None else round(sum(row.values) / len(values), 3)
            values.append("-" if any(is_other) else str(printed))
        assert tuple(values) in found
    assert len([row for table in tables for row in own_rows(table)]) == len(paper.rows)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_as_a_table_is_the_papers(name, everything):
    paper = published(name)
    [table, *_] = paper_table(paper, everything)
    assert len(table.rows) == len(paper.rows)
    own_depths = [f"num_pruned_layers {number} ↑" for number in (6, 8, 9, 10, 11, 12, 13)]
    assert table.headers[1:-1] == own_depths[:-1] if not paper.columns else len(table.headers) > len(paper.columns)
    assert not any(cell == "-" for row in table.rows for cell in row[1:])


def test_average_of_eight(everything):
    for table in paper_table(published("table1"), everything):
        if "NLL" not in table.title:
            assert table.headers[-1].startswith("average of 8")


def test_other_settings_are_in_the_appendix_once(everything):
    paper = [published(name) for name in (*TABLES, *FIGURES)]
    others = other_runs([published("table1")], everything)
    own = [coordinates(run) for run in others]
    fractions = {each["train_fraction"] for each in own}
    assert fractions == {0.01, 0.1, 0.3, 1.0} and {"dora", "qlora"} <= {each.get("adapter") for each in own}
    tables = appendix_tables([published("table1")], everything)
    assert {table.title.split(":")[0] for table in tables} == {"Other settings"}
    headers = " ".join(header for table in tables for header in table.headers)
    assert re.search("WinoGrande[^A-Z]*, train_fraction=0.01", headers)
    # In no table of the paper: importance over the whole training, for Figure 2, and the other rule of merging by sign.
    rest = [coordinates(run) for run in other_runs(paper, everything)]
    assert {(each["fraction"], each["merge_rule"]) for each in rest} == {(1.0, "sign_sum"), (0.01, "sign_average")}


@pytest.mark.parametrize(
    ("figure", "lines"),
    [
        ("5", {"Dense", "GradPruner w/o merging"}),
        ("8", {"Dense", "GradPruner w/o merging"}),
        ("6", {"Dense", "GradPruner"}),
        ("7", {"Dense", "GradPruner w/o merging"}
            | {"GradPruner, same signs summed (Eq. 5)", "GradPruner, same signs averaged (Eq. 6)",
               "GradPruner, averaged regardless of sign"}),
        ("9", {"Dense", "GradPruner", "Kernel pruning by IGIA"}),
    ],
)  # fmt: skip
def test_every_figure_is_the_papers(figure, lines, everything, tmp_path):
    full = [run for run in everything if run.config["finetune"]["mode"] == "full"]
    [picture] = draw(figure, full, tmp_path)
    assert "Mean over 8 datasets" in picture.caption or "mean over 8 datasets" in picture.caption
    assert set(re.findall(r"(?<=[:;] )([A-Z][^:;]*?)(?= \d+\.\d{3})", picture.alt)) == lines


def test_loss_curves_are_of_the_dense_model(everything, tmp_path):
    histories = {run.identity: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}] for run in everything}
    pictures = {picture.path.stem: picture.alt for picture in draw("1", everything, tmp_path, histories)}
    for name in ("figure1-pubmedqa", "figure1-piqa"):
        assert "GradPruner" not in pictures[name] and "Dense" in pictures[name]


def test_table_2_has_its_methods_and_no_others(everything):
    paper = published("table2")
    tables = efficiency_tables(everything, paper)
    usual = [table for table in tables if "other settings" not in table.title]
    assert usual and all("paper" not in table.headers for table in tables if table not in usual)
    known = {row.coordinates["method"] for row in paper.rows}
    assert all(len(own_rows(table)) <= len(known) for table in usual)
    llama = [table for table in usual if table.title.startswith("Llama-3.1-8B on piqa")]
    names = [row[0] for row in own_rows(llama[0])]
    assert names == ["Dense", "LLM-Pruner", "LaCo", "SAT (ends dense)", "GradPruner"]
