"""Compress a model that is in memory, on rows that are in memory: `gradpruner.compress`.

The rows become the same token batches as in a run, so that equal rows, model and settings give an equal plan.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpruner.checks import guess
from gradpruner.conversation_rows import encode_rows
from gradpruner.encoding import Batch, Encoder, TrainingRow, training_batches
from gradpruner.gradpruner_plus import GradPrunerPlus
from gradpruner.messages import first_few
from gradpruner.method import Calibration, Compressed, Method
from gradpruner.models.architectures import check_model, decoder_layers
from gradpruner.models.padding import add_special_tokens
from gradpruner.models.shape import config_shape
from gradpruner.tasks import ChatExample, Example
from gradpruner.tasks.columns import RowError, take_text
from gradpruner.tasks.conversations import TURN_COLUMNS, read_turns

PROMPT, ANSWER = "prompt", "answer"
DEFAULT_LENGTH = 512
MAX_LISTED_ROWS = 5


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    sparsity: float | str = 0.4,
    *,
    method: type[Method] = GradPrunerPlus,
    max_length: int | None = None,
    chat_template: bool = False,
    **settings: Any,
) -> Compressed:
    """Prunes the layers of a model that its task does not need, and repairs the cuts.

    The rows are examples of the task, a few hundred are enough. Training on them is up to the caller, with any library:
    the result is a plain transformers model with fewer layers.

    Args:
        model: the dense model; changed in place.
        tokenizer: its tokenizer; unchanged.
        rows: dicts with the texts `prompt` and `answer`; or conversations, `messages` with `role` and `content` as for
            chat templates (ShareGPT's and Alpaca's columns work, too). A space is put between prompt and answer if
            there is no white space yet.
        sparsity: fraction of the decoder layers to prune, or `auto` to prune as many as the answers' likelihood allows.
        method: class of the method: `GradPrunerPlus` (recommended), `GradPruner` (the paper), or a class of `baselines`
            that does all its work before the fine-tune.
        max_length: tokens of prompt and answer together; longer rows are left out. None: 512, or what the model was
            made for if that is less.
        chat_template: put each prompt into the tokenizer's chat template; conversations always are.
        settings: settings of the method, such as `merge_count=3` for `GradPruner`. `num_pruned_layers` replaces
            `sparsity`.

    Returns:
        The pruned model, the plan and the method's report.

    Raises:
        TypeError: if the arguments are not a model, a tokenizer and dicts, or the method has no such setting.
        ValueError: if a row, a setting or the model cannot be used. All but what only the weights show is raised before
            any work.
    """
    _check_types(model, tokenizer, method)
    check_model(model)
    resolved = _build(method, sparsity, settings).resolve(len(decoder_layers(model)))
    _check_method(resolved, model)
    prepared = copy.deepcopy(tokenizer)
    add_special_tokens(prepared, model.config, model.config.eos_token_id, model.name_or_path or "the tokenizer")
    encoded = _encode(rows, prepared, max_length, chat_template, model)

    def draw(calibration: Calibration | None) -> list[Batch]:
        if calibration is None:
            return []
        num_rows = calibration.count(len(encoded))
        return list(
            training_batches(encoded, calibration.batch_size, num_rows, prepared.pad_token_id, calibration.seed)
        )

    resolved.check_rows(len(encoded))
    own, repair, decision = resolved.calibration(), resolved.repair_calibration(), resolved.decision_calibration()
    return resolved.compress(model, draw(own), draw(repair), draw(decision))


def _check_types(model: object, tokenizer: object, method: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"compress() takes a model of transformers, got {type(model).__name__}. Load it with "
            "AutoModelForCausalLM.from_pretrained; of a model with adapters give the result of merge_and_unload()."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"compress() takes the model's tokenizer as its second argument, got {type(tokenizer).__name__}. Load it "
            "with AutoTokenizer.from_pretrained."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"Quantized weights cannot be pruned, got a model quantized with {type(model.hf_quantizer).__name__}. Load "
            "it without quantization_config, prune it, and quantize the result."
        )
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(
            f"method must be a class such as GradPruner, got {method!r}. Give the class as method=... and its settings "
            "as further keyword arguments."
        )


def _build(method: type[Method], sparsity: float | str, settings: Mapping[str, Any]) -> Method:
    """Returns the method with its settings."""
    known = [field.name for field in dataclasses.fields(method)]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{method.__name__} has no such setting, got {name!r}{guess(name, known)}. Known: {', '.join(known)}."
            )
    values = dict(settings)
    if "sparsity" in known:
        values["sparsity"] = None if values.get("num_pruned_layers") is not None else sparsity
    return method(**values)


def _check_method(method: Method, model: PreTrainedModel) -> None:
    """Refuses methods that act while the model is fine-tuned, and those that would do nothing."""
    if type(method).callbacks is not Method.callbacks or type(method).finish is not Method.finish:
        raise ValueError(
            f"compress() returns before the fine-tune, got method={type(method).__name__}, which prunes during it. "
            f"Run it with `python -m experiments.run method={method.name}`."
        )
    if hasattr(method, "sparsity") and method.shape(model.config) == config_shape(model.config):
        raise ValueError(
            f"A method that prunes must have layers to prune, got a sparsity that rounds to none of the "
            f"{len(decoder_layers(model))} decoder layers. Raise sparsity."
        )


def _encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    chat_template: bool,
    model: PreTrainedModel,
) -> list[TrainingRow]:
    """Returns the tokenized rows."""
    limit = getattr(model.config, "max_position_embeddings", None) or max(max_length or 0, DEFAULT_LENGTH)
    max_length = min(DEFAULT_LENGTH, limit) if max_length is None else max_length
    if not 1 <= max_length <= limit:
        raise ValueError(
            f"max_length must be from 1 to the {limit} positions that the model was made for, got {max_length}. Change "
            "max_length."
        )
    examples = _read(rows)
    holds_conversations = isinstance(examples[0], ChatExample)
    if (chat_template or holds_conversations) and not tokenizer.chat_template:
        raise ValueError(
            f"{'Rows with messages need' if holds_conversations else 'chat_template=True needs'} a tokenizer with a "
            f"chat template, got one without. Use the instruct version of the model, or rows with {PROMPT} and "
            f"{ANSWER}{'' if holds_conversations else ' and chat_template=False'}."
        )
    encoded = encode_rows(examples, Encoder(tokenizer, max_length, chat_template or holds_conversations))
    size = model.get_input_embeddings().num_embeddings
    beyond = sorted({token for row in encoded for token in row.input_ids if token >= size})
    if beyond:
        raise ValueError(
            f"The model must have an embedding for every token of the rows, got {size} embeddings and token ids "
            f"{first_few([str(token) for token in beyond])}. Use the tokenizer that the model was trained with, or "
            "resize_token_embeddings."
        )
    return encoded


def _read(rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    """Returns the rows as examples.

    Raises:
        TypeError: if `rows` are not dicts.
        ValueError: naming the rows that cannot be used.
    """
    examples: list[Example] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"rows must be dicts with {PROMPT} and {ANSWER}, or with messages, got {type(row).__name__} as rows"
                f"[{index}]. Give a list of dicts, or a datasets.Dataset."
            )
        try:
            examples.append(_example(row, f"rows[{index}]"))
        except RowError as error:
            problems.append(f"rows[{index}]: {error}")
    if problems:
        more = len(problems) - MAX_LISTED_ROWS
        listed = [*problems[:MAX_LISTED_ROWS], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError(
            f"Every row must have {PROMPT} and {ANSWER}, or messages, got {len(problems)} bad of "
            f"{len(examples) + len(problems)} rows:\n  " + "\n  ".join(listed) + "\nCorrect or remove these rows."
        )
    if not examples:
        raise ValueError(
            f"compress() needs examples of the task, got no rows. Give a few hundred dicts with {PROMPT} and {ANSWER}."
        )
    kinds = {isinstance(example, ChatExample): example.id for example in reversed(examples)}
    if len(kinds) > 1:
        raise ValueError(
            f"All rows must be of one kind, got a conversation in {kinds[True]} and {PROMPT} and {ANSWER} in "
            f"{kinds[False]}. Turn the ones into the others."
        )
    return examples


def _example(row: Mapping[str, Any], name: str) -> Example:
    if PROMPT in row or not any(_conversation_columns(row)):
        prompt, answer = take_text(row, PROMPT), take_text(row, ANSWER)
        delimiter = "" if prompt[-1].isspace() or answer[0].isspace() else " "
        return Example(name, prompt, delimiter + answer, delimiter=delimiter)
    turns = read_turns(row)
    prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in turns[:-1])
    return ChatExample(name, prompt, turns[-1].content, turns=turns)


def _conversation_columns(row: Mapping[str, Any]) -> Iterator[str]:
    """Yields the columns of a row that hold a conversation."""
    yield from (name for name in TURN_COLUMNS if name in row)
    yield from (name for name in ("instruction",) if {"instruction", "output"} <= set(row))
