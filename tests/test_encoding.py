import logging

import pytest
import torch

from gradpruner.encoding import (
    IGNORED,
    TrainingRow,
    collate,
    encode_training_rows,
    position_ids,
    split_tokens,
    training_batches,
)
from gradpruner.tasks import DataError, Example
from gradpruner.trainer import trim_to_answers

PROMPT, ANSWER = "Question: why?\nAnswer:", " because"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from gradpruner.models import ModelSpec

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


def test_only_answer_and_end_of_sequence_carry_loss(tokenizer):
    rows = encode_training_rows([example()], tokenizer, max_length=512)
    batch = collate(rows, tokenizer.pad_token_id)
    with_loss = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert tokenizer.decode(with_loss) == ANSWER + tokenizer.eos_token


def test_long_prompts_lose_their_front_and_never_the_answer(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        [row] = encode_training_rows([example(prompt="x" * 50 + PROMPT)], tokenizer, max_length=20)
    assert len(row.input_ids) == 20
    assert tokenizer.decode(row.input_ids).endswith(ANSWER + tokenizer.eos_token)
    assert "1 of 1 prompts were cut at the front to fit 20 tokens" in caplog.text


def test_answers_that_do_not_fit_are_left_out_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_training_rows([example(), example(answer="y" * 40)], tokenizer, max_length=40)
    assert len(rows) == 1
    assert "1 rows left out: answer over 40 tokens" in caplog.text


def test_no_row_fits(tokenizer):
    with pytest.raises(DataError, match=r"No training row fits into dataset.max_length=4 tokens: all 1 answers.*Raise"):
        encode_training_rows([example()], tokenizer, max_length=4)


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
        return [batch["input_ids"][:, 0].tolist() for batch in training_batches(rows, 2, 5, 0, seed)]

    assert seen(0) == seen(0) != seen(1)
    assert sorted(index for batch in seen(0) for index in batch) == sorted([*range(5)] * 2)  # two whole rounds


def test_batches_are_tensors_of_the_public_contract():
    [batch] = training_batches([TrainingRow((1, 2), 1)], 1, 1, 0, 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())
