"""Layer scores from r x r Gram matrices against forming grad_B @ grad_A, on the linear sublayers of Llama-3.1-8B.

    python -m benchmarks.gram_scores --repeats 20

Both forms run in turns in one process. Needs an otherwise idle machine. Exits with 1 if the forms disagree.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradpruner.igia import squared_frobenius
from gradpruner.runtime import environment, set_seed

LORA_RANK = 8
MAX_RELATIVE_ERROR = 1e-5
NUM_WARMUPS = 3
BUSY_PERCENT = 10.0  # of all cores, by other processes
# One decoder layer of Llama-3.1-8B: hidden size 4096, 8 key/value heads of 128, intermediate size 14336.
SUBLAYERS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


@dataclass(frozen=True)
class Comparison:
    """Measurements of both forms on one sublayer.

    Attributes:
        shape: (out, in) of the weight.
        dense_ms: times of the dense form, one per repeat.
        gram_ms: times of the Gram form, one per repeat.
        relative_error: error of the Gram form, see `relative_error`.
    """

    shape: tuple[int, int]
    dense_ms: list[float]
    gram_ms: list[float]
    relative_error: float

    @property
    def dense_bytes(self) -> int:
        """Extra memory of the dense form, by its tensors: the float32 (out, in) product, squared in place."""
        return 4 * self.shape[0] * self.shape[1]

    @property
    def gram_bytes(self) -> int:
        """Extra memory of the Gram form, by its tensors: both factors and three r x r matrices in float64."""
        return 8 * (LORA_RANK * sum(self.shape) + 3 * LORA_RANK**2)


def dense_squared_frobenius(grad_b: Tensor, grad_a: Tensor) -> Tensor:
    """Returns ||grad_b @ grad_a||_F^2 by forming the product, in the fastest accurate way that we found.

    `torch.linalg.vector_norm` takes longer and, over 59 million float32 entries, is 1 % off on this CPU build;
    `torch.dot` is a little faster and 2e-4 off; accumulating in float64 doubles the time and triples the memory.

    Args:
        grad_b: left factor, (out, r).
        grad_a: right factor, (r, in).

    Returns:
        float32 scalar.
    """
    return (grad_b @ grad_a).square_().sum()


def relative_error(grad_b: Tensor, grad_a: Tensor, row_block: int = 1024) -> float:
    """Returns the relative error of the Gram form against the float32 product with squares summed in float64.

    Args:
        grad_b: left factor, (out, r).
        grad_a: right factor, (r, in).
        row_block: rows of the product converted to float64 at once.
    """
    product = grad_b @ grad_a  # (out, in)
    expected = 0.0
    for start in range(0, len(product), row_block):
        expected += product[start : start + row_block].double().square().sum().item()
    return abs(squared_frobenius(grad_b, grad_a).item() - expected) / expected


def compare(num_repeats: int) -> dict[str, Comparison]:
    """Times both forms on every sublayer; each repeat goes through a whole layer."""
    factors = {
        name: (torch.randn(num_rows, LORA_RANK), torch.randn(LORA_RANK, num_columns))
        for name, (num_rows, num_columns) in SUBLAYERS.items()
    }
    comparisons = {name: Comparison(SUBLAYERS[name], [], [], relative_error(*factors[name])) for name in SUBLAYERS}
    for repeat in range(-NUM_WARMUPS, num_repeats):
        # A whole layer at a time: the importance run, too, goes from sublayer to sublayer with cold caches.
        dense_ms = {name: _milliseconds(dense_squared_frobenius, *factors[name]) for name in SUBLAYERS}
        gram_ms = {name: _milliseconds(squared_frobenius, *factors[name]) for name in SUBLAYERS}
        if repeat < 0:
            continue
        for name, one in comparisons.items():
            one.dense_ms.append(dense_ms[name])
            one.gram_ms.append(gram_ms[name])
    return comparisons


def results_table(comparisons: dict[str, Comparison]) -> Table:
    """Returns a table with one row per sublayer and one for the layer, whose times are sums within a repeat."""
    table = Table(title=f"Squared Frobenius norm of grad_B @ grad_A, rank {LORA_RANK}: median [quartiles]")
    for column in ("sublayer", "out x in", "dense ms", "Gram ms", "ratio", "dense MB", "Gram MB", "rel. error"):
        table.add_column(column, justify="left" if column == "sublayer" else "right", no_wrap=True)
    for name, one in comparisons.items():
        memory = (f"{one.dense_bytes / 1e6:.1f}", f"{one.gram_bytes / 1e6:.2f}")
        times = _time_cells(one.dense_ms, one.gram_ms)
        table.add_row(name, f"{one.shape[0]} x {one.shape[1]}", *times, *memory, f"{one.relative_error:.0e}")
    every = list(comparisons.values())
    table.add_section()
    table.add_row(
        "whole layer",
        "",
        *_time_cells(_sum_repeats([one.dense_ms for one in every]), _sum_repeats([one.gram_ms for one in every])),
        f"{max(one.dense_bytes for one in every) / 1e6:.1f}",
        f"{max(one.gram_bytes for one in every) / 1e6:.2f}",
        f"{max(one.relative_error for one in every):.0e}",
        style="bold",
    )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gram_scores", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed passes over a layer (default: %(default)s)")
    num_repeats = parser.parse_args(arguments).repeats
    if num_repeats < 2:
        parser.error(f"--repeats must be 2 or more for quartiles, got {num_repeats}.")
    busy_percent = psutil.cpu_percent(interval=1.0)
    set_seed(0)
    comparisons = compare(num_repeats)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width; do not cut columns for it
    console.print(results_table(comparisons))
    machine = environment()
    console.print(
        f"cpu ({machine['platform']}), {machine['num_threads']} threads, torch {machine['packages']['torch']}, float32 "
        f"factors, {num_repeats} repeats after {NUM_WARMUPS} warm-ups. Memory: highest extra at once, computed from "
        "the sizes of the tensors that either form allocates.",
        highlight=False,
    )
    if busy_percent > BUSY_PERCENT:
        console.print(
            f"[yellow]Busy machine[/]: {busy_percent:.0f} % of the cores were taken before the start. The Gram form "
            "takes well under a millisecond and may mostly be waiting for a free core, so trust neither its times nor "
            "the ratios; OMP_NUM_THREADS=1 helps."
        )
    wrong = {
        name: one.relative_error for name, one in comparisons.items() if not one.relative_error <= MAX_RELATIVE_ERROR
    }
    for name, error in wrong.items():
        console.print(
            f"[red]FAILED[/] {name}: relative error {error:.1e}, at most {MAX_RELATIVE_ERROR:.0e} is allowed."
        )
    return 1 if wrong else 0


def _milliseconds(function: Callable[[Tensor, Tensor], Tensor], grad_b: Tensor, grad_a: Tensor) -> float:
    start = time.perf_counter()
    function(grad_b, grad_a)
    return 1e3 * (time.perf_counter() - start)


def _sum_repeats(times: Sequence[Sequence[float]]) -> list[float]:
    return [sum(repeat) for repeat in zip(*times, strict=True)]


def _time_cells(dense_ms: Sequence[float], gram_ms: Sequence[float]) -> tuple[str, str, str]:
    ratio = statistics.median(dense_ms) / statistics.median(gram_ms)
    return _spread(dense_ms, 1), _spread(gram_ms, 3), f"{ratio:.0f}x"


def _spread(values: Sequence[float], digits: int) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    # The backslash keeps rich from taking the bracket for markup.
    return rf"{median:.{digits}f} \[{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    sys.exit(main())
