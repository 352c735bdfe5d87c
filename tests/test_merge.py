import oracles
import pytest
import torch

from gradpruner import merge
from gradpruner.merge import MERGE_RULES, check_rule, merge_layers, top_fraction_mask

# Design document baselines.md, section 1, worked by hand from the paper's equations.
W1 = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
W2 = torch.tensor([[2.0, 5.0], [1.0, 4.0]])
W3 = torch.tensor([[-1.0, -1.0], [2.0, 2.0]])
F2 = torch.tensor([[0.9, 0.8], [0.1, 0.2]])
F3 = torch.tensor([[0.5, 0.6], [0.9, 0.1]])

MIXING_RULES = [rule for rule in MERGE_RULES if rule != "none"]
SIGN_RULES = [rule for rule in MIXING_RULES if rule != "weighted_average"]


def random_case(seed, num_pruned=3, shape=(7, 5), dtype=torch.float32):
    """Returns weights with zeros and IGIA-Matrices with ties, so that every seed tests both."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for _ in range(num_pruned + 1)]
    for weight in weights:
        weight[torch.rand(shape, generator=generator) < 0.15] = 0.0
    igias = [torch.randint(0, 6, shape, generator=generator).float() / 4 for _ in range(num_pruned + 1)]
    kept, *pruned = [weight.to(dtype) for weight in weights]
    return kept, pruned, igias[1:], igias[0]


# Masks


def test_mask_oracle():
    assert top_fraction_mask(F2, 0.5).tolist() == [[True, True], [False, False]]
    assert top_fraction_mask(F3, 0.5).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 1 / 3, 0.5, 0.99, 1.0])
def test_mask_agrees_with_loops(seed, density):
    igia = torch.randint(0, 8, (6, 11), generator=torch.Generator().manual_seed(seed)).float()
    mask = top_fraction_mask(igia, density)
    assert mask.dtype == torch.bool
    assert mask.tolist() == oracles.mask(igia, density)
    assert int(mask.sum()) == int(igia.numel() * density)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 4), (2, 3, 2)])
def test_of_equal_entries_the_first_are_kept(shape):
    mask = top_fraction_mask(torch.full(shape, 0.25), 0.5)
    assert mask.shape == shape
    assert mask.reshape(-1).tolist() == [True] * 6 + [False] * 6


def test_all_zero_igia_keeps_the_right_number():
    assert top_fraction_mask(torch.zeros(4, 5), 0.2).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_density_zero_and_one():
    assert not top_fraction_mask(F2, 0.0).any()
    assert top_fraction_mask(F2, 1.0).all()


def test_fewer_than_one_entry_is_none():
    assert not top_fraction_mask(torch.ones(2, 2), 0.24).any()


def test_empty_matrix():
    assert top_fraction_mask(torch.ones(0, 4), 0.5).shape == (0, 4)


@pytest.mark.parametrize(("shape", "num_kept"), [((4096, 14336), 11_744_051), ((1024, 4096), 838_860)])
def test_number_kept_for_the_shapes_of_llama_3(shape, num_kept):
    """Checks the count in baselines.md, section 1, by arithmetic alone: building the mask would take a minute."""
    numel = torch.empty(shape, device="meta").numel()
    assert int(numel * 0.2) == num_kept


def test_mask_keeps_that_number_on_a_real_matrix():
    igia = torch.arange(103 * 97, dtype=torch.float32).reshape(103, 97)
    mask = top_fraction_mask(igia, 0.2)
    assert int(mask.sum()) == 1998  # 9991 * 0.2 = 1998.2
    assert igia[mask].min() > igia[~mask].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mask_takes_any_float(dtype):
    assert top_fraction_mask(F3.to(dtype), 0.5).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=rf"density must be in \[0, 1\], got {density}\. It is the fraction"):
        top_fraction_mask(F2, density)


def test_nan_igia():
    igia = F2.clone()
    igia[0] = float("nan")
    with pytest.raises(ValueError, match=r"igia must hold numbers, got 2 NaN entries.*learning rate"):
        top_fraction_mask(igia, 0.5)


# Merging


def test_merge_oracle():
    both = merge_layers(W1, [W2, W3], [F2, F3], 0.5, "sign_sum")
    assert both.tolist() == [[3.0, -3.0], [5.0, 0.0]]
    assert merge_layers(W1, [W2], [F2], 0.5, "sign_sum").tolist() == [[3.0, -2.0], [3.0, 0.0]]
    assert merge_layers(W1, [W2], [F2], 0.5, "sign_average").tolist() == [[1.5, -2.0], [3.0, 0.0]]


def test_average_is_the_default_and_counts_what_passes():
    # Entry (0,0): 1 and 2; (0,1): -2 and -1; (1,0): 3 and 2; (1,1): a kept zero has no sign.
    assert merge_layers(W1, [W2, W3], [F2, F3], 0.5).tolist() == [[1.5, -1.5], [2.5, 0.0]]


def test_fisher_by_hand():
    kept_igia = torch.tensor([[0.3, 0.2], [0.0, 0.7]])
    merged = merge_layers(W1, [W2, W3], [F2, F3], 0.5, "fisher", kept_igia)
    oracles.close(merged, [[(0.3 * 1 + 0.9 * 2) / 1.2, (0.2 * -2 + 0.6 * -1) / 0.8], [2.0, 0.0]])


def test_weighted_average_by_hand():
    oracles.close(merge_layers(W1, [W2, W3], [F2, F3], 0.5, "weighted_average"), [[1.5, 2 / 3], [2.5, 0.0]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("rule", MERGE_RULES)
def test_rules_agree_with_loops(rule, density, seed):
    kept, pruned, igias, kept_igia = random_case(seed)
    kept_igia = kept_igia if rule == "fisher" else None
    merged = merge_layers(kept, pruned, igias, density, rule, kept_igia)
    oracles.close(merged, oracles.merge(kept, pruned, igias, density, rule, kept_igia))


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_density_zero_and_empty_list_change_nothing(rule):
    kept, pruned, igias, kept_igia = random_case(0, dtype=torch.bfloat16)
    assert torch.equal(merge_layers(kept, pruned, igias, 0.0, rule, kept_igia), kept)
    assert torch.equal(merge_layers(kept, [], [], 0.5, rule, kept_igia), kept)


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_inputs_unchanged_and_twice_the_same(rule):
    kept, pruned, igias, kept_igia = random_case(1)
    inputs = [kept, *pruned, *igias, kept_igia]
    before = [tensor.clone() for tensor in inputs]
    first = merge_layers(kept, pruned, igias, 0.5, rule, kept_igia)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
    assert first.data_ptr() != kept.data_ptr()
    assert torch.equal(first, merge_layers(kept, pruned, igias, 0.5, rule, kept_igia))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", SIGN_RULES)
def test_signs_never_flip(rule, dtype, seed):
    kept, pruned, igias, kept_igia = random_case(seed, dtype=dtype)
    merged = merge_layers(kept, pruned, igias, 1.0, rule, kept_igia)
    assert torch.equal(torch.sign(merged), torch.sign(kept))


def test_weighted_average_may_flip_a_sign():
    merged = merge_layers(torch.tensor([[1.0]]), [torch.tensor([[-3.0]])], [torch.ones(1, 1)], 1.0, "weighted_average")
    assert merged.tolist() == [[-1.0]]


def test_signs_are_those_of_the_original_kept_weight():
    """A running sum would be -1 after the first layer and would let the second layer pass."""
    kept, first, second = (torch.tensor([[value]]) for value in (1.0, -2.0, -4.0))
    for rule in ("sign_sum", "sign_average"):
        assert merge_layers(kept, [first, second], [torch.ones(1, 1)] * 2, 1.0, rule).item() == 1.0


@pytest.mark.parametrize("rule", SIGN_RULES)
def test_order_of_the_pruned_layers_does_not_matter(rule):
    kept, pruned, igias, kept_igia = random_case(3)
    forth = merge_layers(kept, pruned, igias, 0.5, rule, kept_igia)
    back = merge_layers(kept, pruned[::-1], igias[::-1], 0.5, rule, kept_igia)
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("rule", SIGN_RULES)
def test_zeros_never_merge(rule, zero):
    ones, zeros = torch.ones(2, 3), torch.full((2, 3), zero)
    assert torch.equal(merge_layers(ones, [zeros], [ones], 1.0, rule, ones), ones)
    assert torch.equal(merge_layers(zeros, [ones], [ones], 1.0, rule, ones), zeros)
    assert torch.equal(merge_layers(zeros, [zeros], [ones], 1.0, rule, ones), zeros)


@pytest.mark.parametrize(
    ("dtype", "tiny"), [(torch.float32, 1e-30), (torch.bfloat16, 1e-30), (torch.float16, 6e-8), (torch.float64, 1e-200)]
)
def test_weights_whose_product_underflows_still_merge(dtype, tiny):
    kept, pruned = torch.full((1, 2), tiny, dtype=dtype), torch.tensor([[2 * tiny, -2 * tiny]], dtype=dtype)
    assert kept[0, 0] * pruned[0, 0] == 0
    merged = merge_layers(kept, [pruned], [torch.ones(1, 2)], 1.0, "sign_sum")
    assert torch.equal(merged, torch.stack([kept[0, 0] + pruned[0, 0], kept[0, 1]]).reshape(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", MIXING_RULES)
def test_half_precision_untouched_entries_are_bit_identical(rule, dtype):
    kept, pruned, igias, kept_igia = random_case(5, shape=(40, 30), dtype=dtype)
    merged = merge_layers(kept, pruned, igias, 0.2, rule, kept_igia)
    assert merged.dtype == dtype
    untouched = torch.ones_like(kept, dtype=torch.bool)
    for weight, igia in zip(pruned, igias, strict=True):
        mask = torch.tensor(oracles.mask(igia, 0.2))
        untouched &= ~(mask & ((torch.sign(weight) == torch.sign(kept)) | (rule == "weighted_average")))
    assert untouched.any()
    assert not untouched.all()
    assert torch.equal(merged.view(torch.int16)[untouched], kept.view(torch.int16)[untouched])


def test_half_precision_rounds_once():
    """The sum is computed in float32: in bfloat16, each addition in 256 + 1 + 1 would round back to 256."""
    kept, small = torch.tensor([[256.0]]).bfloat16(), torch.tensor([[1.0]]).bfloat16()
    assert merge_layers(kept, [small, small], [torch.ones(1, 1)] * 2, 1.0, "sign_sum").item() == 258.0


def test_fisher_with_zero_weight():
    kept, pruned, ones, zeros = torch.full((1, 2), 2.0), torch.full((1, 2), 6.0), torch.ones(1, 2), torch.zeros(1, 2)
    assert merge_layers(kept, [pruned], [zeros], 1.0, "fisher", zeros).tolist() == [[2.0, 2.0]]
    assert merge_layers(kept, [pruned], [zeros], 1.0, "fisher", ones).tolist() == [[2.0, 2.0]]
    assert merge_layers(kept, [pruned], [ones], 1.0, "fisher", zeros).tolist() == [[6.0, 6.0]]


@pytest.mark.parametrize("scale", [1e6, 1e-20, 1e-60])
def test_fisher_only_depends_on_ratios(scale):
    """`igia_matrix` returns float64 because F can be this small."""
    kept, pruned = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    igia, kept_igia = (torch.tensor([[value * scale]], dtype=torch.float64) for value in (2.0, 1.0))
    oracles.close(merge_layers(kept, [pruned], [igia], 1.0, "fisher", kept_igia), [[7 / 3]])


def test_works_on_a_parameter_without_touching_it():
    kept = torch.nn.Parameter(W1.clone())
    merge_layers(kept, [W2], [F2], 0.5, "sign_sum")
    assert torch.equal(kept, W1)


# Errors


def test_unknown_rule():
    message = "merge_rule must be one of sign_average, sign_sum, fisher, weighted_average, none, got 'median'"
    with pytest.raises(ValueError, match=message):
        check_rule("median")
    with pytest.raises(ValueError, match=message):
        merge_layers(W1, [W2], [F2], 0.5, "median")


def test_not_one_igia_a_weight():
    with pytest.raises(ValueError, match="needs its igia, got 2 weights and 1 igias"):
        merge_layers(W1, [W2, W3], [F2], 0.5)


@pytest.mark.parametrize("culprit", ["pruned", "igia", "kept_igia"])
def test_shapes_differ(culprit):
    arguments = {"pruned": W2, "igia": F2, "kept_igia": F3} | {culprit: torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"kept weight's shape \(2, 2\), got \(2, 3\)\. Only the same sublayer"):
        merge_layers(W1, [arguments["pruned"]], [arguments["igia"]], 0.5, "fisher", arguments["kept_igia"])


def test_fisher_without_kept_igia():
    with pytest.raises(ValueError, match="'fisher' weighs the kept layer by its own IGIA-Matrix, got none"):
        merge_layers(W1, [W2], [F2], 0.5, "fisher")


@pytest.mark.parametrize("rule", MIXING_RULES)
def test_bad_density_and_nan_reach_the_caller(rule):
    with pytest.raises(ValueError, match="density must be in"):
        merge_layers(W1, [W2], [F2], 2.0, rule, F3)
    with pytest.raises(ValueError, match="igia must hold numbers, got 4 NaN entries"):
        merge_layers(W1, [W2], [F2 * float("nan")], 0.5, rule, F3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(
    "values", ["spread", "ties", "zeros", "mostly zeros", "close", "tiny", "infinite", "negative", "negative zeros"]
)
def test_mask_is_the_front_of_a_stable_sort(monkeypatch, values, density, dtype):
    monkeypatch.setattr(merge, "BLOCK_NUMEL", 64)
    noise = torch.rand(21, 13, dtype=torch.float64)
    igia = {
        "spread": torch.exp(60 * (noise - 0.5)),
        "ties": (4 * noise).floor(),
        "zeros": torch.zeros_like(noise),
        "mostly zeros": noise * (noise > 0.9),
        "close": 1 + noise * 1e-6,
        "tiny": noise * torch.finfo(dtype).tiny,
        "infinite": torch.where(noise > 0.7, torch.inf, noise),
        "negative": noise - 0.5,
        "negative zeros": torch.where(noise > 0.5, -0.0, 0.0),
    }[values].to(dtype)
    kept = igia.flatten().argsort(descending=True, stable=True)[: int(igia.numel() * density)]
    expected = torch.zeros(igia.numel(), dtype=torch.bool)
    expected[kept] = True
    assert torch.equal(merge.top_fraction_mask(igia, density), expected.reshape(igia.shape))
