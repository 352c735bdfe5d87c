"""Draw some of many rows by a seed, keeping the label frequencies."""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence


def stratified_sample(labels: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Returns the positions of `count` rows, in ascending order.

    Every label gets its share of `count`, rounded down; the remaining rows go to the labels with the largest
    remainders, among equals to the label that comes first. With one label for all rows (or None, for open answers) this
    is plain sampling. Each label's rows are shuffled once, so that a smaller draw with the same seed is, up to the
    rounding, a subset of a larger one.

    Args:
        labels: label of each row.
        count: number of rows to draw, at most all.
        seed: seed of the draw; nothing else is random.
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
        size = shares[label][0]
        if label in favoured:
            size += 1
        chosen.extend(shuffled[:size])
    return sorted(chosen)
