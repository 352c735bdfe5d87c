"""Padding token for tokenizers that have none, and how to save such a tokenizer without it."""

import copy

from transformers import PreTrainedTokenizerBase

STAND_IN = "padding_is_stand_in"  # attribute of a tokenizer, which no file holds


def add_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the end-of-text token as padding token if the tokenizer has none; padding is masked, so any token serves."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        setattr(tokenizer, STAND_IN, True)


def without_added_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer as its source had it, for saving.

    A collator that masks padding in the labels would also mask every end-of-text token, if a saved tokenizer named that
    as its padding token: models trained with it would not learn to stop.
    """
    if not getattr(tokenizer, STAND_IN, False):
        return tokenizer
    original = copy.deepcopy(tokenizer)
    original.pad_token = None
    return original
