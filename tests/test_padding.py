"""Training needs a padding token, but a saved tokenizer has one only if its source has one."""

import json

import pytest
from transformers import AutoTokenizer

from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.models.padding import without_added_padding
from gradpruner.models.spec import ModelSpec
from gradpruner.plan import PruningPlan

TEXT = "A <s> text </s> of 2 words.\n"


@pytest.fixture
def source(tiny_spec, tiny_llama, assets_dir, tmp_path):
    """Returns `source(pad_token)`: a model folder whose tokenizer has that padding token, or None."""

    def make(pad_token):
        tokenizer = AutoTokenizer.from_pretrained(tiny_spec.source(assets_dir))
        tokenizer.pad_token = None
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        tokenizer.chat_template = "{{ messages[0].content }}"
        tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def saved(folder, source_folder, assets_dir):
    """A checkpoint of the model in `source_folder`, made with the tokenizer that training uses."""
    spec = ModelSpec(str(source_folder))
    tokenizer = spec.load_tokenizer(assets_dir)
    assert tokenizer.pad_token_id is not None
    tokenizer(["short", "a longer text"], padding=True)
    save_checkpoint(spec.load(assets_dir), tokenizer, PruningPlan(num_hidden_layers=1, method="none"), folder, "base")
    assert tokenizer.pad_token_id is not None  # the caller may go on with it
    return folder


def token_settings(folder):
    """Every setting of a special token in the files of a tokenizer."""
    found = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            values = json.loads((folder / file).read_text())
            found |= {
                (file, key): value for key, value in values.items() if key.endswith("_token") and value is not None
            }
    return found


@pytest.mark.parametrize("pad_token", [None, "</s>", "<s>", "<pad>"])
def test_a_saved_tokenizer_has_the_padding_of_its_source(source, tmp_path, assets_dir, pad_token):
    before = source(pad_token)
    after = saved(tmp_path / "saved", before, assets_dir)
    reloaded, original = AutoTokenizer.from_pretrained(after), AutoTokenizer.from_pretrained(before)
    assert reloaded.pad_token == original.pad_token == pad_token
    assert reloaded.special_tokens_map == original.special_tokens_map
    assert reloaded.get_vocab() == original.get_vocab()
    assert reloaded.chat_template == original.chat_template
    assert reloaded(TEXT).input_ids == original(TEXT).input_ids
    assert token_settings(after) == token_settings(before)
    assert (after / "tokenizer.json").read_text() == (before / "tokenizer.json").read_text()


def test_with_the_saved_tokenizer_no_end_of_text_is_masked(source, tmp_path, assets_dir):
    """What a collator does that masks padding by its id."""
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "saved", source(None), assets_dir))
    labels = [-100 if token == tokenizer.pad_token_id else token for token in tokenizer("text</s>").input_ids]
    assert labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_with_padding_is_saved_itself(tiny_tokenizer):
    assert without_added_padding(tiny_tokenizer) is tiny_tokenizer


def test_added_padding_stays_with_a_copy(source, assets_dir):
    """It is known by the tokenizer itself, not by who has loaded it."""
    tokenizer = ModelSpec(str(source(None))).load_tokenizer(assets_dir)
    original = without_added_padding(tokenizer)
    assert (tokenizer.pad_token, original.pad_token) == ("</s>", None)
    assert without_added_padding(original).pad_token is None
