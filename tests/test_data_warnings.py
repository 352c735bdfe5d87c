"""Warnings about leaked test rows, prompts with a second BOS, too few steps, and an accuracy that shows nothing."""

import re

import pytest

from gradpruner.caveats import weak_accuracy
from gradpruner.conversation_rows import encode_rows
from gradpruner.data_warnings import warn_of_leaked_rows, warn_of_second_bos
from gradpruner.encoding import Encoder
from gradpruner.finetune.few_steps import warn_of_few_steps
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.messages import warn_once
from gradpruner.tasks import ChatExample, Example
from gradpruner.tasks.example import Turn


@pytest.mark.bad_input("Own data", "test rows that are also training rows", "a warning with their number and ids")
def test_leaked_rows_are_counted(caplog):
    train = [Example("a", "Why?\n A:", " So"), Example("b", "Why?", " no")]
    test = [Example("t0", "why? A:", " so"), Example("t1", "Why?\n A:", " no"), Example("t2", "Why?", " no")]
    warn_of_leaked_rows(train, test)
    assert "2 of 3 test rows are also training rows (the same prompt and answer): t0, t2. Scores will" in caplog.text
    caplog.clear()
    warn_of_leaked_rows(train, test[1:2])
    assert not caplog.text


@pytest.mark.bad_input("Own data", "a prompt with a BOS of its own", "a warning: begins with a second <s>")
def test_a_second_bos_in_a_prompt(tiny_tokenizer, caplog, monkeypatch):
    examples = [Example("0", "<s>Why?", " So"), Example("1", "Why <s>?", " So")]
    adding = _adding_bos(tiny_tokenizer)
    warn_of_second_bos(examples, encode_rows(examples, Encoder(adding, 64)), Encoder(adding, 64))
    assert "1 of 2 prompts begin with a second <s>: the tokenizer adds one already. Remove it from data" in caplog.text
    caplog.clear()
    warn_of_second_bos(examples, encode_rows(examples, Encoder(tiny_tokenizer, 64)), Encoder(tiny_tokenizer, 64))
    assert not caplog.text  # this tokenizer adds none


@pytest.mark.bad_input("Own data", "a BOS in what is put into a chat template", "a warning: begins with a second <s>")
def test_a_second_bos_in_a_chat_template(tiny_tokenizer, caplog, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    encoder = Encoder(tiny_tokenizer, 64, chat_template=True)
    chats = [
        ChatExample(text, "", "So", turns=(Turn("user", text), Turn("assistant", "So"))) for text in ("<s>a", "b", "c")
    ]
    for examples, count in ((chats, "1 of 3"), ([Example("0", "<s>a", "b")], "1 of 1"), (chats[1:], "")):
        caplog.clear()
        warn_of_second_bos(examples, encode_rows(examples, encoder), encoder)
        assert (f"{count} prompts begin with a second <s>: the chat template adds one" in caplog.text) == bool(count)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs", "said"),
    [
        (90, 64, 3, "6 optimizer steps (90 rows, finetune.batch_size=64, finetune.epochs=3). Below 50 a pruned model "
         "hardly recovers what pruning cost. finetune.batch_size=4 finetune.micro_batch_size=4 makes 69, more rows"),
        (40, 64, 1, "finetune.batch_size=4 finetune.micro_batch_size=4 finetune.epochs=5 makes 50, more"),
        (12, 4, 3, "9 optimizer steps (12 rows, finetune.batch_size=4, finetune.epochs=3). Below 50 a pruned model "
         "hardly recovers what pruning cost. finetune.epochs=17 makes 51"),
        (12, 2, 3, "finetune.epochs=9 makes 54"),
        (90, 4, 3, ""),
        (200, 4, 1, ""),
    ],
)  # fmt: skip
def test_too_few_steps(num_rows, batch_size, epochs, said, caplog):
    warn_once.cache_clear()
    warn_of_few_steps(TrainingSpec(batch_size=batch_size, micro_batch_size="auto", epochs=epochs), num_rows)
    assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize(
    ("accuracy", "dense", "method", "match"),
    [
        (0.40, None, "gradpruner", r"Accuracy 0\.400 ±0\.025 is not above that of always giving the most frequent "
         r"label, 0\.430\. Train for more steps \(finetune\.epochs\), use method=gradpruner_plus or prune less \(spar"),
        (0.45, 0.8, "gradpruner_plus", r"Train for more steps \(finetune\.epochs\) or prune less \(sparsity\)\.$"),
        (0.40, 0.41, "gradpruner", r"Nor is that of the dense model after the same fine-tune: look at the rows"),
        (0.46, None, "gradpruner", None),
    ],
)  # fmt: skip
def test_an_accuracy_that_is_not_above_the_majority(accuracy, dense, method, match):
    def metrics(value):
        return {"accuracy": value, "accuracy_stderr": 0.025, "majority_accuracy": 0.43}

    said = weak_accuracy(metrics(accuracy), None if dense is None else metrics(dense), method)
    assert re.search(match, said) if match else said is None


def test_an_open_answer_has_no_majority():
    assert weak_accuracy({"rouge_l": 0.1, "answer_nll": 9.0}, None, "gradpruner") is None


def _adding_bos(tokenizer):
    """Returns a copy that puts a BOS before every text."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    adding = deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return adding
