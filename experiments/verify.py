"""Check that a saved checkpoint is whole, and that plain transformers says what the model said when it was saved.

    python -m experiments.verify results/runs/.../checkpoint

The model is loaded in a fresh process in which gradpruner and peft cannot be imported. The process runs this file by
path, isolated from the working directory and environment (`python -I`), so the top level imports only the standard
library. Plain transformers must refuse a checkpoint with `shape.json`, whose layers differ in width; the process then
loads it with `baselines.load`, and the table says so.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Largest difference allowed between a recorded log-probability and the reloaded model's, by dtype. The same machine
# gives 0; other devices and kernels may differ by two or three roundings of a logit around 20.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Packages that the fresh process must not import.
BLOCKED = ("gradpruner", "baselines", "experiments", "peft")
FRESH_FLAG = "--in-fresh-process"
SHAPE_FILE = "shape.json"


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


class CheckpointError(ValueError):
    """Error for a folder without a checkpoint."""


def main() -> None:
    """Prints the table; exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m experiments.verify", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, *.safetensors and plan.json")
    folder = parser.parse_args().checkpoint
    try:
        checks = verify(folder)
    except CheckpointError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    _show(checks, folder)
    raise SystemExit(1 if any(check.ok is False for check in checks) else 0)


def verify(folder: Path) -> list[Check]:
    """Checks the files in this process and the model in a fresh one.

    Raises:
        CheckpointError: if `folder` holds no checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"No folder {folder.absolute()}. Give the checkpoint folder of a run or of save_checkpoint."
        )
    if not (folder / "config.json").is_file():
        nested = folder / "checkpoint" / "config.json"
        hint = f"Did you mean {nested.parent}?" if nested.is_file() else "Give a folder written by save_checkpoint."
        raise CheckpointError(f"No checkpoint in {folder.absolute()}: it has no config.json. {hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{(folder / 'config.json').absolute()} is damaged: {error}. Save it again.") from error
    checks = [_named("weight files", lambda: _weight_files(folder)), *_depth(folder, config)]
    probe, check = _read_probe(folder)
    checks += [check, *_in_fresh_process(folder, probe)]
    if (folder / "adapter").is_dir():
        checks.append(Check("adapter", None, "adapter/ lies beside the weights; not loaded, load it with peft"))
    return checks


# ---- what the files say ----


def _weight_files(folder: Path) -> Check:
    """Checks that all weight files are safetensors and that no shard of the index is missing."""
    name = "weight files"
    pickles = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in PICKLE_SUFFIXES)
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles:
        return Check(name, False, f"pickle files, which can run code when loaded: {', '.join(pickles)}")
    if not weights:
        return Check(name, False, "no *.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - set(weights))
        if missing:
            return Check(name, False, f"shards named in the index but missing: {', '.join(missing)}")
    size = sum((folder / file).stat().st_size for file in weights)
    return Check(name, True, f"{len(weights)} safetensors, {size / 1e6:,.1f} MB")


def _depth(folder: Path, config: dict[str, Any]) -> list[Check]:
    """Checks the depth of the config, and of every list in it with one entry per layer, against the plan."""
    from gradpruner.plan import PruningPlan

    depth = config.get("num_hidden_layers")
    try:
        plan = PruningPlan.load(folder / "plan.json")
    except FileNotFoundError:
        checks = [Check("depth", None, f"num_hidden_layers is {depth}; no plan.json to compare with")]
    except (ValueError, TypeError) as error:
        checks = [Check("depth", False, f"plan.json cannot be read: {error}")]
    else:
        kept = len(plan.kept_layers)
        details = f"num_hidden_layers is {depth}, the plan keeps {kept} of {plan.num_hidden_layers}"
        checks, depth = [Check("depth", depth == kept, details)], kept
    lists = {name: values for name, values in config.items() if "layer" in name and isinstance(values, list) and values}
    if lists:
        lengths = ", ".join(f"{name} has {len(values)} entries" for name, values in lists.items())
        same = all(len(values) == depth for values in lists.values())
        checks.append(Check("per-layer lists", same, lengths if same else f"{lengths}, for {depth} layers"))
    return checks


def _read_probe(folder: Path) -> tuple[dict[str, Any] | None, Check]:
    """Returns the recorded probe, or None if it is missing or cannot be read, and the check of its file."""
    from gradpruner.checkpoints.probe import PROBE_FILE, PROBE_VERSION

    try:
        probe = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        if probe["version"] != PROBE_VERSION:
            return None, Check("probe", False, f"{PROBE_FILE} is of version {probe['version']}, not {PROBE_VERSION}")
        details = f"recorded in {probe['dtype']}, {len(probe['token_ids'])} tokens, {len(probe['positions'])} positions"
        missing = {"decoded", "continuation", "margins"} - set(probe)
    except FileNotFoundError:
        return None, Check("probe", None, f"no {PROBE_FILE}: no logits, tokens and token ids to compare with")
    except (ValueError, KeyError, TypeError) as error:
        return None, Check("probe", False, f"{PROBE_FILE} cannot be read: {_one_line(error)}")
    if missing:
        return None, Check("probe", False, f"{PROBE_FILE} lacks {', '.join(sorted(missing))}")
    return probe, Check("probe", True, details)


def _in_fresh_process(folder: Path, probe: dict[str, Any] | None) -> list[Check]:
    """Runs the second half of this file in a fresh process."""
    from gradpruner.checkpoints.probe import NUM_NEW_TOKENS, TEXT

    request = {"folder": str(folder.absolute()), "probe": probe, "text": TEXT, "num_new_tokens": NUM_NEW_TOKENS}
    done = subprocess.run(
        fresh_command(),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=folder,  # no package of this project can be imported from here
        check=False,
    )
    try:
        return [Check(**check) for check in json.loads(done.stdout)]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Check("fresh process", False, f"ended with code {done.returncode}: {last}")]


def fresh_command() -> list[str]:
    """Returns the command of the fresh process: a JSON request on its stdin, a JSON list of checks on its stdout."""
    return [sys.executable, "-I", "-X", "utf8", str(Path(__file__).resolve()), FRESH_FLAG]


# ---- in the fresh process: torch and transformers, no package of this project ----


def _fresh_main() -> None:
    """Reads the request, prints the checks."""
    request = json.load(sys.stdin)
    if (Path(request["folder"]) / SHAPE_FILE).is_file():
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python -I` does not find baselines by itself
    else:
        for module in BLOCKED:
            sys.modules[module] = None  # type: ignore[assignment]  # makes every import of it fail
    with contextlib.redirect_stdout(sys.stderr):
        checks = [asdict(check) for check in _fresh_checks(**request)]
    print(json.dumps(checks))


def _fresh_checks(folder: str, probe: dict[str, Any] | None, text: str, num_new_tokens: int) -> Iterator[Check]:
    """Loads the model and compares its answers; after a step that fails, the checks that are still possible go on."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    is_stock = not (Path(folder) / SHAPE_FILE).is_file()
    if is_stock:
        without = not any(sys.modules.get(module) for module in BLOCKED)
        yield Check("plain transformers", without, f"{versions}, without gradpruner and peft")
    else:
        yield _named("own loader", lambda: _refused_by_transformers(folder, versions))
    yield _named("finite", lambda: _finite(Path(folder)))
    token_ids: list[int] = []
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        token_ids = list(tokenizer(text)["input_ids"])
        yield from _tokenizer_checks(tokenizer, token_ids, text, probe)
    except Exception as error:
        yield Check("tokenizer", False, _one_line(error))
    try:
        if is_stock:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        else:
            import baselines

            model, loading = baselines.load(folder), {}  # raises if a tensor is missing or unexpected
    except Exception as error:
        yield Check("load", False, _one_line(error))
        return
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    yield _loaded(model, loading)
    if probe:
        token_ids = probe["token_ids"]  # the recorded tokens, even if the tokenizer has changed
    if token_ids:
        with torch.no_grad():
            yield from _model_checks(model, token_ids, probe, num_new_tokens)


def _refused_by_transformers(folder: str, versions: str) -> Check:
    """Checks that plain transformers refuses a model whose layers differ in width."""
    import transformers

    details = f"{versions}; layers differ in width, loaded with baselines.load"
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


def _model_checks(
    model: Any, token_ids: list[int], probe: dict[str, Any] | None, num_new_tokens: int
) -> Iterator[Check]:
    """Checks logits against the probe, and cached generation against the probe and against the model without cache."""
    import torch

    prompt = torch.tensor([token_ids], device=model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    tolerance = TOLERANCES.get(dtype, TOLERANCES["bfloat16"])
    if probe:
        tolerance = max(tolerance, TOLERANCES.get(probe["dtype"], 0.0))
        yield _named(
            "logits", lambda: _logits(model, prompt, probe["positions"], f"{tolerance:g} ({dtype})", tolerance)
        )
    try:
        generated = _generate(model, prompt, num_new_tokens)
    except Exception as error:
        yield Check("generate", False, _one_line(error))
        return
    new_tokens = generated[0, prompt.shape[1] :].tolist()
    if probe:
        same, details = _same_tokens(new_tokens, probe["continuation"], probe["margins"], tolerance)
        yield Check("generate", same, f"{details} as recorded")
    else:
        yield Check("generate", True, f"{len(new_tokens)} tokens")

    # One pass over the whole text gives the token that greedy decoding without cache takes at every step.
    logits = model(input_ids=generated, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    best = logits.log_softmax(-1).topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    same, details = _same_tokens(new_tokens, logits.argmax(-1).tolist(), margins, tolerance)
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


def _same_tokens(
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


def _named(name: str, check: Callable[[], Check]) -> Check:
    """Makes the check; an exception becomes a failed check."""
    try:
        return check()
    except Exception as error:
        return Check(name, False, _one_line(error))


def _one_line(error: Exception) -> str:
    """Returns the error's type and the first 300 characters of its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}"


# ---- the table ----


def _show(checks: list[Check], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(folder)))
    table.add_column("check", no_wrap=True)
    table.add_column("ok", no_wrap=True)
    table.add_column("details", overflow="fold")
    marks = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "-"}
    for check in checks:
        table.add_row(check.name, marks[check.ok], escape(check.details))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    failed = [check.name for check in checks if check.ok is False]
    console.print(f"[bold red]Failed:[/] {', '.join(failed)}" if failed else "[green]The checkpoint is good.[/]")


if __name__ == "__main__":
    if FRESH_FLAG in sys.argv:
        _fresh_main()
    else:
        main()
