"""A checkpoint's tokenizer, or the reason why there is none."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gradpruner.messages import one_line
from gradpruner.models.contents import AssetError, read_json
from gradpruner.models.padding import add_special_tokens

# Any of them holds a vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def read_tokenizer(
    source: str, config: PreTrainedConfig, commit: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer with an end-of-text and a padding token; see `padding.add_special_tokens`.

    Args:
        source: folder or Hub id.
        config: of the model.
        commit: of a Hub model.
        trust_remote_code: see `ModelSpec`.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir():
        _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=trust_remote_code)
    except OSError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise AssetError(
            f"Cannot load the tokenizer of {source}, got {one_line(error)}. Save it again with a recent "
            "transformers, which writes tokenizer.json, and put its files beside the model."
        ) from error
    values, _ = PreTrainedConfig.get_config_dict(source, revision=commit)
    add_special_tokens(tokenizer, config, values.get("eos_token_id"), source)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raises AssetError if a folder has no vocabulary, or one that is damaged."""
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        raise AssetError(
            f"A model needs its tokenizer, got none of {', '.join(VOCABULARY_FILES)} in {folder}. Copy the tokenizer's "
            "files there from the model that it was made from."
        )
    if (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")
