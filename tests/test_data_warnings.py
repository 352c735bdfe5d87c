"""Warnings about test rows that are trained on, and about prompts with a second BOS."""

import pytest

from gradpruner.conversation_rows import encode_rows
from gradpruner.data_warnings import warn_of_leaked_rows, warn_of_second_bos
from gradpruner.encoding import Encoder
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


def _adding_bos(tokenizer):
    """Returns a copy that puts a BOS before every text."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    adding = deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return adding
