import logging

import pytest
import torch

from gradpruner.encoding import (
    IGNORED,
    Encoder,
    TrainingRow,
    collate,
    encode_training_rows,
    position_ids,
    split_tokens,
    training_batches,
    trim_to_answers,
)
from gradpruner.tasks import DataError, Example

PROMPT, ANSWER = "Question: why?\nAnswer:", " because"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from gradpruner.models.spec import ModelSpec

    config = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return ModelSpec("random:llama", config=config).load_tokenizer(tmp_path_factory.mktemp("assets"))


def example(prompt=PROMPT, answer=ANSWER):
    return Example(id="0", prompt=prompt, answer=answer)


def test_prompt_and_completion_are_the_tokens_of_the_whole_text(tokenizer):
    [(prompt, completion)] = split_tokens(tokenizer, [PROMPT], [ANSWER])
    assert tokenizer.decode(prompt) == PROMPT
    assert tokenizer.decode(completion) == ANSWER
    assert prompt + completion == tokenizer(PROMPT + ANSWER).input_ids


def test_spaces_at_the_end_of_a_prompt_go_to_the_completion(tokenizer):
    [(prompt, completion)] = split_tokens(tokenizer, ["Answer:  "], ["yes"])
    assert tokenizer.decode(prompt) == "Answer:"
    assert tokenizer.decode(completion) == "  yes"


def test_an_empty_prompt_still_predicts_from_a_token(tokenizer):
    [(prompt, completion)] = split_tokens(tokenizer, [""], ["yes"])
    assert prompt == [tokenizer.bos_token_id]
    assert tokenizer.decode(completion) == "yes"


def encode(tokenizer, examples, max_length=512, **settings):
    return encode_training_rows(examples, Encoder(tokenizer, max_length, **settings))


def with_context(context, answer=ANSWER, before="Context: ", after="\nQuestion: why?\nAnswer:"):
    span = (len(before), len(before) + len(context))
    return Example(id="0", prompt=before + context + after, answer=answer, delimiter=" ", context=span)


def test_only_answer_and_end_of_sequence_carry_loss(tokenizer):
    batch = collate(encode(tokenizer, [example()]), tokenizer.pad_token_id)
    with_loss = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert tokenizer.decode(with_loss) == ANSWER + tokenizer.eos_token


@pytest.mark.parametrize("max_length", [42, 50, 60, 80])
def test_long_prompts_lose_the_end_of_their_context_and_nothing_else(tokenizer, caplog, max_length):
    context = "abcdefghijklmnopqrstuvwxyz" * 2
    with caplog.at_level(logging.WARNING):
        [row] = encode(tokenizer, [with_context(context)], max_length)
    text = tokenizer.decode(row.input_ids)  # one token per byte
    rest = "Context: " + "\nQuestion: why?\nAnswer:" + ANSWER
    kept = max_length - len(rest) - 1  # end of sequence
    expected = "Context: " + context[:kept] + "\nQuestion: why?\nAnswer:" + ANSWER + tokenizer.eos_token
    assert text == expected and len(row.input_ids) == max_length
    assert f"1 of 1 prompts were shortened in their context to fit {max_length} tokens" in caplog.text


def test_a_character_of_several_tokens_is_kept_or_lost_whole(tokenizer):
    for max_length in range(60, 70):
        [row] = encode(tokenizer, [with_context("é😀" * 20)], max_length)
        assert max_length - 4 < len(row.input_ids) <= max_length
        assert "\ufffd" not in tokenizer.decode(row.input_ids)


def test_prompts_without_a_context_are_never_shortened(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode(tokenizer, [example(), example(prompt="x" * 50 + PROMPT)], max_length=40)
    assert [tokenizer.decode(row.input_ids) for row in rows] == [PROMPT + ANSWER + tokenizer.eos_token]
    assert "1 of 2 training rows left out: they have more than 40 tokens outside of any context" in caplog.text


def test_answers_that_do_not_fit_are_left_out_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode(tokenizer, [example(), with_context("long " * 9, answer="y" * 40)], max_length=40)
    assert len(rows) == 1
    assert "1 of 2 training rows left out" in caplog.text


def test_no_row_fits(tokenizer):
    with pytest.raises(DataError, match=r"No training row fits into dataset.max_length=4 tokens, got 1 .*Raise"):
        encode(tokenizer, [example()], max_length=4)


def test_room_for_the_longest_completion_or_as_much_as_is_said(tokenizer):
    context = "0123456789" * 3
    asked = with_context(context, before="", after=":")
    encoder = Encoder(tokenizer, 30)
    [own] = encoder.encode([asked], [(" a", " longest")])
    [said] = encoder.encode([asked], [(" a", " longest")], reserve=20)
    assert tokenizer.decode(own.prompt) == context[:21] + ":" and own.is_shortened
    assert tokenizer.decode(said.prompt) == context[:9] + ":"
    assert [tokenizer.decode(ids) for ids in own.completions] == [" a", " longest"]
    assert encoder.encode([asked], [(" a",)], reserve=29) == [None]  # at least one token of context must be kept


def test_options_are_encoded_as_alone(tokenizer):
    examples = [example(), example(prompt="Q:  ")]
    together = Encoder(tokenizer, 512).encode(examples, [(" a", " b"), (" c",)])
    for row, prompt, texts in zip(together, (PROMPT, "Q:  "), ((" a", " b"), (" c",)), strict=True):
        pairs = [split_tokens(tokenizer, [prompt], [text])[0] for text in texts]
        assert (row.prompt, row.completions) == (pairs[0][0], [ids for _, ids in pairs])


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{{ '[assistant]\n' }}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def test_chat_template(chat_tokenizer):
    [row] = encode(chat_tokenizer, [with_context("abc")], chat_template=True)
    text = chat_tokenizer.decode(row.input_ids)
    assert text == "<s>[user] Context: abc\nQuestion: why?\nAnswer:\n[assistant]\nbecause</s>"
    answer = chat_tokenizer.decode(row.input_ids[-row.num_answer_tokens :])
    assert answer == "because</s>"


@pytest.mark.parametrize("before", ["Context: ", "  \n Context: "])
def test_chat_prompts_are_shortened_in_their_context_too(chat_tokenizer, before):
    [row] = encode(chat_tokenizer, [with_context("abcdefghij", before=before)], max_length=68, chat_template=True)
    text = chat_tokenizer.decode(row.input_ids)
    assert text == "<s>[user] Context: abcdefg\nQuestion: why?\nAnswer:\n[assistant]\nbecause</s>"


def test_a_chat_template_must_exist(tokenizer):
    with pytest.raises(ValueError, match=r"model\.chat_template=true needs a tokenizer with a chat template.*=false"):
        Encoder(tokenizer, 512, chat_template=True)


def test_collate_pads_on_the_left():
    batch = collate([TrainingRow((5, 6, 7), 1), TrainingRow((8, 9), 1)], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, IGNORED, 9]]
    assert position_ids(batch["attention_mask"]).tolist() == [[0, 1, 2], [0, 0, 1]]


def test_trimming_keeps_the_token_before_the_first_answer():
    batch = collate([TrainingRow((5, 6, 7, 8), 2), TrainingRow((9, 9, 9, 9), 1)], pad_token_id=0)
    trimmed = trim_to_answers(batch)
    assert trimmed["logits_to_keep"] == 3
    assert trimmed["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 9]]


def test_trimming_when_the_first_token_has_loss():
    batch = collate([TrainingRow((5, 6), 2)], pad_token_id=0)
    assert trim_to_answers(batch)["logits_to_keep"] == 2


def test_batches_go_round_again_and_depend_on_the_seed():
    rows = [TrainingRow((index, 100), 1) for index in range(5)]

    def seen(seed):
        return [batch["input_ids"][:, 0].tolist() for batch in training_batches(rows, 2, 10, 0, seed)]

    assert seen(0) == seen(0) != seen(1)
    assert sorted(index for batch in seen(0) for index in batch) == sorted([*range(5)] * 2)  # two whole rounds


def test_the_last_batch_may_be_short_and_the_rows_do_not_depend_on_the_batch_size():
    rows = [TrainingRow((index, 100), 1) for index in range(9)]

    def seen(batch_size):
        return [batch["input_ids"][:, 0].tolist() for batch in training_batches(rows, batch_size, 7, 0, 0)]

    assert [len(batch) for batch in seen(3)] == [3, 3, 1]
    flat = [[index for batch in seen(batch_size) for index in batch] for batch_size in (1, 3, 7)]
    assert flat[0] == flat[1] == flat[2]


def test_batches_are_tensors_of_the_public_contract():
    [batch] = training_batches([TrainingRow((1, 2), 1)], 1, 1, 0, 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())
