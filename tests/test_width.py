"""Width surgery: masked = sliced, identity, head mapping, counts, budgets, plans, checkpoints and their loader."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gradpruner
from gradpruner.budget import solve_size, target_parameters
from gradpruner.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from gradpruner.models.architectures import count_parameters
from gradpruner.models.counting import count_model
from gradpruner.models.memory import estimate_training_memory
from gradpruner.models.offline_configs import shipped_config
from gradpruner.models.shape import (
    WIDTH_MODEL_TYPES,
    LayerShape,
    ModelShape,
    config_shape,
    describe_shape,
    empty_shaped_model,
    model_shape,
    shaped_config,
)
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.surgery import apply_plan
from gradpruner.width_surgery import narrow

LLAMA_8B, MISTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3"
TINY = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EXTRA = {"qwen3": {"head_dim": 8}, "smollm3": {"no_rope_layer_interval": 2}}
ALL_HEADS, ALL_CHANNELS = tuple(range(6)), tuple(range(20))
# Layer 0 loses the middle KV group, layer 1 nothing, layer 2 one query head of each group; all lose channels.
UNEVEN = WidthPlan(heads=((0, 1, 4, 5), ALL_HEADS, (0, 3, 5)), channels=(tuple(range(3, 20)), ALL_CHANNELS, (0, 2, 19)))


@pytest.fixture(params=WIDTH_MODEL_TYPES)
def model_type(request):
    return request.param


def make_model(model_type="llama", tied=False, seed=0):
    torch.manual_seed(seed)
    extra = EXTRA.get(model_type, {})
    config = AutoConfig.for_model(model_type, **TINY, **extra, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def mask(model, width):
    """Zeroes the columns of the dense model's weights that read the pruned heads and channels."""
    for layer, heads, channels in zip(model.model.layers, width.heads, width.channels, strict=True):
        gone = [c for h in range(6) if h not in heads for c in range(h * 8, h * 8 + 8)]
        layer.self_attn.o_proj.weight.data[:, gone] = 0
        layer.mlp.down_proj.weight.data[:, [c for c in range(20) if c not in channels]] = 0
    return model


def test_masked_is_sliced(model_type, make_batches):
    [batch] = make_batches(1)
    sliced = make_model(model_type)
    narrow(sliced, UNEVEN)
    torch.testing.assert_close(logits(sliced, batch), logits(mask(make_model(model_type), UNEVEN), batch))
    layers = [(4, 2, 17), (6, 3, 20), (3, 3, 3)]
    assert model_shape(sliced) == ModelShape(48, tuple(LayerShape(*sizes) for sizes in layers))
    assert [layer.self_attn.num_key_value_groups for layer in sliced.model.layers] == [2, 2, 1]


def test_a_query_head_still_reads_its_kv_head(make_batches):
    # After group 1 is pruned, query heads 4 and 5 read KV head 2, which is now number 1.
    dense, sliced = make_model(), make_model()
    narrow(sliced, UNEVEN)
    before, after = dense.model.layers[0].self_attn, sliced.model.layers[0].self_attn
    assert torch.equal(after.q_proj.weight[16:32], before.q_proj.weight[32:48])
    assert torch.equal(after.k_proj.weight[8:16], before.k_proj.weight[16:24])
    assert torch.equal(after.v_proj.weight[8:16], before.v_proj.weight[16:24])
    assert torch.equal(after.o_proj.weight[:, 16:32], before.o_proj.weight[:, 32:48])


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_channels_with_the_norm_corrected(model_type, tied, make_batches):
    """RMSNorm's mean over the d' kept channels is d / d' times the mean over d channels whose rest is zero."""
    [batch] = make_batches(1)
    hidden = tuple(channel for channel in range(48) if channel % 4)  # 36
    width = WidthPlan((ALL_HEADS,) * 3, (ALL_CHANNELS,) * 3, hidden)
    sliced, masked = make_model(model_type, tied), make_model(model_type, tied)
    narrow(sliced, width)
    gone = [channel for channel in range(48) if channel not in hidden]
    masked.model.embed_tokens.weight.data[:, gone] = 0
    for layer in masked.model.layers:
        layer.self_attn.o_proj.weight.data[gone] = 0
        layer.mlp.down_proj.weight.data[gone] = 0
    epsilon = masked.config.rms_norm_eps
    for module in sliced.modules():
        if type(module).__name__.endswith("RMSNorm") and module.weight.numel() == 36:
            module.weight.data *= (48 / 36) ** 0.5
            module.variance_epsilon = epsilon * 48 / 36
    torch.testing.assert_close(logits(sliced, batch), logits(masked, batch), rtol=1e-4, atol=1e-5)
    assert sliced.config.hidden_size == 36 and sliced.config.head_dim == 8
    assert (sliced.lm_head.weight is sliced.model.embed_tokens.weight) == tied


def test_a_plan_that_keeps_everything_changes_no_bit(model_type, make_batches):
    [batch] = make_batches(1)
    model, config = make_model(model_type), make_model(model_type).config.to_dict()
    narrow(model, WidthPlan((ALL_HEADS,) * 3, (ALL_CHANNELS,) * 3))
    assert torch.equal(logits(model, batch), logits(make_model(model_type), batch))
    assert model.config.to_dict() == config


def test_layers_leave_before_others_become_narrow(make_batches):
    [batch] = make_batches(1)
    model = make_model()
    width = WidthPlan((ALL_HEADS, (0, 1)), (ALL_CHANNELS, (4, 5)))
    apply_plan(model, PruningPlan(num_hidden_layers=3, pruned_layers=(1,), method="test", width=width))
    assert [layer.intermediate_size for layer in model_shape(model).layers] == [20, 2]
    assert logits(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("width", "match"),
    [
        (WidthPlan(((0,),) * 2, ((0,),) * 2), r"what stays of 2 layers, the model has 3\. Apply it"),
        (WidthPlan(((0, 6),) * 3, ((0,),) * 3), r"Layer 0 has 6 heads and 20 MLP channels, the plan keeps head 6"),
        (WidthPlan(((0,),) * 3, ((20,),) * 3), r"keeps head 0 and channel 20\. Apply it to the model"),
        (
            WidthPlan(((0, 1, 2),) * 3, ((0,),) * 3),
            r"equally many query heads, got \[2, 1, 0\] in layer 0\. Keep whole",
        ),
    ],
)
def test_plans_for_another_model(width, match):
    with pytest.raises(ValueError, match=match):
        narrow(make_model(), width)


def test_other_architectures_are_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **TINY, head_dim=8))
    with pytest.raises(ValueError, match=r"known for llama, mistral, .*got model type 'gemma2'\. Choose such a model"):
        narrow(model, UNEVEN)
    assert model_shape(model) == config_shape(model.config)


# ---- plans ----


def test_plans_are_read_as_written():
    plan = PruningPlan(num_hidden_layers=3, method="test", width=WidthPlan(UNEVEN.heads, UNEVEN.channels, (0, 1, 5)))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["width"] == {
        "heads": ["0-1 4-5", "0-5", "0 3 5"],
        "channels": ["3-19", "0-19", "0 2 19"],
        "hidden": "0-1 5",
    }
    assert PruningPlan.from_dict(data) == plan


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: WidthPlan(((1, 0),), ((0,),)), r"heads that stay must be ascending, distinct .* got \[1, 0\]"),
        (lambda: WidthPlan(((0,),), ((),)), r"channels that stay must be .* at least one, got \[\]"),
        (lambda: WidthPlan(((0,),), ((0,),), (-1,)), r"hidden that stay must be"),
        (lambda: WidthPlan(((0,),) * 2, ((0,),)), r"heads and channels of the same layers, got 2 and 1 layers"),
        (lambda: PruningPlan(3, (1,), width=UNEVEN), r"what stays of each of its 2 kept layers, got 3"),
    ],
)
def test_damaged_plans(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# ---- shapes and budgets ----


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "total"),
    [
        (4096, 14336, 19, 5_194_805_248),
        (4096, 7168, 32, 5_211_688_960),
        (3584, 9216, 32, 5_264_870_912),
        (3584, 8704, 32, 5_088_710_144),
        (3072, 9216, 32, 4_512_746_496),
    ],
)
def test_published_counts(hidden, ffn, layers, total):
    config = shipped_config(LLAMA_8B)
    assert count_model(config, ModelShape(hidden, (LayerShape(32, 8, ffn),) * layers)).num_parameters == total


def test_counts_are_those_of_a_sliced_model(model_type):
    model = make_model(model_type)
    config = model.config
    narrow(model, WidthPlan(UNEVEN.heads, UNEVEN.channels, tuple(range(24))))
    shape = model_shape(model)
    counts = count_model(make_model(model_type).config, shape)
    assert counts.num_parameters == count_parameters(model) == count_parameters(empty_shaped_model(config, shape))
    assert [layer.kv_width for layer in counts.layers] == [2 * 2 * 8, 2 * 3 * 8, 2 * 3 * 8]
    assert [layer.attention_macs for layer in counts.layers] == [2 * 4 * 8, 2 * 6 * 8, 2 * 3 * 8]


def test_targets():
    llama, mistral = shipped_config(LLAMA_8B), shipped_config(MISTRAL)
    # Table 11: 7.5 and 4.67 billion parameters, which is the total less the 128,256 x 4,096 of the input embedding.
    assert target_parameters(llama, 0.4, "layers") == 5_194_805_248 - 128_256 * 4096 == 4_669_468_672
    assert target_parameters(mistral, 0.4, "layers") == 4_412_567_552 - 32_768 * 4096
    assert target_parameters(llama, 0.4, "total") == round(0.6 * 8_030_261_248)
    assert target_parameters(llama, 0.0, "layers") == 7_504_924_672


def test_sizes_come_nearest_and_out_of_reach_is_said():
    config = shipped_config(LLAMA_8B)

    def ffn(size):
        return ModelShape(4096, (LayerShape(32, 8, size),) * 32)

    exact = count_model(config, ffn(7000)).num_parameters
    assert solve_size("MLP width", ffn, config, exact, "total", 14336) == 7000
    assert solve_size("MLP width", ffn, config, exact, "total", 14336, step=64) == 6976
    assert solve_size("MLP width", ffn, config, exact - 128_256 * 4096, "layers", 14336) == 7000
    with pytest.raises(ValueError, match=r"No MLP width leaves 1,000 parameters: 1 to 14336 leave .*Change sparsity"):
        solve_size("MLP width", ffn, config, 1000, "total", 14336)


def test_configs_of_uniform_shapes_are_stock():
    config = make_model().config
    shape = ModelShape(36, (LayerShape(4, 2, 7),) * 3)
    stock = AutoModelForCausalLM.from_config(shaped_config(config, shape))
    assert model_shape(stock) == shape and stock.model.layers[0].self_attn.head_dim == 8
    assert shaped_config(config, config_shape(config)).to_dict() == config.to_dict()


def test_descriptions():
    texts = describe_shape(ModelShape(48, (LayerShape(4, 2, 7), LayerShape(4, 2, 9), LayerShape(4, 2, 9))))
    assert texts == {
        "hidden_size": "48",
        "num_attention_heads": "4",
        "num_key_value_heads": "2",
        "intermediate_size": "7 in 1, 9 in 2",
    }


def test_memory_estimates_add_up_over_unlike_layers():
    config = make_model().config
    wide, thin = LayerShape(6, 3, 20), LayerShape(2, 1, 5)

    def activations(*layers):
        shape = ModelShape(48, layers)
        return estimate_training_memory(config, 2, 16, 4, torch.float32, shape=shape, accumulate=True).activations

    assert activations(wide, thin) - activations(wide, wide) == activations(thin, thin) - activations(wide, thin)
    assert activations(thin, thin) < activations(wide, thin)


# ---- checkpoints ----


@pytest.fixture
def save(tiny_tokenizer, tmp_path):
    def run(width, model_type="llama", tied=False):
        model = make_model(model_type, tied)
        plan = PruningPlan(num_hidden_layers=3, method="test", width=width)
        apply_plan(model, plan)
        save_checkpoint(model, tiny_tokenizer, plan, tmp_path / "saved", "tiny")
        return model, tmp_path / "saved"

    return run


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_differ_are_loaded_by_us_alone(model_type, tied, save, make_batches):
    model, folder = save(UNEVEN, model_type, tied)
    [batch] = make_batches(1)
    loaded = gradpruner.load_checkpoint(folder)
    assert torch.equal(logits(loaded, batch), logits(model, batch)) and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 7)
    assert gradpruner.load_checkpoint(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    card = (folder / "README.md").read_text()
    assert "gradpruner.load_checkpoint" in card and "| intermediate_size | 17 in 1, 20 in 1, 3 in 1 |" in card


def test_layers_that_are_alike_are_a_stock_checkpoint(model_type, save, make_batches):
    model, folder = save(WidthPlan(((0, 1, 4, 5),) * 3, ((1, 2, 3),) * 3, tuple(range(0, 48, 2))), model_type)
    [batch] = make_batches(1)
    assert not (folder / "shape.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain, batch), logits(model, batch))
    assert plain.config.head_dim == 8 and plain.config.num_key_value_heads == 2
    assert torch.equal(logits(load_checkpoint(folder), batch), logits(model, batch))
    assert "A stock checkpoint" in (folder / "README.md").read_text()


def test_shards(tiny_tokenizer, tmp_path, monkeypatch, make_batches):
    monkeypatch.setattr("gradpruner.checkpoints.checkpoint.MAX_SHARD_SIZE", "20KB")
    model = make_model()
    plan = PruningPlan(num_hidden_layers=3, method="test", width=UNEVEN)
    save_checkpoint(apply_plan(model, plan), tiny_tokenizer, plan, tmp_path / "saved", "tiny")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    [batch] = make_batches(1)
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved"), batch), logits(model, batch))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: {**data, "version": 9}, r"Cannot read .*shape\.json: it is of version 9, this release reads 1"),
        (lambda data: {"version": 1}, r"Cannot read .*shape\.json: KeyError: .*Save the checkpoint again"),
        (
            lambda data: {**data, "intermediate_size": [17, 20, 4]},
            r"do not fit its shape\.json: they have other shapes in model\.layers\.2\.mlp\.down_proj.* and 2 more",
        ),
        (
            lambda data: {key: value[:2] if isinstance(value, list) else value for key, value in data.items()},
            r"shape\.json: it names 2 layers, config\.json 3\. Save the checkpoint again",
        ),
    ],
)
def test_damaged_shapes(damage, match, save):
    _, folder = save(UNEVEN)
    file = folder / "shape.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=match):
        load_checkpoint(folder)
