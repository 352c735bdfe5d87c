"""Generated answers against a greedy loop without batch, padding or cache."""

import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import CONFIG, EXAMPLES
from transformers import GenerationConfig

from gradpruner.encoding import Encoder
from gradpruner.evaluate import generate as generate_module
from gradpruner.evaluate.base import predict_all
from gradpruner.evaluate.encoders import TextEncoder
from gradpruner.evaluate.generate import Generation
from gradpruner.files import read_jsonl
from gradpruner.models.spec import ModelSpec
from gradpruner.tasks import Example, JsonLines

MAX_NEW_TOKENS = 10


def task(**changes):
    settings = {"train_file": "a", "test_file": "b", "prompt": "{q}", "answer_field": "a"}
    return JsonLines(**{**settings, "max_new_tokens": MAX_NEW_TOKENS, **changes})


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model_and_tokenizer(request, tmp_path_factory):
    spec, folder = ModelSpec(f"random:{request.param}", config=CONFIG), tmp_path_factory.mktemp("assets")
    return spec.load(folder), spec.load_tokenizer(folder)


@pytest.fixture
def answer(model_and_tokenizer, tmp_path):
    _, tokenizer = model_and_tokenizer

    def answer(model, examples=EXAMPLES, batch_size=3, max_length=512):
        encoder = Encoder(tokenizer, max_length)
        evaluation = Generation(batch_size).resolve(task(metrics=("accuracy",)), examples)
        questions = evaluation.questions(examples, encoder)
        return read_jsonl(predict_all(lambda: model, evaluation, encoder, questions, tmp_path))

    return answer


def by_hand(model, tokenizer, prompt, ends=()):
    """Returns the new token ids, from one forward pass over the whole text per token."""
    ids = tokenizer(prompt).input_ids or [tokenizer.bos_token_id]
    new = []
    while len(new) < MAX_NEW_TOKENS:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in (tokenizer.eos_token_id, *ends):
            return new, True
        new.append(token)
    return new, False


def nll_by_hand(model, tokenizer, prompt, text):
    prompt_ids = tokenizer(prompt).input_ids or [tokenizer.bos_token_id]
    ids = tokenizer(text).input_ids[:MAX_NEW_TOKENS]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probabilities[len(prompt_ids) + i - 1, token]) for i, token in enumerate(ids)), len(ids)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_equals_the_greedy_loop_whatever_the_batch(model_and_tokenizer, answer, batch_size):
    model, tokenizer = model_and_tokenizer
    for example, row in zip(EXAMPLES, answer(model, batch_size=batch_size), strict=True):
        tokens, is_finished = by_hand(model, tokenizer, example.prompt)
        assert row["generated"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert (row["generated_tokens"], row["is_finished"]) == (len(tokens), is_finished)
        nll, count = nll_by_hand(model, tokenizer, example.prompt, example.answer)
        assert row["answer_nll"] == pytest.approx(nll, abs=1e-3) and row["answer_tokens"] == count
        assert row["reference"] == example.answer.strip()


def test_stops_where_the_model_says_so_and_not_at_what_comes_after(model_and_tokenizer, answer):
    model, tokenizer = model_and_tokenizer
    tokens, _ = by_hand(model, tokenizer, EXAMPLES[0].prompt)
    end = tokens[4]
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[1, end])
    try:
        rows = answer(model)
        assert model.generation_config.eos_token_id == [1, end]
    finally:
        model.generation_config = own
    for example, row in zip(EXAMPLES, rows, strict=True):
        tokens, is_finished = by_hand(model, tokenizer, example.prompt, ends=(end,))
        assert (row["generated_tokens"], row["is_finished"]) == (len(tokens), is_finished)
    assert rows[0]["is_finished"] and rows[0]["generated_tokens"] <= 4


def test_a_checkpoints_own_generation_settings_are_set_aside(model_and_tokenizer, answer):
    model, _ = model_and_tokenizer
    expected, own = answer(model), model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=3, eos_token_id=1
    )
    try:
        assert answer(model) == expected
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


def test_an_unmerged_adapter_generates_too(tiny_spec, tmp_path, tiny_tokenizer, assets_dir):
    model = get_peft_model(tiny_spec.load(assets_dir), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    encoder = Encoder(tiny_tokenizer, 128)
    evaluation = Generation().resolve(task(metrics=("accuracy",)), EXAMPLES)
    questions = evaluation.questions(EXAMPLES, encoder)
    rows = read_jsonl(predict_all(model.eval, evaluation, encoder, questions, tmp_path))
    tokens, _ = by_hand(model, tiny_tokenizer, EXAMPLES[1].prompt)
    assert rows[1]["generated"] == tiny_tokenizer.decode(tokens, skip_special_tokens=True).strip()
    nll, _ = nll_by_hand(model, tiny_tokenizer, EXAMPLES[1].prompt, EXAMPLES[1].answer)
    assert rows[1]["answer_nll"] == pytest.approx(nll, abs=1e-3)


def test_prompts_leave_room_for_an_answer(model_and_tokenizer, answer, caplog):
    model, tokenizer = model_and_tokenizer
    example = Example("long", "x" * 100 + "tail:", " yes", (" yes", " no"), 0, " ", context=(0, 100))
    [row] = answer(model, [example], max_length=20)
    tokens, _ = by_hand(model, tokenizer, "xxxxxtail:")
    assert row["generated"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert "1 of 1 prompts were shortened in their context to fit 20 tokens" in caplog.text


def test_resolve_takes_what_the_task_says():
    plain = Generation().resolve(task(), EXAMPLES)
    assert plain.metrics == ("accuracy",) and plain.bertscore_layer is None
    assert plain.max_new_tokens == MAX_NEW_TOKENS
    open_answers = [Example("a", "Q", " a")]
    packaged = Generation(bertscore_model="packaged:minilm").resolve(task(), open_answers)
    assert packaged.metrics == ("rouge_l", "bertscore_f1")
    assert (packaged.bertscore_model, packaged.bertscore_layer) == ("packaged:minilm", 5)
    for change in ({"bertscore_layer": 4}, {"rouge_stemming": True}, {"accuracy": "raw"}):
        other = dataclasses.replace(packaged, **change)
        assert other.measurement_settings() != packaged.measurement_settings()
        assert other.prediction_settings() == packaged.prediction_settings()  # text is not generated again


def test_an_answer_may_be_longer_than_the_task_says(model_and_tokenizer):
    """It then changes no prompt, and no likelihood of a reference."""
    model, tokenizer = model_and_tokenizer
    encoder = Encoder(tokenizer, 40)
    examples = [Example("long", "x" * 100 + "tail:", " yes" * 9, (), None, " ", context=(0, 100))]
    usual, long = (Generation(max_new_tokens=n).resolve(task(metrics=("accuracy",)), examples) for n in (None, 30))
    assert (usual.max_new_tokens, long.max_new_tokens) == (MAX_NEW_TOKENS, 30)
    assert usual.prediction_settings() != long.prediction_settings()
    own = [evaluation.questions(examples, encoder) for evaluation in (usual, long)]
    assert own[0] == own[1] and len(own[0][0].prompt) == 40 - MAX_NEW_TOKENS
    model.generation_config.eos_token_id, eos = None, model.generation_config.eos_token_id
    try:
        [short_row], [long_row] = (e.predict(model, encoder, own[0]) for e in (usual, long))
    finally:
        model.generation_config.eos_token_id = eos
    assert short_row["answer_nll"] == long_row["answer_nll"] and short_row["answer_tokens"] == MAX_NEW_TOKENS
    assert short_row["generated_tokens"] <= MAX_NEW_TOKENS < long_row["generated_tokens"] <= 30


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"accuracy": "exact"}, r"accuracy must be raw or lenient, got 'exact'.*Change evaluation\.accuracy\."),
        ({"max_new_tokens": 0}, r"max_new_tokens must be 1 or more, got 0\. Raise evaluation\.max_new_tokens"),
    ],
)
def test_values_that_cannot_work_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        Generation(**values)


def test_prepare_fetches_the_encoder_only_where_it_is_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(TextEncoder, "folder", lambda self: asked.append(self.name))
    Generation(bertscore_model="packaged:minilm").resolve(task(), EXAMPLES).prepare()
    assert asked == []
    Generation(bertscore_model="packaged:minilm").resolve(task(), [Example("a", "Q", " a")]).prepare()
    assert asked == ["packaged:minilm"]


def prediction(generated, reference, tokens=2, **more):
    row = {"id": "x", "label": None, "generated": generated, "reference": reference, "generated_tokens": 1}
    return {**row, "is_finished": True, "answer_nll": 3.0, "answer_tokens": tokens, **more}


def test_measure_choices():
    evaluation = Generation().resolve(task(), EXAMPLES)
    rows = [prediction(text, e.reference) for text, e in zip(["Yes.", "b", "", "x", "z"], EXAMPLES, strict=True)]
    rows[1]["is_finished"] = False
    metrics, scored = evaluation.measure(rows, EXAMPLES)
    assert metrics["accuracy"] == 0.2 and metrics["accuracy_mode"] == "generate" and metrics["finished"] == 0.8
    assert metrics["accuracy_stderr"] == pytest.approx((0.2 * 0.8 / 5) ** 0.5)
    assert metrics["answer_nll"] == 1.5 and metrics["num_examples"] == 5
    assert metrics["majority_accuracy"] == 0.4 and "bertscore_encoder" not in metrics
    assert [row["accuracy"] for row in scored] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert metrics["accuracy_match"] == "lenient" and metrics["accuracy_lenient"] == 0.2
    raw, _ = dataclasses.replace(evaluation, accuracy="raw").measure(rows, EXAMPLES)
    assert raw["accuracy"] == raw["accuracy_raw"] == metrics["accuracy_raw"] == 0.0 and raw["accuracy_lenient"] == 0.2


def test_measure_tells_options_apart_that_are_one_once_normalised():
    example = Example("a", "Q", " Rr", (" Rr", " rr"), 0, " ")
    evaluation = Generation().resolve(task(), [example])
    for text, expected in (("Rr", 1.0), ("rr", 0.0)):
        assert evaluation.measure([prediction(text, "Rr")], [example])[0]["accuracy"] == expected


def test_measure_open_answers_names_the_encoder(caplog):
    examples = [Example("a", "Q", " the cat sat"), Example("b", "Q", " a dog")]
    evaluation = Generation(bertscore_model="packaged:minilm").resolve(task(), examples)
    with caplog.at_level(logging.WARNING):
        rows = [prediction("the cat sat", "the cat sat"), prediction("", "a dog")]
        metrics, scored = evaluation.measure(rows, examples)
    assert metrics["similarity"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["bertscore_encoder"] == "packaged:minilm" and metrics["bertscore_layer"] == 5
    assert [row["similarity"] for row in scored] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert {"rouge_l_stderr", "bertscore_f1_stderr", "similarity_stderr"} <= set(metrics)
    assert "accuracy" not in metrics and "1 of 2 answers are empty and score 0" in caplog.text


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match=r"batch_size must be 1 or more, got 0"):
        generate_module.Generation(batch_size=0)
