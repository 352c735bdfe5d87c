import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

import gradpruner
from baselines.apt import Apt
from baselines.shortgpt import ShortGpt
from gradpruner import GradPruner, GradPrunerPlus
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.in_memory import compress
from gradpruner.tasks import JsonLines

ROWS = [{"prompt": f"{number} + 1 =", "answer": str(number + 1)} for number in range(12)]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
FAST = {"method": GradPruner, "steps": 2, "batch_size": 4, "lora_rank": 2, "merge_count": 1}


def as_messages(row):
    roles = {"user": row["prompt"], "assistant": row["answer"]}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """Returns a copy without a chat template, for tests that change it."""
    copied = copy.deepcopy(tiny_tokenizer)
    copied.chat_template = None
    return copied


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4)


def test_the_defaults_prune_repair_and_return_the_model(tiny_llama, tokenizer):
    model, specials = tiny_llama(), dict(tokenizer.special_tokens_map)
    compressed = gradpruner.compress(model, tokenizer, iter(ROWS), sparsity=1 / 3)
    assert compressed.model is model and len(model.model.layers) == model.config.num_hidden_layers == 4
    assert compressed.plan.method == "gradpruner_plus" and compressed.plan.details["repair"]
    assert compressed.report["losses"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    assert tokenizer.special_tokens_map == specials


@pytest.mark.parametrize(
    ("method", "changes"),
    [(GradPruner, {"merge_count": 1}), (GradPrunerPlus, {"batch_size": 2})],  # which chooses on more than four rows
)
def test_equal_rows_give_the_plan_of_a_run(method, changes, tmp_path, make_pipeline, tiny_spec, assets_dir, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = JsonLines(train_file=str(file), test_file=str(file), prompt="{prompt}", answer_field="answer", max_length=64)
    settings = {"steps": 2, "batch_size": 4, "lora_rank": 2, "repair": "judged", **changes}
    pipeline = dataclasses.replace(
        make_pipeline({}, method(sparsity=1 / 3, **settings), TrainingSpec(mode="lora", max_steps=1)),
        model=tiny_spec,
        task=task,
    )
    theirs = pipeline.run()
    model = tiny_spec.load(assets_dir)
    ours = compress(model, tokenizer, ROWS, 1 / 3, method=method, max_length=64, **settings)
    assert ours.plan.to_dict() == theirs.plan.to_dict()
    assert ours.report.get("candidates") == theirs.report.get("candidates")


def test_conversations_give_the_plan_of_the_same_prompts_in_the_template(tiny_llama, tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = compress(tiny_llama(), tokenizer, [as_messages(row) for row in ROWS], 0.5, **FAST)
    prompts = compress(tiny_llama(), tokenizer, ROWS, 0.5, chat_template=True, **FAST)
    plain = compress(tiny_llama(), tokenizer, ROWS, 0.5, **FAST)
    assert chats.plan.pruned_layers == prompts.plan.pruned_layers
    assert chats.plan.layer_importance == pytest.approx(prompts.plan.layer_importance, rel=1e-3)
    assert plain.plan.layer_importance != pytest.approx(chats.plan.layer_importance, rel=1e-2)


def test_a_baseline_and_a_number_of_layers(model, tokenizer):
    compressed = compress(model, tokenizer, ROWS, method=ShortGpt, num_pruned_layers=1)
    assert compressed.plan.method == "shortgpt" and len(compressed.plan.pruned_layers) == 1


def test_white_space_between_prompt_and_answer_is_not_doubled(tiny_llama, tokenizer):
    spaced = [{"prompt": row["prompt"] + " ", "answer": row["answer"]} for row in ROWS]
    plans = [compress(tiny_llama(), tokenizer, rows, 0.5, **FAST).plan for rows in (ROWS, spaced)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"needs examples of the task, got no rows\. Give a few hundred"),
        (["text"], r"must be dicts with prompt and answer, or with messages, got str as rows\[0\]"),
        ({"prompt": "a", "answer": "b"}, r"got str as rows\[0\]\. Give a list of dicts"),
        ([{"promt": "a", "answer": "b"}], r"got 1 bad of 1 rows:\n  rows\[0\]: column 'prompt' is missing; .*promt"),
        ([*ROWS, {"prompt": "a", "answer": " "}], r"1 bad of 13 rows:\n  rows\[12\]: column 'answer' is empty\nCorr"),
        ([{"prompt": "a"}] * 8, r"got 8 bad of 8 rows:\n(.*\n){5}  and 3 more\nCorrect"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"rows\[0\]: a conversation must have a turn of the ass"),
        (
            [ROWS[0], as_messages(ROWS[1])],
            r"one kind, got a conversation in rows\[1\] and prompt and answer in rows\[0",
        ),
        ([as_messages(ROWS[0])], r"Rows with messages need a tokenizer with a chat template, got one without\. Use"),
        (ROWS[:3], r"takes 10 rows at least, got 3\. Give more training rows"),
        ([{"prompt": "a" * 600, "answer": "b"}], r"No training row fits .*max_length=200"),
    ],
)
def test_rows_that_cannot_be_used(model, tokenizer, rows, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        compress(model, tokenizer, rows, 0.5, max_length=200)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 40}, r"in \[0, 1\), got 40.* write sparsity=0\.4"),
        ({"sparsity": 0.1}, r"rounds to none of the 4 decoder layers\. Raise sparsity"),
        ({"merge_cuont": 1}, r"GradPrunerPlus has no such setting, got 'merge_cuont' \(did you mean 'merge_count'\?\)"),
        ({"method": "gradpruner"}, r"must be a class such as GradPruner, got 'gradpruner'\. Give the class"),
        ({"method": Apt}, r"returns before the fine-tune, got method=Apt.*experiments\.run method=apt"),
        ({"max_length": 4096}, r"from 1 to the 256 positions .* got 4096\. Change max_length"),
        ({"chat_template": True, "max_length": 64}, r"chat_template=True needs a tokenizer.* and chat_template=False"),
    ],
)
def test_settings_that_cannot_be_used(model, tokenizer, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compress(model, tokenizer, ROWS, **({"max_length": 64} | arguments))


def test_other_things_than_a_model_and_its_tokenizer(model, tiny_llama, tokenizer, monkeypatch):
    with pytest.raises(TypeError, match=r"takes a model of transformers, got .*Tokenizer.*\. Load it with"):
        compress(tokenizer, model, ROWS)
    with pytest.raises(TypeError, match=r"tokenizer as its second argument, got LlamaForCausalLM\. Load it with"):
        compress(model, model, ROWS)
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM\..* merge_and_unload"):
        compress(adapted, tokenizer, ROWS)
    small = tiny_llama(vocab_size=50)
    with pytest.raises(ValueError, match=r"for every token of the rows, got 50 embeddings and token ids .*\. Use the"):
        compress(small, tokenizer, ROWS, max_length=64)
    monkeypatch.setattr(model, "hf_quantizer", object(), raising=False)
    with pytest.raises(ValueError, match=r"Quantized weights cannot be pruned, got .* quantize the result"):
        compress(model, tokenizer, ROWS)


def test_import_gradpruner_is_cheap():
    code = "import sys, gradpruner; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"compress", "load_checkpoint"} <= set(dir(gradpruner))
