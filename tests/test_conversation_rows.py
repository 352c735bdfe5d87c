"""Conversations as training rows: which tokens carry loss, for chat templates of several kinds."""

import json
import logging
import shutil

import pytest
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.config import CONF, build_pipeline
from experiments.preview import show_example
from gradpruner.conversation_rows import encode_rows
from gradpruner.encoding import IGNORED, Encoder, TrainingRow, collate, trim_to_answers
from gradpruner.evaluate.base import encode_questions
from gradpruner.files import content_hash
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.setup import hash_rows
from gradpruner.tasks import ChatExample, DataError
from gradpruner.tasks.example import Turn

# Shortened from the templates of the models.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_OPENING = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
LOUD = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")

TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Hi."),
    Turn("assistant", "Hello."),
    Turn("user", "Why?"),
    Turn("assistant", "So."),
)


@pytest.fixture
def give(tiny_tokenizer, monkeypatch):
    """Returns a function that gives the byte tokenizer a chat template until the test ends, and returns an encoder."""

    def with_template(template, max_length=512):
        monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
        return Encoder(tiny_tokenizer, max_length, chat_template=True)

    return with_template


def chat(*turns):
    return ChatExample("train-3", "", turns[-1].content, turns=turns)


def with_loss(tokenizer, row):
    """Returns the text of the row, and its stretches with loss, joined by bars."""
    labels = collate([row, TrainingRow((5,) * 300, 1)], 1)["labels"][0].tolist()[-len(row.input_ids) :]
    parts, before = [], False
    for token, label in zip(row.input_ids, labels, strict=True):
        has_loss = label != IGNORED
        assert label in (IGNORED, token)
        if has_loss:
            parts = [*parts[:-1], [*parts[-1], token]] if before else [*parts, [token]]
        before = has_loss
    return tokenizer.decode(row.input_ids), "|".join(tokenizer.decode(part) for part in parts)


@pytest.mark.parametrize(
    ("template", "text", "loss"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello."
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|></s>",
            "Hello.<|im_end|>|So.<|im_end|></s>",
        ),
        (
            LLAMA,
            "<s><|system|>\n\nBe brief.<|eot|><|user|>\n\nHi.<|eot|><|assistant|>\n\nHello.<|eot|><|user|>\n\nWhy?"
            "<|eot|><|assistant|>\n\nSo.<|eot|></s>",
            "Hello.<|eot|>|So.<|eot|></s>",
        ),
        (
            NO_OPENING,
            "<system> Be brief.\n<user> Hi.\n<assistant> Hello.\n<user> Why?\n<assistant> So.</s>",
            " Hello.| So.</s>",
        ),
    ],
)
@pytest.mark.bad_input(
    "Own data", "conversations of several answers", "loss on each answer and its end, and nothing else"
)
def test_every_answer_carries_loss_and_nothing_else(template, text, loss, give):
    encoder = give(template)
    [row] = encode_rows([chat(*TURNS)], encoder)
    assert with_loss(encoder.tokenizer, row) == (text, loss)


def test_an_end_of_sequence_of_the_template_is_not_doubled(give):
    encoder = give(MISTRAL)
    [row] = encode_rows([chat(*TURNS[1:])], encoder)
    text = "<s>[INST] Hi. [/INST] Hello.</s>[INST] Why? [/INST] So.</s>"
    assert with_loss(encoder.tokenizer, row) == (text, " Hello.</s>| So.</s>")


def test_the_loss_is_where_the_template_says(give):
    """Compares with transformers' mask, for a template that marks what the assistant generates."""
    encoder = give(GENERATION)
    [row] = encode_rows([chat(*TURNS)], encoder)
    messages = [{"role": role, "content": content} for role, content in TURNS]
    masked = encoder.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = masked["input_ids"], masked["assistant_masks"]
    labels = collate([row], 1)["labels"][0]
    assert [*row.input_ids] == [*ids[: len(row.input_ids) - 1], encoder.tokenizer.eos_token_id]  # theirs: a line break
    assert (labels != IGNORED).int().tolist()[:-1] == mask[: len(row.input_ids) - 1]


@pytest.mark.bad_input(
    "Own data", "a chat template that renders earlier turns in another way (Qwen3)", "a training row for each answer"
)
def test_a_template_that_rewrites_earlier_turns_gives_several_rows(give, caplog):
    encoder = give(QWEN3)
    with caplog.at_level(logging.INFO):
        rows = encode_rows([chat(*TURNS[1:])], encoder)
    start = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    no_thoughts = "<think>\n\n</think>\n\n"
    question = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert [with_loss(encoder.tokenizer, row) for row in rows] == [
        (start + no_thoughts + "Hello.<|im_end|></s>", "Hello.<|im_end|></s>"),
        (start + "Hello." + question + no_thoughts + "So.<|im_end|></s>", "So.<|im_end|></s>"),
    ]
    assert "1 conversations make 2 training rows" in caplog.text


def test_a_token_across_two_turns_gives_several_rows():
    """A vocabulary joins the end of an answer with the line break after it; no model gives the joined token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(["yes.\nno.\n" * 9], trainers.BpeTrainer(vocab_size=13, special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert ".\n" in fast.get_vocab()
    fast.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    turns = [Turn("user", "no"), Turn("assistant", "yes."), Turn("user", "no"), Turn("assistant", "no.")]
    rows = encode_rows([chat(*turns)], Encoder(fast, 64, chat_template=True))
    assert [fast.decode(row.input_ids) for row in rows] == ["no\nyes.</s>", "no\nyes.\nno\nno.</s>"]
    assert [fast.decode(row.input_ids[-row.num_answer_tokens :]) for row in rows] == ["yes.</s>", "no.</s>"]


@pytest.mark.bad_input("Own data", "a chat template that {what}")
@pytest.mark.parametrize(
    ("what", "template", "match"),
    [
        (
            "refuses a conversation",
            GEMMA,
            r"cannot render the conversation of the row 'train-3', got System role not supp",
        ),
        (
            "opens an answer in another way than it shows one",
            R1,
            r"a turn .* that does not begin with its opening, '.*<th",
        ),
        (
            "changes answers",
            LOUD,
            r"got another text for the answer 'Hello.'. Correct or remove such rows, use another",
        ),
    ],
)
def test_templates_that_cannot_render_a_conversation(what, template, match, give):
    encoder = give(template)
    for encode in (encode_rows, lambda *args: encode_questions(args[0], [["So."]], args[1])):
        with pytest.raises(ValueError, match=match):
            encode([chat(*TURNS[:3])], encoder)


@pytest.mark.bad_input("Own data", "conversations for a model without a chat template")
@pytest.mark.parametrize(
    "match", [r"needs a tokenizer with a chat template, as do rows that are conversations; .*dataset.a"]
)
def test_no_chat_template(match, tiny_tokenizer):
    with pytest.raises(ValueError, match=match):
        Encoder(tiny_tokenizer, 512, chat_template=True)


def test_the_last_answer_is_evaluated(give):
    for template in (CHATML, LLAMA, QWEN3, NO_OPENING):
        encoder = give(template)
        example = chat(*TURNS)
        [question] = encode_questions([example], [[example.answer]], encoder)
        row = encode_rows([example], encoder)[-1]
        ids = [*question.prompt, *question.completions[0]]
        assert list(row.input_ids[: len(ids)]) == ids
        assert encoder.tokenizer.decode(question.completions[0]).strip() == "So."


@pytest.mark.bad_input(
    "Own data", "conversations longer than max_length", "left out of training and counted, unless all are"
)
def test_conversations_that_are_too_long(give, caplog):
    encoder = give(CHATML, 110)
    rows = encode_rows([chat(*TURNS), chat(*TURNS[3:])], encoder)
    assert len(rows) == 1 and "1 of 2 training rows left out: they have more than 110 tokens" in caplog.text
    with pytest.raises(
        DataError, match=r"No training row fits into dataset.max_length=110 tokens, got 1 that are longer"
    ):
        encode_rows([chat(*TURNS)], encoder)


def test_gaps_count_in_keys_and_cost_no_loss():
    plain, gapped = TrainingRow((1, 2, 3, 4, 5, 6), 4), TrainingRow((1, 2, 3, 4, 5, 6), 4, ((3, 5),))
    assert hash_rows([plain]) != hash_rows([gapped])
    assert hash_rows([plain]) == content_hash([[(1, 2, 3, 4, 5, 6), 4]])  # as before there were gaps
    batch = collate([gapped, TrainingRow((7, 8), 1)], 0)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3, IGNORED, IGNORED, 6], [IGNORED] * 5 + [8]]
    assert trim_to_answers(batch)["labels"].tolist() == [
        [IGNORED, 3, IGNORED, IGNORED, 6],
        [IGNORED, IGNORED, IGNORED, IGNORED, 8],
    ]


def test_a_run_on_conversations(tmp_path, tiny_spec, assets_dir, capsys):
    """Trains and evaluates on conversations, with a template in the model's folder."""
    shutil.copytree(tiny_spec.source(assets_dir), tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CHATML)
    messages = [{"role": role, "content": content} for role, content in TURNS]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}, {"messages": messages[1:3]}]))
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                *("debug=smoke", "method=last", f"model.path={tmp_path}/model", "model.config=null", "dataset=jsonl"),
                *(f"dataset.train_file={tmp_path}/a.json", f"dataset.test_file={tmp_path}/a.json"),
                *(
                    f"cache_dir={tmp_path}/cache",
                    "evaluate_before=false",
                    "measure_speed=false",
                    "dataset.max_length=256",
                ),
            ],
        )
    pipeline = build_pipeline(cfg)
    pipeline.check()
    assert [len(row.gaps) for row in pipeline.rows] == [1, 0]
    show_example(pipeline)
    shown = capsys.readouterr().err
    assert "[S][o]" in shown and "[W]" not in shown
    outcome = pipeline.run()
    assert outcome.metrics["num_examples"] == 2 and outcome.metrics["answer_nll"] > 0
    assert ModelSpec(str(tmp_path / "model")).load_tokenizer(tmp_path).chat_template == CHATML
