"""Small tokenizers of the kinds that supported models have, trained on a few lines."""

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

CORPUS = [
    'The café on 3rd Street opened in 1987.\nIt sells tea and "honey" cakes. About 250 people visit it every day.',
    "Question: What do plants need to grow? Answer: light",
] * 3
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ eos_token }}"
LLAMA = ("<unk>", "<s>", "</s>", "<|user|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<|user|>")
QWEN = ("<|endoftext|>", "<|user|>")
VOCABULARY = 800  # all tokenizers have fewer tokens


def byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """Returns a BPE over bytes, as of Llama 3, Qwen and GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(tokenizer, [*specials], alphabet)


def metaspace(specials: tuple[str, ...]) -> Tokenizer:
    """Returns a BPE over characters that falls back to bytes, as of Llama 2, Mistral, Phi-3 and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _train(tokenizer, [*specials, *(f"<0x{byte:02X}>" for byte in range(256))], [])


def _train(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> Tokenizer:
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def _generic(with_bos: bool = False, **settings: object) -> PreTrainedTokenizerBase:
    tokenizer = byte_level(LLAMA)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )


def _of_class(cls: type, tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerBase:
    model = json.loads(tokenizer.to_str())["model"]
    made: PreTrainedTokenizerBase = cls(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **settings
    )
    return made


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "generic": _generic,
    "generic, BOS": lambda: _generic(with_bos=True),
    "generic, padding on the left": lambda: _generic(padding_side="left"),
    "generic, more special tokens": lambda: _generic(additional_special_tokens=["<|user|>"]),
    "Llama": lambda: _of_class(LlamaTokenizer, metaspace(LLAMA), add_bos_token=True),
    "Llama without BOS": lambda: _of_class(LlamaTokenizer, metaspace(LLAMA), add_bos_token=False),
    "Llama with EOS": lambda: _of_class(LlamaTokenizer, metaspace(LLAMA), add_bos_token=True, add_eos_token=True),
    "Llama without leading space": lambda: _of_class(LlamaTokenizer, metaspace(LLAMA), add_prefix_space=False),
    "Gemma": lambda: _of_class(GemmaTokenizer, metaspace(GEMMA), add_bos_token=True),
    "Qwen2": lambda: _of_class(Qwen2Tokenizer, byte_level(QWEN), extra_special_tokens=["<|user|>"]),
    "GPT-2": lambda: _of_class(GPT2Tokenizer, byte_level(QWEN)),
}
