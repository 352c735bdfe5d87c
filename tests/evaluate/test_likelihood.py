"""Option scoring against one plain forward pass per option."""

import math

import pytest
import torch
from tiny_model import CONFIG

from gradpruner.encoding import Encoder
from gradpruner.evaluate.base import predict_all
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.evaluate.metrics import likelihood_metrics
from gradpruner.files import read_jsonl
from gradpruner.models.spec import ModelSpec
from gradpruner.tasks import DataError, Example

EXAMPLES = [
    Example("a", "Question: short?\nAnswer:", " yes", (" yes", " no, never"), 0, " "),
    Example("b", "Question: a much longer one, with five options?\nAnswer:", " c", (" a", " b", " c", " d", " e"), 2),
    Example("c", "Q", " the only long option here", (" x", " the only long option here", " y"), 1),
    Example("d", "Tell me:", " open answer"),
    Example("e", "", " from nothing", (" from nothing", " z"), 0),
]


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
MODELS = {
    "llama": ("llama", {}, "auto"),
    "llama, eager": ("llama", {}, "eager"),
    "mistral": ("mistral", {}, "auto"),
    "mistral, short window": ("mistral", {"sliding_window": 8}, "auto"),
    "qwen3": ("qwen3", {"head_dim": 8}, "auto"),
    "gemma2, eager, capped logits": ("gemma2", {**GEMMA, "final_logit_softcapping": 5.0}, "auto"),
    "gemma3, short window": ("gemma3_text", {**GEMMA, "sliding_window": 8, "sliding_window_pattern": 3}, "auto"),
    "gemma3": ("gemma3_text", GEMMA, "auto"),
}


@pytest.fixture(scope="module", params=MODELS)
def model_and_tokenizer(request, tmp_path_factory):
    model_type, config, attention = MODELS[request.param]
    spec = ModelSpec(f"random:{model_type}", config=CONFIG | config, attn_implementation=attention)
    folder = tmp_path_factory.mktemp("assets")
    return spec.load(folder), spec.load_tokenizer(folder)


@pytest.fixture
def score(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer

    def score(examples=EXAMPLES, batch_size=3, max_length=512):
        encoder, evaluation = Encoder(tokenizer, max_length), Likelihood(batch_size)
        questions = evaluation.questions(examples, encoder)
        return read_jsonl(predict_all(lambda: model, evaluation, encoder, questions, tmp_path))

    return score


def by_hand(model, tokenizer, prompt, option):
    """Returns the log-likelihood of one option from one row, without padding or cache."""
    prompt_ids = tokenizer(prompt).input_ids or [tokenizer.bos_token_id]
    option_ids = tokenizer(option).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + option_ids])).logits[0].double()
    total = 0.0
    for position, token in enumerate(option_ids, start=len(prompt_ids)):
        row = logits[position - 1]
        total += float(row[token] - row.logsumexp(0))
    return total


def test_equals_one_forward_pass_per_option(model_and_tokenizer, score):
    for example, result in zip(EXAMPLES, score(), strict=True):
        options = example.choices or (example.answer,)
        expected = [by_hand(*model_and_tokenizer, example.prompt, option) for option in options]
        assert result["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert result["answer_nll"] == pytest.approx(-expected[example.label or 0], abs=1e-3)
        assert result["num_characters"] == [len(option.removeprefix(example.delimiter)) for option in options]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_does_not_depend_on_the_batch(score, batch_size):
    for expected, result in zip(score(batch_size=3), score(batch_size=batch_size), strict=True):
        assert result["log_likelihoods"] == pytest.approx(expected["log_likelihoods"], abs=1e-4)
        assert (result["prediction"], result["prediction_norm"]) == (
            expected["prediction"],
            expected["prediction_norm"],
        )


def test_permuting_options_permutes_scores(score):
    original = EXAMPLES[1]
    turned = Example("b", original.prompt, " c", original.choices[::-1], 2)
    [first], [second] = score([original]), score([turned])
    assert second["log_likelihoods"] == pytest.approx(first["log_likelihoods"][::-1], abs=1e-4)
    assert (first["prediction"] == 2) == (second["prediction"] == 2)


def test_results_come_in_the_given_order(score):
    assert [row["id"] for row in score()] == ["a", "b", "c", "d", "e"]


def test_long_prompts_are_cut_at_the_end_of_their_context(model_and_tokenizer, score, caplog):
    example = Example("long", "x" * 100 + "tail:", " yes", (" yes", " no"), 0, " ", context=(0, 100))
    [result] = score([example], max_length=12)
    expected = by_hand(*model_and_tokenizer, "xxxtail:", " yes")
    assert result["log_likelihoods"][0] == pytest.approx(expected, abs=1e-3)
    assert "1 of 1 prompts were shortened in their context to fit 12 tokens" in caplog.text


def test_test_rows_that_do_not_fit_are_refused(score):
    with pytest.raises(DataError, match=r"2 of 5 test rows do not fit into dataset\.max_length=40 .*ids b, c\. Raise"):
        score([*EXAMPLES[:2], Example("c", "x" * 50, " y"), *EXAMPLES[3:]], max_length=40)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more, got 0\. Raise evaluation\.batch_size"):
        Likelihood(batch_size=0)


def prediction(label, log_likelihoods, characters, tokens=2):
    per_character = [value / count for value, count in zip(log_likelihoods, characters, strict=True)]
    return {
        "label": label,
        "log_likelihoods": log_likelihoods,
        "prediction": log_likelihoods.index(max(log_likelihoods)),
        "prediction_norm": per_character.index(max(per_character)),
        "answer_nll": -log_likelihoods[label],
        "answer_tokens": tokens,
    }


def test_metrics_by_hand():
    rows = [
        prediction(0, [-1.0, -2.0], [1, 10]),  # sum: right, per character: wrong
        prediction(1, [-3.0, -2.0], [2, 2]),  # both right
        prediction(1, [-1.0, -6.0], [3, 3], tokens=5),  # both wrong
        prediction(1, [-4.0, -3.0], [5, 1]),  # sum: right, per character: wrong
    ]
    metrics = likelihood_metrics(rows)
    assert metrics["accuracy"] == 0.75 and metrics["accuracy_norm"] == 0.25
    assert metrics["accuracy_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics["majority_accuracy"] == 0.75 and metrics["chance_accuracy"] == 0.5
    assert metrics["answer_nll"] == pytest.approx((1 + 2 + 6 + 3) / (2 + 2 + 5 + 2))
    assert metrics["accuracy_mode"] == "likelihood" and metrics["num_examples"] == 4


def test_open_answers_have_no_accuracy():
    row = {"label": None, "prediction": None, "answer_nll": 4.0, "answer_tokens": 2}
    metrics = likelihood_metrics([row, row])
    assert metrics["answer_nll"] == 2.0 and metrics["answer_nll_stderr"] == 0.0
    assert "accuracy" not in metrics
