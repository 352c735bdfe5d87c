import oracles
import pytest
import torch

from gradpruner.igia import (
    SCORES,
    STEP_WEIGHTINGS,
    igia_matrix,
    layer_importance,
    simulated_gradient,
    squared_frobenius,
    step_importance,
    step_weights,
)
from gradpruner.plan import lowest_layers

# Design document baselines.md, section 1: two steps, rank 1, worked by hand from Eq. 2 to 4.
FACTORS = [
    (torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -1.0]])),
    (torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0, 0.0]])),
]


def random_factors(seed, num_steps=4, shape=(13, 9), rank=3, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            scale * torch.randn(shape[0], rank, generator=generator),
            scale * torch.randn(rank, shape[1], generator=generator),
        )
        for _ in range(num_steps)
    ]


def random_energies(seed, shape=(5, 4, 3)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energies_of(factors):
    """Returns energies, (t, L, M), of factors[layer][sublayer][step]."""
    num_steps = len(factors[0][0])
    return torch.stack(
        [
            torch.stack([torch.stack([squared_frobenius(*steps[step]) for steps in layer]) for layer in factors])
            for step in range(num_steps)
        ]
    )


# Numbers worked by hand


def test_igia_oracle():
    assert igia_matrix(FACTORS).tolist() == [[0.5, 0.5], [4.0, 2.0]]


def test_importance_oracle():
    energies = energies_of([[FACTORS]])
    assert energies.flatten().tolist() == [10.0, 4.0]
    assert layer_importance(energies).item() == 7.0
    # The authors' code omits 1/t: sqrt(10) + 2.
    assert 2 * layer_importance(energies, "frobenius").item() == pytest.approx(5.162278, abs=5e-7)


def test_averaging_gradients_before_the_product_is_another_number():
    mean = [torch.stack(part).mean(dim=0) for part in zip(*FACTORS, strict=True)]
    assert squared_frobenius(*mean).item() == 6.25


def test_scores_can_rank_differently():
    energies = torch.tensor([[9.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]).unsqueeze(2)  # norms 3, 0, 0, 0 and 1
    assert layer_importance(energies, "sumsq").tolist() == [2.25, 1.0]
    assert (4 * layer_importance(energies, "frobenius")).tolist() == [3.0, 4.0]
    assert lowest_layers(layer_importance(energies, "sumsq").tolist(), 1) == (1,)
    assert lowest_layers(layer_importance(energies, "frobenius").tolist(), 1) == (0,)


# Gram form


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("shape", "rank"), [((1, 1), 1), ((8, 8), 8), ((13, 9), 3), ((3, 20), 5), ((4, 2), 6)])
def test_gram_form_agrees_with_the_product(seed, shape, rank):
    left, right = random_factors(seed, 1, shape, rank)[0]
    assert squared_frobenius(left, right).item() == pytest.approx(oracles.energy(left, right), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_form_is_float64_whatever_comes_in(dtype):
    left, right = (factor.to(dtype) for factor in random_factors(0, 1)[0])
    norm = squared_frobenius(left, right)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(oracles.energy(left, right), rel=1e-12)


def test_gram_form_is_never_negative():
    """The two halves cancel exactly, so only rounding error remains."""
    left, right = random_factors(0, 1, (50, 60), 1)[0]
    norm = squared_frobenius(torch.cat([left, -left], dim=1), torch.cat([right, right]))
    assert norm.item() == pytest.approx(0.0, abs=1e-9)
    assert norm.item() >= 0.0


def test_zero_gradient_is_exactly_zero():
    left, right = random_factors(0, 1)[0]
    assert squared_frobenius(left, torch.zeros_like(right)).item() == 0.0


# IGIA-Matrix


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("row_block", [1, 4, 13, 1024])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0, 3.0]])
def test_igia_matrix_agrees_with_loops(seed, row_block, weights):
    factors = random_factors(seed)
    igia = igia_matrix(factors, weights, row_block=row_block)
    assert igia.dtype == torch.float32
    oracles.close(igia, oracles.igia(factors, weights), rtol=1e-5)


def test_igia_matrix_does_not_change_the_factors():
    factors = random_factors(0)
    before = [(left.clone(), right.clone()) for left, right in factors]
    igia_matrix(factors, row_block=4)
    assert all(
        torch.equal(a, b) for new, old in zip(factors, before, strict=True) for a, b in zip(new, old, strict=True)
    )


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_igia_matrix_is_float32_or_wider(given, returned):
    factors = [(left.to(given), right.to(given)) for left, right in random_factors(0)]
    igia = igia_matrix(factors)
    assert igia.dtype == returned
    oracles.close(igia, oracles.igia(factors), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-7, 1e-12, 1e-18])
def test_tiny_gradients_do_not_underflow(scale):
    factors = random_factors(1, scale=scale)
    igia = igia_matrix(factors)
    assert (igia > 0).all()
    oracles.close(igia / scale**4, oracles.igia([(left / scale, right / scale) for left, right in factors]), rtol=1e-5)
    assert squared_frobenius(*factors[0]).item() == pytest.approx(oracles.energy(*factors[0]), rel=1e-9)


@pytest.mark.parametrize("scale", [1e7, 1e10, 1e15])
def test_huge_gradients_do_not_overflow(scale):
    factors = random_factors(1, scale=scale)
    oracles.close(igia_matrix(factors), oracles.igia(factors), rtol=1e-5)


def test_a_tiny_step_next_to_a_large_one():
    tiny, large = random_factors(0, 1, scale=1e-12), random_factors(1, 1)
    oracles.close(igia_matrix(tiny + large), oracles.igia(tiny + large), rtol=1e-5)


def test_all_zero_factors():
    assert not igia_matrix([(torch.zeros(3, 2), torch.zeros(2, 4))] * 2).any()


def test_igia_matrix_without_steps():
    with pytest.raises(ValueError, match="needs at least one step, got no factors"):
        igia_matrix([])


def test_igia_matrix_with_wrong_number_of_weights():
    with pytest.raises(ValueError, match="one weight a step, got 3 weights for 2 steps"):
        igia_matrix(FACTORS, [1.0, 1.0, 1.0])


# Simulated gradient


def random_adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    a, grad_a = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    b, grad_b = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b, grad_a, grad_b


def test_product_estimate():
    a, b, grad_a, grad_b = random_adapter(0)
    left, right = simulated_gradient(a, b, grad_a, grad_b, "product")
    oracles.close(left @ right, oracles.product(grad_b, grad_a))
    default = simulated_gradient(a, b, grad_a, grad_b)
    assert torch.equal(default[0] @ default[1], left @ right)


@pytest.mark.parametrize("seed", range(3))
def test_tangent_estimate_is_the_change_of_the_weight_under_a_gradient_step(seed):
    a, b, grad_a, grad_b = random_adapter(seed)
    rate = 1e-6
    stepped = (b - rate * grad_b) @ (a - rate * grad_a)
    backwards = (b + rate * grad_b) @ (a + rate * grad_a)
    left, right = simulated_gradient(a, b, grad_a, grad_b, "tangent")
    assert (left.shape, right.shape) == ((5, 6), (6, 7))
    oracles.close(left @ right, (backwards - stepped) / (2 * rate), rtol=1e-8)


def test_tangent_estimate_agrees_with_autograd():
    """The estimate equals autograd's derivative of B A in the direction of the gradients of A and B."""
    a, b, _, _ = random_adapter(1)
    weight, inputs = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    (inputs @ (weight + b @ a).T).pow(3).sum().backward()
    _, tangent = torch.func.jvp(lambda a, b: b @ a, (a.detach(), b.detach()), (a.grad, b.grad))
    left, right = simulated_gradient(a.detach(), b.detach(), a.grad, b.grad, "tangent")
    oracles.close(left @ right, tangent, rtol=1e-12)


def test_first_step_of_default_lora():
    a, b, grad_a, grad_b = random_adapter(0)
    b, grad_a = torch.zeros_like(b), torch.zeros_like(grad_a)  # B = 0, hence grad_A = 0
    assert squared_frobenius(*simulated_gradient(a, b, grad_a, grad_b, "product")).item() == 0.0
    tangent = squared_frobenius(*simulated_gradient(a, b, grad_a, grad_b, "tangent")).item()
    assert tangent == pytest.approx(oracles.energy(grad_b, a), rel=1e-12)
    assert tangent > 0


def test_unknown_estimate():
    with pytest.raises(ValueError, match="gradient_estimate must be one of product, tangent, got 'exact'"):
        simulated_gradient(*random_adapter(0), "exact")


# Layer importance


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighting", STEP_WEIGHTINGS)
@pytest.mark.parametrize("score", SCORES)
def test_layer_importance_agrees_with_loops(score, weighting, seed):
    energies = random_energies(seed)
    energies[0] = 0.0  # as at LoRA's first step
    expected = oracles.layer_importance(energies, score, weighting)
    assert layer_importance(energies, score, weighting).tolist() == pytest.approx(expected, rel=1e-12)
    per_step = step_importance(energies, score, weighting)
    assert (per_step.shape, per_step.dtype) == ((5, 4), torch.float64)
    assert per_step.mean(dim=0).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_normalized_steps_sum_to_one(score):
    energies = random_energies(0) * torch.tensor([1.0, 1e6, 1e-30, 0.0, 3.0]).reshape(5, 1, 1)
    sums = step_importance(energies, score, "normalized").sum(dim=1)
    assert sums.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0, 1.0])


def test_a_spiky_step_decides_by_energy_and_not_when_normalized():
    energies = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [100.0, 1.0]]).unsqueeze(2)
    assert lowest_layers(layer_importance(energies).tolist(), 1) == (1,)
    assert lowest_layers(layer_importance(energies, weighting="normalized").tolist(), 1) == (0,)


@pytest.mark.parametrize("weighting", STEP_WEIGHTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_igia_entries_sum_to_the_layer_importance(weighting, seed):
    """Merging and layer ranking (Eq. 4) use the same F."""
    factors = [
        [
            random_factors(100 * seed + 10 * layer + sublayer, shape=shape)
            for sublayer, shape in enumerate([(6, 4), (3, 8)])
        ]
        for layer in range(4)
    ]
    energies = energies_of(factors)
    weights = step_weights(energies, weighting).tolist()
    sums = [sum(igia_matrix(steps, weights).double().sum().item() for steps in layer) for layer in factors]
    assert sums == pytest.approx(layer_importance(energies, "sumsq", weighting).tolist(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4])
@pytest.mark.parametrize("weighting", STEP_WEIGHTINGS)
@pytest.mark.parametrize("score", SCORES)
def test_scaling_all_gradients_keeps_the_ranking(score, weighting, scale):
    factors = [[random_factors(layer)] for layer in range(8)]
    scaled = [[[(scale * left, scale * right) for left, right in steps] for steps in layer] for layer in factors]
    rankings = [layer_importance(energies_of(each), score, weighting).argsort().tolist() for each in (factors, scaled)]
    assert rankings[0] == rankings[1]


def test_step_weights():
    energies = torch.tensor([[[1.0], [3.0]], [[0.0], [0.0]], [[0.25], [0.25]]])
    assert step_weights(energies, "energy").tolist() == [1.0, 1.0, 1.0]
    assert step_weights(energies, "normalized").tolist() == [0.25, 0.0, 2.0]


def test_a_step_without_gradient_counts_in_the_mean_but_adds_nothing():
    energies = torch.tensor([[[0.0], [0.0]], [[2.0], [4.0]]])
    assert layer_importance(energies).tolist() == [1.0, 2.0]
    assert layer_importance(energies, weighting="normalized").tolist() == pytest.approx([1 / 6, 1 / 3])


@pytest.mark.parametrize("function", [step_importance, layer_importance])
def test_unknown_score_or_weighting(function):
    with pytest.raises(ValueError, match="score must be one of sumsq, frobenius, got 'l1'"):
        function(random_energies(0), "l1")
    with pytest.raises(ValueError, match="step_weighting must be one of energy, normalized, got 'last'"):
        function(random_energies(0), "sumsq", "last")


def test_step_weights_with_unknown_weighting():
    with pytest.raises(ValueError, match="step_weighting must be one of energy, normalized, got 'last'"):
        step_weights(random_energies(0), "last")
