"""Checks of a saved model that need torch, for `experiments.verify`: run by path in a fresh process.

The process is isolated from the working directory and environment (`python -I`), and gradpruner and peft cannot be
imported there, so that the model is what plain transformers makes of the files; the top level imports only the standard
library. Two kinds of checkpoint need more. Where layers differ in width (`shape.json`), plain transformers must refuse
the weights, and `gradpruner.load_checkpoint` loads them. An adapter is loaded last, by peft.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Largest difference allowed between a recorded log-probability and the reloaded model's, by dtype. The same machine
# gives 0; other devices and kernels may differ by two or three roundings of a logit around 20.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
BLOCKED = ("gradpruner", "baselines", "experiments", "peft")  # what cannot be imported
SHAPE_FILE = "shape.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was checked.
        ok: whether the check passed; None if it could not be made or had nothing to compare with.
        details: what was found.
    """

    name: str
    ok: bool | None
    details: str


def named(name: str, check: Callable[[], Check]) -> Check:
    """Makes the check; an exception becomes a failed check."""
    try:
        return check()
    except Exception as error:
        return Check(name, False, one_line(error))


def one_line(error: Exception) -> str:
    """Returns the error's type and the first 300 characters of its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}"


def main() -> None:
    """Reads a JSON request on stdin, prints a JSON list of checks."""
    request = json.load(sys.stdin)
    if (Path(request["folder"]) / SHAPE_FILE).is_file():
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python -I` does not find gradpruner by itself
    else:
        for module in BLOCKED:
            sys.modules[module] = None  # type: ignore[assignment]  # makes every import of it fail
    with contextlib.redirect_stdout(sys.stderr):
        checks = [asdict(check) for check in checks_of_model(**request)]
    print(json.dumps(checks))


def checks_of_model(
    folder: str,
    probe: dict[str, Any] | None,
    text: str,
    num_new_tokens: int,
    adapter_probe: dict[str, Any] | None = None,
) -> Iterator[Check]:
    """Loads the model and compares its answers; after a step that fails, the checks that are still possible go on.

    Args:
        folder: the checkpoint.
        probe: what was recorded of the model; None if there is no record.
        text: text for the tokenizer, if there is no record.
        num_new_tokens: tokens to generate.
        adapter_probe: what was recorded of the model with its adapter.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    is_stock = not (Path(folder) / SHAPE_FILE).is_file()
    if is_stock:
        without = not any(sys.modules.get(module) for module in BLOCKED)
        yield Check("plain transformers", without, f"{versions}, without gradpruner and peft")
    else:
        yield named("own loader", lambda: _refused_by_transformers(folder, versions))
    yield named("finite", lambda: _finite(Path(folder)))
    token_ids: list[int] = []
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        token_ids = list(tokenizer(text)["input_ids"])
        yield from _tokenizer_checks(tokenizer, token_ids, text, probe)
    except Exception as error:
        yield Check("tokenizer", False, one_line(error))
    try:
        if is_stock:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        else:
            import gradpruner

            model, loading = gradpruner.load_checkpoint(folder), {}  # raises if a tensor is missing or unexpected
    except Exception as error:
        yield Check("load", False, one_line(error))
        return
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    yield _loaded(model, loading)
    if probe:
        token_ids = probe["token_ids"]  # the recorded tokens, even if the tokenizer has changed
    if token_ids:
        with torch.no_grad():
            yield from answers(model, token_ids, probe, num_new_tokens)
            if (Path(folder) / ADAPTER_FOLDER).is_dir():
                token_ids = adapter_probe["token_ids"] if adapter_probe else token_ids
                yield from _adapter_checks(model, Path(folder), token_ids, adapter_probe, num_new_tokens)


def _adapter_checks(
    model: Any, folder: Path, token_ids: list[int], probe: dict[str, Any] | None, num_new_tokens: int
) -> Iterator[Check]:
    """Puts the adapter on the model, in place, and checks that all of it found its layers and what the two answer."""
    if sys.modules.get("peft", folder) is None:
        del sys.modules["peft"]  # was blocked
    try:
        import peft
        from safetensors import safe_open

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are checked below
            tuned = peft.PeftModel.from_pretrained(model, folder / ADAPTER_FOLDER).eval()
        with safe_open(folder / ADAPTER_FOLDER / "adapter_model.safetensors", framework="pt") as tensors:
            stored = set(tensors.keys())
        wanted = set(peft.get_peft_model_state_dict(tuned))
    except Exception as error:
        yield Check("adapter", False, one_line(error))
        return
    problems = [
        f"{len(names)} {kind}, {min(names)} first"
        for kind, names in (("missing", wanted - stored), ("unexpected", stored - wanted))
        if names
    ]
    details = f"{type(tuned).__name__}, peft {peft.__version__}, all {len(stored)} tensors in place"
    yield Check("adapter", not problems, "; ".join(problems) or details)
    for check in answers(tuned, token_ids, probe, num_new_tokens):
        yield replace(check, name=f"adapter {check.name}")


def _refused_by_transformers(folder: str, versions: str) -> Check:
    """Checks that plain transformers refuses a model whose layers differ in width."""
    import transformers

    details = f"{versions}; layers differ in width, loaded with gradpruner.load_checkpoint"
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except (RuntimeError, ValueError):
        return Check("own loader", True, f"{details}; plain transformers refuses the weights")
    return Check("own loader", False, f"{versions}; plain transformers loads it although {SHAPE_FILE} says otherwise")


def _finite(folder: Path) -> Check:
    """Checks that every tensor is finite, loading one at a time."""
    from safetensors import safe_open

    bad, num_tensors = [], 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                num_tensors += 1
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    count = tensor.numel() - int(tensor.isfinite().sum())
                    bad.append(f"{count} NaN or infinite of {tensor.numel()} in {name}")
    return Check("finite", not bad if num_tensors else None, "; ".join(bad[:3]) or f"{num_tensors} tensors")


def _loaded(model: Any, loading: dict[str, Any]) -> Check:
    """Checks that every weight came from the files and that every tensor of the files is in the model."""
    problems = [
        f"{len(names)} {kind.removesuffix('_keys')}, {sorted(map(str, names))[0]} first"
        for kind, names in loading.items()
        if kind.endswith("_keys") and names
    ]
    dtype = str(model.dtype).removeprefix("torch.")
    return Check("load", not problems, "; ".join(problems) or f"{type(model).__name__}, {dtype}, all weights in place")


def _tokenizer_checks(tokenizer: Any, token_ids: list[int], text: str, probe: dict[str, Any] | None) -> Iterator[Check]:
    """Checks that the text becomes the recorded tokens, and that these decode to the text."""
    if probe:
        same = token_ids == probe["token_ids"]
        details = f"{len(token_ids)} as recorded"
        if not same:
            index = _first_difference(token_ids, probe["token_ids"])
            details = f"{len(token_ids)} tokens, {len(probe['token_ids'])} recorded, different from number {index} on"
        yield Check("token ids", same, details)
    decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
    expected = probe["decoded"] if probe else text
    yield Check("round trip", decoded == expected, "text again" if decoded == expected else f"became {decoded!r}")


def answers(model: Any, token_ids: list[int], probe: dict[str, Any] | None, num_new_tokens: int) -> Iterator[Check]:
    """Checks logits against the probe, and cached generation against the probe and against the model without cache."""
    import torch

    prompt = torch.tensor([token_ids], device=model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = TOLERANCES.get(dtype, TOLERANCES["bfloat16"])
    if probe:
        tolerance = max(tolerance, TOLERANCES.get(probe["dtype"], 0.0))
        yield named("logits", lambda: _logits(model, prompt, probe["positions"], f"{tolerance:g} ({dtype})", tolerance))
    try:
        generated = _generate(model, prompt, num_new_tokens)
    except Exception as error:
        yield Check("generate", False, one_line(error))
        return
    new_tokens = generated[0, prompt.shape[1] :].tolist()
    if probe:
        same, details = same_tokens(new_tokens, probe["continuation"], probe["margins"], tolerance)
        yield Check("generate", same, f"{details} as recorded")
    else:
        yield Check("generate", True, f"{len(new_tokens)} tokens")

    # One pass over the whole text gives the token that greedy decoding without cache takes at every step.
    logits = model(input_ids=generated, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    best = logits.log_softmax(-1).topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    same, details = same_tokens(new_tokens, logits.argmax(-1).tolist(), margins, tolerance)
    yield Check("cache", same, f"{details} as without key-value cache")


def _logits(model: Any, prompt: Any, positions: list[dict[str, Any]], stated: str, tolerance: float) -> Check:
    """Checks that the recorded log-probabilities are the reloaded model's, within the tolerance."""
    log_probabilities = model(input_ids=prompt, use_cache=False).logits[0].float().log_softmax(-1).tolist()
    differences = {
        f"position {entry['position']}, token {token}": abs(log_probabilities[entry["position"]][token] - recorded)
        for entry in positions
        for token, recorded in entry["top"]
    }
    where, worst = max(differences.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    details = f"largest difference {worst:.2g} of {len(differences)} log-probabilities, tolerance {stated}"
    return Check("logits", worst <= tolerance, details if worst <= tolerance else f"{details}, at {where}")


def _generate(model: Any, prompt: Any, num_new_tokens: int) -> Any:
    """Generates greedily with the key-value cache, past any end-of-text token; returns (1, T + num_new_tokens)."""
    from transformers import GenerationConfig

    # Replaced, because `generate()` would add the checkpoint's own settings (sampling, penalties) to those passed.
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=num_new_tokens)
    return model.generate(prompt, attention_mask=prompt.new_ones(prompt.shape))


def same_tokens(
    tokens: list[int], expected: list[int], margins: list[float], tolerance: float
) -> tuple[bool | None, str]:
    """Compares tokens up to the first tie, a token within `tolerance` of its runner-up; later tokens may differ.

    Returns:
        Whether the tokens agree, or None if the first token is a tie, so that there is nothing to compare; and the
        details.
    """
    index = _first_difference(tokens, expected)
    if index is None:
        return True, f"{len(tokens)} tokens"
    if index < len(margins) and margins[index] <= tolerance:
        details = f"{index} tokens, then a tie (margin {margins[index]:.2g}, tolerance {tolerance:g}), the rest not"
        return (None if index == 0 else True), details
    return False, f"{index} tokens, but then {tokens[index : index + 1]} instead of {expected[index : index + 1]}, not"


def _first_difference(left: list[int], right: list[int]) -> int | None:
    """Returns the index of the first entry that differs or that only one list has; None if the lists are equal."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


if __name__ == "__main__":
    main()
