"""Special tokens that a tokenizer lacks, taken from the config or each other, and how to save it without them."""

import copy
import logging

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gradpruner.messages import warn_once

logger = logging.getLogger(__name__)

REPLACED = "replaced_tokens"  # attribute of a tokenizer, which no file holds: name of a token -> what it was


def add_special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, eos_token_id: int | list[int] | None, source: str
) -> None:
    """Sets the end-of-text token that the config names and, for padding, that token, if the tokenizer has none.

    Padding is masked, so any token serves. A padding token that the model has no embedding for is replaced.

    Args:
        tokenizer: changed in place.
        config: of the model.
        eos_token_id: as config.json has it; None if it has none, where `config` has that of another tokenizer.
        source: where both come from, for messages.

    Raises:
        ValueError: if there is no end-of-text token, or the model has no embedding for it.
    """
    replaced: dict[str, str | None] = {}
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _eos_token(tokenizer, eos_token_id, source)
        replaced["eos_token"] = None
    if tokenizer.eos_token_id >= config.vocab_size:
        raise ValueError(
            f"The end-of-text token ends every answer, so the model must have an embedding for it, got "
            f"{tokenizer.eos_token!r} with id {tokenizer.eos_token_id} and vocab_size={config.vocab_size} in {source}. "
            "Use the tokenizer that the model was trained with, or resize the embedding (resize_token_embeddings) and "
            "save the model again."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.vocab_size:
        if tokenizer.pad_token_id is not None:
            warn_once(
                logger,
                f"The model in {source} has no embedding for the padding token {tokenizer.pad_token!r} (id "
                f"{tokenizer.pad_token_id}, vocab_size={config.vocab_size}): it was added without "
                f"resize_token_embeddings. {tokenizer.eos_token!r} pads instead; padding is masked, so no result "
                "depends on it.",
            )
        replaced["pad_token"] = tokenizer.pad_token
        tokenizer.pad_token = tokenizer.eos_token
    setattr(tokenizer, REPLACED, replaced)


def without_added_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer as its source had it, without what `add_special_tokens` set, for saving.

    A collator that masks padding in the labels would also mask every end-of-text token, if a saved tokenizer named that
    as its padding token: models trained with it would not learn to stop.
    """
    replaced = getattr(tokenizer, REPLACED, {})
    if not replaced:
        return tokenizer
    original = copy.deepcopy(tokenizer)
    for name, token in replaced.items():
        setattr(original, name, token)
    setattr(original, REPLACED, {})
    return original


def _eos_token(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | list[int] | None, source: str) -> str:
    """Returns the token that the config names as the end of a text."""
    ids = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    known = [token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None]
    if not known:
        raise ValueError(
            f"Every answer ends with an end-of-text token, got a tokenizer without one (eos_token) in {source} and "
            f"eos_token_id={eos_token_id} in its config.json. Set eos_token in tokenizer_config.json."
        )
    warn_once(
        logger,
        f"The tokenizer in {source} has no end-of-text token (eos_token): {known[0]!r} is used, which config.json "
        "names",
    )
    return str(known[0])
