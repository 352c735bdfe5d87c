"""The HTML report is one whole, self-contained and accessible page, and says what the records say."""

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reporting.test_figures import committed, run
from reporting.test_tables import record

from gradpruner.files import write_jsonl
from gradpruner.reporting.figures import Picture, canvas
from gradpruner.reporting.headline import headline
from gradpruner.reporting.headline_plot import draw_panels
from gradpruner.reporting.page import Runs, page
from gradpruner.reporting.tables import Table, comparisons

EVIL = "<script>alert('a & b')</script>"
TABLE = Table(
    "Table 3: with and without; model, lora, _target_=a.B, path=/home/me",
    ["method", "density 0.2 ↑"],
    [["LaCo, merge_rule=sign_sum", "**0.463** ±0.025"]],
    ["400 test rows & one seed", "a note"],
    section="Table 3",
    heading="model, LoRA",
)
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
VOID = ("meta", "img", "input", "br")


class Page(HTMLParser):
    """Collects tags with attributes and the texts of headings, cells and titles; fails if a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, []))
            self.texts.append(self.open[-1])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def of(self, *names):
        return [attrs for tag, attrs in self.tags if tag in names]

    def text_of(self, *names):
        return [" ".join("".join(parts).split()) for tag, parts in self.texts if tag in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense model, two that are pruned, one of them with two seeds, on two datasets."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for data in ("arc_easy", "piqa"):

        def scored(method, value, pruned=(), data=data, **given):
            metrics = {"num_examples": 400, "accuracy": value, "accuracy_stderr": 0.02, "accuracy_mode": "likelihood"}
            return run(method, pruned, dataset=data, metrics=metrics, **given)

        made += [
            scored("dense", 0.7),
            scored("gradpruner", 0.5, (2, 3), absorbed_by={"2": 1}, scores=[5, 4, 1, 2, 3, 9]),
            scored("gradpruner", 0.6, (2, 3), seed=1, scores=[5, 4, 1, 0, 3, 9]),
            scored("shortgpt", 0.65, (1, 4), scores=[5, 1, 4, 2, 1, 9]),
        ]
    records = []
    for number, each in enumerate(made):
        each.finetune["losses"] = "3 2.5 2"
        records.append(replace(each, path=folder / f"run {number}" / "record.json", identity=str(number)))
    return records


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with canvas(folder / "figure7.svg", 1.0) as figure:
        figure.subplots().bar([1, 2], [3, 4])
    chart = headline(runs)
    known = Runs(
        runs,
        label=f"Of {EVIL}",
        problems=[f"Not shown: {EVIL}"],
        commands={id(each): f"python -m experiments.run seed={each.seed}" for each in runs},
        chart=chart,
        panels=draw_panels(chart, folder),
    )
    picture = Picture(folder / "figure7.svg", f"Bars. {EVIL}", f"Bar chart: {EVIL}", "Figure 7")
    return page("A report", [TABLE, *comparisons(runs)], [picture], folder, known)


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def test_the_page_loads_nothing_and_runs_one_known_script(text, parsed):
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    links = [value for _, attrs in parsed.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert links and not any(re.match(r"[a-z]+:(?!image)|//", link) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [each["content"] for each in parsed.of("meta") if "http-equiv" in each]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(key.startswith("on") for _, attrs in parsed.tags for key in attrs)


def test_the_page_can_be_read_aloud(parsed):
    levels = [int(tag[1]) for tag, _ in parsed.tags if tag in HEADINGS]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [name for _, attrs in parsed.tags for name in attrs.get("aria-labelledby", "").split()]
    anchors = [attrs["href"][1:] for attrs in parsed.of("a") if attrs["href"].startswith("#")]
    assert set(named) | set(anchors) <= set(ids)
    drawings = [attrs for attrs in parsed.of("svg") if attrs.get("aria-hidden") != "true"]
    assert drawings and all(attrs["role"] == "img" and attrs["aria-labelledby"] for attrs in drawings)
    assert all(each.get("scope") in ("col", "row") for each in parsed.of("th"))
    assert parsed.of("html") == [{"lang": "en"}] and parsed.of("main") == [{"id": "content"}]
    assert {"class": "skip", "href": "#content"} in parsed.of("a")


def test_it_opens_with_what_was_run_and_what_came_out(text, parsed):
    facts = dict(list(zip(parsed.text_of("dt"), parsed.text_of("dd"), strict=True))[:6])
    assert facts["Runs"] == "8, of 3 methods: Dense, ShortGPT, GradPruner"
    assert facts["Data"].startswith("ARC-Easy, PIQA (each all training rows") and facts["Seeds"].startswith("0, 1")
    assert parsed.text_of("h2")[:2] == ["Summary", "All results"]
    assert "Dense model: accuracy 0.700 (0.672 to 0.728). Best pruned model: ShortGPT" in " ".join(text.split())
    assert "A ShortGPT 0.65 (0.62 to 0.68)" in parsed.text_of("li")
    assert text.index('id="summary"') < text.index("headline-1-title") < text.index('id="results"')


def test_the_main_table_sorts_by_buttons_and_links_to_runs(parsed):
    heads = [attrs for attrs in parsed.of("th") if "aria-sort" in attrs]
    assert {each["aria-sort"] for each in heads} == {"none"} and len(parsed.of("button")) == len(heads) + 3
    assert {each["data-first"] for each in heads if each["data-kind"] == "number"} == {"ascending", "descending"}
    numbers = [float(attrs["data-n"]) for attrs in parsed.of("td") if "data-n" in attrs]
    assert {0.7, 0.55, 0.65} <= {round(number, 6) for number in numbers}
    links = [attrs["href"] for attrs in parsed.of("a") if attrs.get("aria-label", "").startswith("run with seed")]
    folds = [f"#{attrs['id']}" for attrs in parsed.of("details") if attrs.get("class") == "run"]
    assert sorted(links) == sorted(folds) and len(folds) == 8
    assert {tag for tag, _ in parsed.tags} >= {"select", "input", "output"}


def test_headings_and_labels_are_in_words(parsed):
    shown = [*parsed.text_of(*HEADINGS), *parsed.text_of("th")]
    assert "Table 3" in shown and "model, LoRA" in shown
    assert "LaCo, same signs summed (Eq. 5)" in shown and "merge density 20 % ↑" in shown
    assert not [each for each in shown if re.search(r"_target_|=|/home|_", each)]


def test_every_run_has_plan_loss_and_command(text, parsed):
    titles = parsed.text_of("title")
    assert any("Pruned layers: 2-3; merged: 2 into 1." in title for title in titles)
    assert sum("Training loss over 3 steps, from 3.00 to 2.00" in title for title in titles) == 8
    assert text.count("python -m experiments.run seed=1") == 2
    links = [attrs["href"] for attrs in parsed.of("a") if not attrs["href"].startswith("#")]
    assert len(links) == 8 and all(re.search(r"/run%20\d$", link) for link in links)


def test_text_is_escaped(text, parsed):
    assert text.count("<script") == 1 and "alert('a" not in text
    assert f"Of {EVIL}." in parsed.text_of("p") and f"Not shown: {EVIL}" in parsed.text_of("li")
    assert f"Bar chart: {EVIL}" in parsed.text_of("title") and f"Bars. {EVIL}" in parsed.text_of("figcaption")


def test_a_page_of_tables_alone_has_no_summary():
    parsed = Page(page("Counts", [TABLE]))
    assert parsed.text_of("h2") == ["The paper's tables and figures"] and "strong" in {tag for tag, _ in parsed.tags}


def test_other_pictures_are_refused(tmp_path):
    (tmp_path / "a.svg").write_text("text")
    for name in ("a.png", "a.svg"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=rf"A page shows figures as SVG files, got .*{name}\. Draw it with"):
            page("Report", [], [Picture(tmp_path / name, "", "", "Figure 7")])


def test_the_committed_records_fit_on_a_page_of_a_few_megabytes():
    records = committed("small")
    text = page("Report", comparisons(records), (), runs=Runs(records))
    assert len(Page(text).of("details")) > len(records) and len(text) * 500 / len(records) < 10e6


def test_answers_that_changed(tmp_path):
    folders = {}
    for method, chosen in (("dense", (0, 1, 1)), ("gradpruner", (0, 0, 0))):
        path = tmp_path / method / "record.json"
        made = replace(record(method), path=path, content={"test_rows": "same"}, identity=method)
        path.parent.mkdir()
        path.write_text(json.dumps({}))
        rows = [{"id": f"q{at}", "label": 1, "prediction": choice} for at, choice in enumerate(chosen)]
        write_jsonl(path.with_name("predictions.jsonl"), rows)
        folders[method] = made
    questions = [{"id": "q1", "prompt": "Which <b>?", "options": ["red", "blue"]}]
    write_jsonl(tmp_path / "dense" / "questions.jsonl", questions)
    parsed = Page(page("Report", [], runs=Runs(list(folders.values()))))
    assert any("Of 3 test rows: right in the dense model alone: 2, in this one alone: 0" in each
               for each in parsed.text_of("p"))  # fmt: skip
    cells = parsed.text_of("td")
    assert "blue ✓" in cells and "red ✗" in cells and "option 1 ✗" in cells and "Which <b>?" in parsed.text_of("th")
