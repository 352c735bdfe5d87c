"""Draw some rows of many, by a seed, with every label as frequent as among all."""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence


def stratified_sample(labels: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Positions of `count` rows, in ascending order.

    Every label gets its share of `count`, rounded down; what is left goes to the largest remainders, of equal ones to
    the label that comes first. With one label for all (or None, for open answers) this is plain sampling. A label's
    rows are shuffled once, so that a smaller draw of the same seed is, up to that rounding, part of a larger one.

    Args:
        labels: label of each row.
        count: rows to draw, at most all.
        seed: of the draw; nothing else is random.
    """
    if count >= len(labels):
        return list(range(len(labels)))
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        strata[label].append(index)
    shares = {label: divmod(count * len(rows), len(labels)) for label, rows in strata.items()}  # (whole, remainder)
    left = count - sum(whole for whole, _ in shares.values())
    favoured = set(sorted(shares, key=lambda label: -shares[label][1])[:left])  # stable: ties by first appearance
    shuffler = random.Random(seed)
    chosen: list[int] = []
    for label, rows in strata.items():
        shuffled = shuffler.sample(rows, len(rows))
        chosen.extend(shuffled[: shares[label][0] + (label in favoured)])
    return sorted(chosen)
