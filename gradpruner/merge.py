"""Sparsify pruned weights by their IGIA-Matrix and merge them into a kept weight where signs agree.

GradPruner (arXiv:2601.19503), Section 3.2 and Appendix B.2. Tensors in, tensors out: no model in sight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_NUMEL = 2**19  # entries of a weight processed at a time
MERGE_RULES = ("sign_average", "sign_sum", "fisher", "weighted_average", "none")


def top_fraction_mask(igia: Tensor, density: float) -> Tensor:
    """Marks the entries of a pruned weight that matter most to the task (Section 3.2, step 1).

    Args:
        igia: IGIA-Matrix F of the weight (Eq. 3), any shape.
        density: fraction to keep, in [0, 1]; the paper's "80 % sparsity" is density 0.2.

    Returns:
        bool tensor of the shape of `igia` with exactly `int(igia.numel() * density)` entries set; among equal values
        those at the lowest flat index are set.

    Raises:
        ValueError: if `density` is outside [0, 1] or `igia` holds NaN.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be in [0, 1], got {density}. It is the fraction of entries to keep, e.g. 0.2.")
    flat = igia.detach().reshape(-1)
    if torch.isnan(flat).any():
        raise ValueError(
            f"igia must hold numbers, got {int(torch.isnan(flat).sum())} NaN entries. "
            "The gradients behind it diverged: lower the importance learning rate."
        )
    num_kept = int(flat.numel() * density)
    if num_kept == flat.numel():
        return torch.ones(igia.shape, dtype=torch.bool, device=flat.device)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if num_kept == 0:
        return mask.reshape(igia.shape)
    threshold = _kth_largest(flat, num_kept)
    blocks = list(zip(torch.split(flat, BLOCK_NUMEL), torch.split(mask, BLOCK_NUMEL), strict=True))
    num_ties = num_kept - sum(int((block > threshold).sum()) for block, _ in blocks)
    for block, out in blocks:
        ties = block == threshold
        out.copy_((block > threshold) | (ties & (ties.cumsum(0) <= num_ties)))  # ties fill up from the front
        num_ties -= min(num_ties, int(ties.sum()))
    return mask.reshape(igia.shape)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Returns the exact k-th largest of many values.

    Non-negative floats order like their bit patterns, so for an IGIA-Matrix the value is found 16 bits at a time, from
    histograms of the entries that agree with the bits so far. `kthvalue` would make copies of three times the input.
    """
    width = {torch.float32: 32, torch.float64: 64}.get(values.dtype)
    if width is None or any(bool(block.signbit().any()) for block in torch.split(values, BLOCK_NUMEL)):
        return values.kthvalue(values.numel() - k + 1).values
    bits = values.view(torch.int32 if width == 32 else torch.int64)
    found, rank = 0, k  # bits of the threshold so far; its rank among the entries that share them
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64, device=values.device)
        for block in torch.split(bits, BLOCK_NUMEL):
            digits = block >> shift
            counts += torch.bincount(digits[digits >> 16 == found] & 0xFFFF, minlength=2**16)
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < rank).sum())  # the digit of the threshold, counted from the largest
        rank -= int(from_top[place - 1]) if place else 0
        found = (found << 16) | (2**16 - 1 - place)
    return torch.tensor(found, dtype=bits.dtype, device=values.device).view(values.dtype)


def merge_layers(
    kept: Tensor,
    pruned: Sequence[Tensor],
    igias: Sequence[Tensor],
    density: float,
    rule: str = "sign_average",
    kept_igia: Tensor | None = None,
) -> Tensor:
    """Merges the weights of pruned layers into the same sublayer of the kept layer before them.

    An entry of a pruned weight passes if it is among the top `density` of its IGIA-Matrix and has the sign of the
    *original* kept entry; a zero has no sign and never merges. Where nothing passes, the kept entry is unchanged, bit
    by bit. Only `weighted_average` can flip a sign.

    - `sign_average`: mean of the kept entry and all that pass (Eq. 6).
    - `sign_sum`: kept entry plus all that pass (Eq. 5 and the authors' code).
    - `fisher`: mean of the kept entry and all that pass, weighted by their IGIA entries (Appendix B.2); where the
      total weight is zero, the kept entry is unchanged.
    - `weighted_average`: mean of the kept entry and all masked entries, whatever their sign (the ablation of Figure 7).
    - `none`: the kept weight, unchanged.

    Args:
        kept: weight of the kept layer, (d_out, d_in).
        pruned: weight of the same sublayer in each pruned layer, each (d_out, d_in).
        igias: IGIA-Matrix of each of `pruned`, in the same order and shape.
        density: fraction of each pruned weight that may merge, in [0, 1].
        rule: one of `MERGE_RULES`.
        kept_igia: IGIA-Matrix of `kept`, (d_out, d_in); only `fisher` reads it.

    Returns:
        A new tensor with the dtype of `kept`; the inputs are unchanged.

    Raises:
        ValueError: if the rule is unknown, the lists differ in length, shapes differ, or `fisher` gets no `kept_igia`.
    """
    check_rule(rule)
    if len(pruned) != len(igias):
        raise ValueError(f"Every pruned weight needs its igia, got {len(pruned)} weights and {len(igias)} igias.")
    for other in (*pruned, *igias, *([] if kept_igia is None else [kept_igia])):
        if other.shape != kept.shape:
            raise ValueError(
                f"All weights and igias must have the kept weight's shape {tuple(kept.shape)}, got "
                f"{tuple(other.shape)}. Only the same sublayer of another layer can be merged."
            )
    if rule == "none" or not pruned:
        return kept.clone()

    work = torch.promote_types(kept.dtype, torch.float32)
    if rule == "fisher":
        for igia in igias:
            work = torch.promote_types(work, igia.dtype)  # F is float64 where float32 would underflow
    base = kept.to(work)  # (d_out, d_in)
    total, weight, touched = _start(base, rule, kept_igia)
    for layer, igia in zip(pruned, igias, strict=True):
        passes = top_fraction_mask(igia, density)
        if rule != "weighted_average":
            # Signs, not the product W_1 * W_k > 0: a product of two tiny numbers underflows to zero.
            passes &= (torch.sign(layer) == torch.sign(kept)) & (layer != 0)
        share = passes.to(work) if rule != "fisher" else passes * igia.to(work)
        total += share * layer.to(work)
        weight += share
        touched |= share != 0
    merged = total if rule == "sign_sum" else total / weight
    return torch.where(touched, merged.to(kept.dtype), kept)


def check_rule(rule: str) -> None:
    """Raises ValueError if `rule` is not one of `MERGE_RULES`."""
    if rule not in MERGE_RULES:
        raise ValueError(f"merge_rule must be one of {', '.join(MERGE_RULES)}, got {rule!r}.")


def _start(base: Tensor, rule: str, kept_igia: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted sum, total weight and touched flags before any pruned layer is added."""
    untouched = torch.zeros_like(base, dtype=torch.bool)
    if rule != "fisher":
        return base.clone(), torch.ones_like(base), untouched
    if kept_igia is None:
        raise ValueError("merge_rule 'fisher' weighs the kept layer by its own IGIA-Matrix, got none. Pass kept_igia.")
    weight = kept_igia.to(base.dtype)
    return weight * base, weight.clone(), untouched
