"""Checks of evaluation: log-likelihoods and greedy answers with every attention that is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu.common import NOT_CHECKED, Finding, Scale, judged
from gradpruner.encoding import Encoder
from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.likelihood import Likelihood
from gradpruner.models.spec import ModelSpec
from gradpruner.runtime import default_device
from gradpruner.tasks import Example

MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.02}  # of a log-likelihood, to sdpa in float32
CHOICES = (" one", " twenty-two", " a hundred and eleven")


def check_evaluation(scale: Scale, folder: Path) -> Iterator[Finding]:
    """Compares the answers of eager, sdpa and flash attention, in float32 and bfloat16, with sdpa's in float32."""
    expected, answers = _answers(scale, "float32", "sdpa", folder)
    cases = [("float32", "eager"), ("bfloat16", "sdpa"), ("bfloat16", "flash_attention_2")]
    for dtype, attention in cases:
        if attention == "flash_attention_2" and not (default_device().type == "cuda" and is_flash_attn_2_available()):
            yield Finding(NOT_CHECKED, "flash attention: flash_attn is not installed, or there is no CUDA device")
            continue
        scores, own_answers = _answers(scale, dtype, attention, folder)
        difference = float(((scores - expected) / expected).abs().max())
        same = sum(own == other for own, other in zip(own_answers, answers, strict=True))
        # In bfloat16 a close call between two tokens may go the other way.
        enough = len(answers) if dtype == "float32" else 0
        yield judged(
            difference <= MAX_DIFFERENCE[dtype] and same >= enough,
            f"{attention} in {dtype}: log-likelihoods are up to {difference:.1e} from sdpa's in float32 (at most "
            f"{MAX_DIFFERENCE[dtype]:.0e}), {same} of {len(answers)} generated answers are the same",
        )


@torch.inference_mode()
def _answers(scale: Scale, dtype: str, attention: str, folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Returns all log-likelihoods, and the generated answers."""
    spec = ModelSpec("random:llama", dtype=dtype, attn_implementation=attention, config=dict(scale.evaluated))
    model, encoder = spec.load(folder), Encoder(spec.load_tokenizer(folder), max_length=128)
    examples = [
        Example(str(n), f"Count {'to ' * n}{n}:", CHOICES[n % 3], choices=CHOICES, label=n % 3, delimiter=" ")
        for n in range(8)
    ]
    likelihood, generation = Likelihood(), Generation(max_new_tokens=8, answer_room=8, metrics=("accuracy",))
    scored = likelihood.predict(model, encoder, likelihood.questions(examples, encoder))
    written: list[dict[str, Any]] = generation.predict(model, encoder, generation.questions(examples, encoder))
    scores = [score for row in scored for score in row["log_likelihoods"]] + [-row["answer_nll"] for row in written]
    return torch.tensor(scores, dtype=torch.float64), [row["generated"] for row in written]
