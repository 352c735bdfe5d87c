"""Where tensors are computed: on the device of the weights, for models on one device, on another, or spread over many.

On a CPU, weights on `meta`, which computes nothing, show where factors are sent. What needs a second device that
computes is marked `gpu`, and needs one CUDA device beside the CPU unless it says otherwise.
"""

import copy

import pytest
import torch
from accelerate import dispatch_model

from baselines import kernel_igia
from gradpruner import cost, grad_pruner
from gradpruner.cost import PeakMemory, process_memory_bytes
from gradpruner.grad_pruner import GradPruner
from gradpruner.gradients import EarlyGradients
from gradpruner.hidden_states import answer_nll, text_loss, watch_layers
from gradpruner.igia import igia_matrix
from gradpruner.models.architectures import check_finite_weights, linear_sublayers
from gradpruner.plan import PruningPlan
from gradpruner.repair import repair
from gradpruner.surgery import apply_plan, sharing_copy

METHOD = GradPruner(num_pruned_layers=2, merge_count=2, steps=2, batch_size=2, lora_rank=2)
PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(1, 2, 4))


def spread(model, devices):
    """Spreads a model over devices as `device_map` does: layers in turn, the embedding on the first, the head last."""
    first, last = devices[0], devices[-1]
    layers = {f"model.layers.{layer}": devices[layer % len(devices)] for layer in range(6)}
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": last, "lm_head": last}
    return dispatch_model(model, {**layers, **ends}, force_hooks=True)


@pytest.fixture(
    params=[
        pytest.param(["cpu", "cpu"], id="hooks on the CPU"),
        pytest.param(["cuda:0", "cuda:1"], id="two GPUs", marks=pytest.mark.gpu),
    ]
)
def devices(request):
    if "cuda:1" in request.param and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


# ---- IGIA-Matrices ----


@pytest.fixture
def measured(tiny_llama, make_batches, tmp_path):
    METHOD.measure(tiny_llama(), make_batches(2), tmp_path)
    return tmp_path


def test_factors_are_read_onto_a_device(measured):
    gradients = EarlyGradients.load(measured)
    here, there = (gradients.factors(0, "mlp.up_proj", *device) for device in ((), ("meta",)))
    assert {tensor.device.type for pair in here for tensor in pair} == {"cpu"}
    assert {tensor.device.type for pair in there for tensor in pair} == {"meta"}
    assert [[tensor.shape for tensor in pair] for pair in here] == [[t.shape for t in pair] for pair in there]


@pytest.mark.parametrize("rule", ["sign_average", "fisher"])
def test_igia_matrices_are_formed_on_the_device_of_the_kept_weight(rule, measured, tiny_llama, monkeypatch):
    model, formed = tiny_llama(), []
    method = GradPruner(num_pruned_layers=2, merge_count=1, merge_rule=rule, steps=2, batch_size=2, lora_rank=2)
    [(absorber, merged)] = method.prune(tiny_llama(), measured).plan.merges.items()
    names = linear_sublayers(model.model.layers[0])
    for layer in (layer for layer in range(6) if layer not in merged):
        model.model.layers[layer].to("meta")

    def form(factors, weights):
        formed.append({tensor.device.type for pair in factors for tensor in pair})
        return torch.empty(factors[0][0].shape[0], factors[0][1].shape[1], device="meta")

    monkeypatch.setattr(grad_pruner, "igia_matrix", form)
    monkeypatch.setattr("gradpruner.surgery.merge_layers", lambda kept, *others, **settings: torch.empty_like(kept))
    method.prune(model, measured)
    assert absorber not in merged and formed == [{"meta"}] * len(names) * (2 if rule == "fisher" else 1)


def test_channels_merge_by_matrices_formed_on_the_device_of_their_weight(measured, tiny_llama, monkeypatch):
    asked, factors = [], EarlyGradients.factors

    def note(self, layer, name, device="cpu"):
        asked.append((layer, name, str(device)))
        return factors(self, layer, name)

    monkeypatch.setattr(EarlyGradients, "factors", note)
    monkeypatch.setattr(kernel_igia, "channel_importance", lambda *_: torch.arange(32.0))
    monkeypatch.setattr(kernel_igia.KernelIgia, "_partners", lambda self, model, kept, pruned: [kept[0]] * len(pruned))
    monkeypatch.setattr(kernel_igia, "merge_columns", lambda weight, igia, *_: weight.clone())
    model = tiny_llama()
    model.model.layers[1].to("meta")
    kernel_igia.KernelIgia(sparsity=0.4, steps=2, batch_size=2, lora_rank=2).prune(model, measured)
    names = linear_sublayers(tiny_llama().model.layers[0])
    assert asked == [(layer, name, "meta" if layer == 1 else "cpu") for layer in range(6) for name in names]


@pytest.mark.gpu
def test_pruning_on_a_gpu_gives_the_weights_of_the_cpu(measured, tiny_llama, monkeypatch):
    formed = []

    def form(factors, weights):
        formed.append(factors[0][0].device.type)
        return igia_matrix(factors, weights)

    monkeypatch.setattr(grad_pruner, "igia_matrix", form)
    there, here = (METHOD.prune(tiny_llama().to(device), measured) for device in ("cuda", "cpu"))
    assert set(formed[: len(formed) // 2]) == {"cuda"} and there.plan == here.plan
    for one, other in zip(there.model.parameters(), here.model.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), other)


# ---- models spread by device_map ----


def test_a_spread_model_is_pruned_and_repaired_like_a_whole_one(tiny_llama, make_batches, devices):
    batches, fits, models = make_batches(4, batch_size=4), [], []
    for dense in (tiny_llama(), spread(tiny_llama(), devices)):
        model = apply_plan(sharing_copy(dense), PLAN)
        fits.append(repair(model, dense, PLAN, batches))
        models.append(model)
    assert [fit.applied for fit in fits[0]] == [fit.applied for fit in fits[1]] and fits[0][0].applied
    assert [fit.num_tokens for fit in fits[0]] == [fit.num_tokens for fit in fits[1]]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-3, atol=1e-4)


def test_a_spread_model_merges_like_a_whole_one(tiny_llama, measured, devices):
    whole, other = (METHOD.prune(dense, measured) for dense in (tiny_llama(), spread(tiny_llama(), devices)))
    assert whole.plan == other.plan
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), two.cpu())


def test_losses_of_a_spread_model_are_those_of_a_whole_one(tiny_llama, make_batches, devices):
    whole, other, [batch] = tiny_llama(), spread(tiny_llama(), devices), make_batches(1)
    (one, counts), (two, same_counts) = (text_loss(model, batch) for model in (whole, other))
    torch.testing.assert_close(one.cpu(), two.cpu())
    assert counts.tolist() == same_counts.tolist()
    assert answer_nll(whole, [batch]) == pytest.approx(answer_nll(other, [batch]), rel=1e-5)


def test_layers_are_watched_with_input_and_output_on_one_device(tiny_llama, make_batches, devices):
    model, seen = spread(tiny_llama(), devices), []
    with watch_layers(model, lambda index, before, after: seen.append((before.device, after.device))):
        model(**{name: values.to(model.device) for name, values in make_batches(1)[0].items()})
    assert seen == [(device, device) for device in map(torch.device, devices * 3)]


def test_a_copy_of_a_spread_model_runs_its_own_layers(tiny_llama, make_batches, devices):
    dense, [batch] = spread(tiny_llama(), devices), make_batches(1)
    before = answer_nll(dense, [batch])
    for other in (sharing_copy(dense), copy.deepcopy(dense)):
        apply_plan(other, PLAN)
        assert answer_nll(other, [batch]) != before and answer_nll(dense, [batch]) == before


# ---- peak memory ----


def test_peak_memory_is_summed_over_all_devices(monkeypatch):
    resets, peaks = [], {0: 100, 1: 20, 2: 3}
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 3,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": resets.append,
        "max_memory_allocated": peaks.get,
        "memory_allocated": {0: 7, 1: 0, 2: 1}.get,
    }.items():
        monkeypatch.setattr(cost.torch.cuda, name, value)
    with PeakMemory() as memory:
        pass
    assert resets == [0, 1, 2] and memory.peak_bytes == 123
    assert process_memory_bytes() == 8


def test_time_is_taken_when_the_kernels_have_finished(monkeypatch):
    events = []
    for name, value in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 2,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 0,
        "synchronize": lambda device: events.append(device),
    }.items():
        monkeypatch.setattr(cost.torch.cuda, name, value)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: events.append("time") or 0.0)
    with cost.Cost():
        pass
    assert events == ["time", 0, 1, "time"]


@pytest.mark.gpu
def test_peak_memory_counts_every_gpu():
    with PeakMemory() as memory:
        kept = [torch.empty(2**24, dtype=torch.uint8, device=device) for device in range(torch.cuda.device_count())]
    assert memory.peak_bytes >= sum(tensor.nbytes for tensor in kept)
    assert process_memory_bytes() >= sum(tensor.nbytes for tensor in kept)


def test_offloaded_weights_are_refused_by_name(tiny_llama):
    model = tiny_llama()
    model.model.layers[2].to("meta")
    with pytest.raises(ValueError, match=r"must be on a device, got layers \[2\] offloaded .*Load the model with a"):
        check_finite_weights(model)
