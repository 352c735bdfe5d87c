"""Target size of a compressed model, so that methods that prune different kinds of units can be compared.

"40 % sparsity" means 40 % of the decoder layers in the paper. Other methods must match the number of parameters that
the model then has. The input embedding does not count, as in the paper's Table 11: it does no arithmetic and GradPruner
keeps all of it, so a method that narrows it would get more weights in the layers for the same total.
"""

from collections.abc import Callable

from transformers import PreTrainedConfig

from gradpruner.checks import check_choice
from gradpruner.models.counting import ModelCounts, count_model
from gradpruner.models.shape import ModelShape

MATCHES = ("layers", "total", "native")


def check_match(match: str) -> None:
    """Raises ValueError if `match` is not one of `MATCHES`."""
    check_choice("method.match", match, MATCHES)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError if `sparsity` is not a fraction."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is the fraction to prune, in [0, 1), got {sparsity}. For 40 % write sparsity=0.4.")


def counted_parameters(counts: ModelCounts, match: str) -> int:
    """Returns the parameters that a budget counts: with `total` all, otherwise all but the input embedding."""
    return counts.num_parameters if match == "total" else counts.num_parameters_without_embedding


def target_parameters(config: PreTrainedConfig, sparsity: float, match: str) -> int:
    """Returns the number of parameters to keep, in the counting of `counted_parameters`.

    Args:
        config: config of the dense model.
        sparsity: fraction to prune, in [0, 1).
        match: `layers`: as many as GradPruner keeps, which prunes `round(sparsity * layers)` whole layers; `total`: the
            fraction `1 - sparsity` of all parameters, including embeddings.
    """
    counts = count_model(config)
    num_layers = len(counts.layers)
    if match != "total":
        counts = counts.keep(range(num_layers - round(sparsity * num_layers)))
        return counted_parameters(counts, match)
    return round((1.0 - sparsity) * counted_parameters(counts, match))


def nearest_size(
    make_shape: Callable[[int], ModelShape],
    config: PreTrainedConfig,
    target: int,
    match: str,
    largest: int,
    step: int = 1,
    smallest: int = 1,
) -> int | None:
    """Returns the size for which the model's number of parameters is nearest to a target.

    Args:
        make_shape: returns the shape for a size; the number of parameters must be linear in the size.
        config: config of the dense model.
        target: number of parameters.
        match: which parameters count, see `counted_parameters`.
        largest: largest size allowed.
        step: sizes other than `largest` must be multiples of `step`.
        smallest: smallest size allowed.

    Returns:
        The size, or None if the target is out of reach by more than a step.
    """
    low, high = (counted_parameters(count_model(config, make_shape(size)), match) for size in (smallest, largest))
    exact = smallest + (target - low) / (high - low) * (largest - smallest) if high > low else float(largest)
    sizes = {largest, *range(-(-smallest // step) * step, largest + 1, step)}
    nearest = min(sizes, key=lambda size: (abs(size - exact), size))
    return nearest if abs(nearest - exact) <= step else None


def solve_size(
    what: str,
    make_shape: Callable[[int], ModelShape],
    config: PreTrainedConfig,
    target: int,
    match: str,
    largest: int,
    step: int = 1,
) -> int:
    """Returns `nearest_size` or raises an error that names the size `what`.

    Raises:
        ValueError: if the target is out of reach.
    """
    size = nearest_size(make_shape, config, target, match, largest, step)
    if size is None:
        low, high = (counted_parameters(count_model(config, make_shape(each)), match) for each in (1, largest))
        raise ValueError(
            f"No {what} leaves {target:,} parameters: 1 to {largest} leave {low:,} to {high:,}. "
            "Change sparsity, method.match, or what else the method cuts."
        )
    return size
