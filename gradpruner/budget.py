"""How small a compressed model is to be, so that methods that cut in different directions can be compared.

"40 % sparsity" is 40 % of the decoder layers in the paper. What other methods are held to is the number of parameters
that is then left.
"""

from collections.abc import Callable

from transformers import PreTrainedConfig

from gradpruner.checks import check_choice
from gradpruner.models.counting import count_model
from gradpruner.models.shape import ModelShape

MATCHES = ("layers", "total", "native")


def check_match(match: str) -> None:
    """Raises ValueError if `match` is not one of `MATCHES`."""
    check_choice("method.match", match, MATCHES)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError if `sparsity` is not a fraction."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is the fraction to prune, in [0, 1), got {sparsity}. For 40 % write sparsity=0.4.")


def target_parameters(config: PreTrainedConfig, sparsity: float, match: str) -> int:
    """Parameters that are to be left.

    Args:
        config: of the dense model.
        sparsity: fraction in [0, 1).
        match: `layers`: as many as GradPruner leaves, which takes out `round(sparsity * layers)` whole layers; `total`:
            the fraction of all parameters, embeddings among them.
    """
    counts = count_model(config)
    num_layers = len(counts.layers)
    if match == "total":
        return round((1.0 - sparsity) * counts.num_parameters)
    return counts.keep(range(num_layers - round(sparsity * num_layers))).num_parameters


def nearest_size(
    make_shape: Callable[[int], ModelShape],
    config: PreTrainedConfig,
    target: int,
    largest: int,
    step: int = 1,
    smallest: int = 1,
) -> int | None:
    """The size with which a model comes nearest to a number of parameters.

    Args:
        make_shape: the shape for a size; parameters must be linear in it.
        config: of the dense model.
        target: parameters.
        largest: most that the size may be.
        step: the size is a multiple of it, unless it is `largest`.
        smallest: least that the size may be.

    Returns:
        The size, or None if the target is out of reach by more than a step.
    """
    low, high = (count_model(config, make_shape(size)).num_parameters for size in (smallest, largest))
    exact = smallest + (target - low) / (high - low) * (largest - smallest) if high > low else float(largest)
    sizes = {largest, *range(-(-smallest // step) * step, largest + 1, step)}
    nearest = min(sizes, key=lambda size: (abs(size - exact), size))
    return nearest if abs(nearest - exact) <= step else None


def solve_size(
    what: str,
    make_shape: Callable[[int], ModelShape],
    config: PreTrainedConfig,
    target: int,
    largest: int,
    step: int = 1,
) -> int:
    """As `nearest_size`, with `what` as the name of the size in the error.

    Raises:
        ValueError: if the target is out of reach.
    """
    size = nearest_size(make_shape, config, target, largest, step)
    if size is None:
        low, high = (count_model(config, make_shape(each)).num_parameters for each in (1, largest))
        raise ValueError(
            f"No {what} leaves {target:,} parameters: 1 to {largest} leave {low:,} to {high:,}. "
            "Change sparsity, method.match, or what else the method cuts."
        )
    return size
