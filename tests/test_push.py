"""The card of a checkpoint as the Hub reads it, and the push. A fake stands in for the Hub."""

import contextlib
import io
import json
import logging
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from hydra import compose, initialize_config_dir
from peft import LoraConfig, get_peft_model

from experiments import push_checkpoint as command
from experiments.config import CONF
from experiments.job import run_job
from experiments.recording import PUSHED_FILE
from gradpruner.checkpoints import push
from gradpruner.checkpoints.card_metadata import Results
from gradpruner.checkpoints.checkpoint import save_checkpoint
from gradpruner.checkpoints.push import PushError, check_push, push_checkpoint
from gradpruner.models import origin
from gradpruner.models.origin import Origin, find_origin
from gradpruner.plan import PruningPlan, WidthPlan
from gradpruner.record import RunRecord
from gradpruner.surgery import apply_plan

TOKEN = "hf_secret"
REPOSITORY = "mine/pruned"
PLAN = PruningPlan(num_hidden_layers=6, pruned_layers=(2, 4), method="gradpruner_plus")
UNEVEN = WidthPlan(((0, 1, 2, 3),) * 5 + ((0, 1),), ((1, 2, 3),) * 6, None)
METRICS = {
    "num_examples": 200,
    **{"accuracy": 0.61234, "accuracy_stderr": 0.03, "accuracy_mode": "likelihood"},
    **{"answer_nll": 1.5, "answer_nll_stderr": 0.1, "chance_accuracy": 0.25},
}
LLAMA = Origin("meta-llama/Llama-3.2-1B", "llama3.2")


@pytest.fixture
def hub(monkeypatch):
    """Returns a fake Hub: `calls`, uploaded `files`, and errors to raise."""
    state = SimpleNamespace(calls=[], files={}, error=None, whoami_error=None)

    def create_repo(self, repo_id, **settings):
        state.calls.append(("create_repo", repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        state.calls.append(("upload_folder", repo_id))
        if state.error is not None:
            raise state.error
        for file in folder_path.rglob("*"):
            if file.is_file():
                state.files[file.relative_to(folder_path).as_posix()] = file.read_bytes()

    def whoami(self):
        if state.whoami_error is not None:
            raise state.whoami_error
        return {"name": "mine"}

    for function in (create_repo, upload_folder, whoami):
        monkeypatch.setattr(HfApi, function.__name__, function)
    monkeypatch.setattr(push, "unreachable_reason", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return state


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.fixture
def save(tmp_path, tiny_llama, tiny_tokenizer):
    """Returns `save(plan=PLAN, has_adapter=False)`, which saves a pruned model with results and returns the folder."""

    def run(plan=PLAN, has_adapter=False):
        model = apply_plan(tiny_llama(), plan)
        if has_adapter:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
        results = Results("arc_easy", "allenai/ai2_arc", METRICS)
        save_checkpoint(model, tiny_tokenizer, plan, tmp_path / "saved", "tiny", {"seed": 0}, LLAMA, results)
        return tmp_path / "saved"

    return run


def http_error(text):
    return HfHubHTTPError(text, response=SimpleNamespace(headers={}, status_code=401, request=None))


# The card


def test_the_card_has_results_licence_and_base_model(save):
    card = ModelCard.load(save() / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.library_name) == (LLAMA.hub_id, "llama3.2", "transformers")
    assert data.datasets == ["allenai/ai2_arc"] and data.tags == ["gradpruner", "pruning", "gradpruner-plus"]
    assert [(each.metric_type, each.metric_value, each.dataset_type) for each in data.eval_results] == [
        ("accuracy", 0.6123, "allenai/ai2_arc"),
        ("nll", 1.5, "allenai/ai2_arc"),
    ]
    assert data.model_name == "tiny with 4 of 6 layers"
    assert "| Accuracy | 0.6123 ± 0.0300 |" in card.text and "| pruned | 2, 4 |" in card.text
    assert "On 200 test rows of arc_easy" in card.text


@pytest.mark.parametrize(
    ("plan", "has_adapter"),
    [
        (PLAN, False),
        (PLAN, True),
        (PruningPlan(num_hidden_layers=6, method="test", width=UNEVEN), False),
        (PruningPlan(num_hidden_layers=6, method="test", width=UNEVEN), True),
    ],
)
def test_the_example_in_the_card_runs_as_printed(save, plan, has_adapter, monkeypatch):
    folder = save(plan, has_adapter)
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    assert printed.getvalue().startswith("Question: What do plants need to grow?\nAnswer:")
    assert ("PeftModel" in code, "load_checkpoint" in code) == (has_adapter, plan is not PLAN)


def test_without_results_and_origin_the_card_has_neither(tmp_path, tiny_llama, tiny_tokenizer):
    save_checkpoint(apply_plan(tiny_llama(), PLAN), tiny_tokenizer, PLAN, str(tmp_path / "saved"))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.eval_results) == (None, None, None)
    assert "## Results" not in card.text and "# A model with 4 of 6 layers" in card.text


def test_origins(tmp_path, monkeypatch, caplog):
    assert find_origin("packaged:smollm2-135m") == Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert find_origin("random:llama") == find_origin("") == Origin()
    card = tmp_path / "README.md"
    assert find_origin(str(tmp_path)) == Origin()
    card.write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://a/b\nbase_model: a/b\n---\ntext")
    own = Origin(None, "other", "mine", "https://a/b")  # of a folder's card, base_model is what it was made from
    assert find_origin(str(tmp_path)) == own
    monkeypatch.setattr(origin, "use_cache_without_hub", lambda: None)
    monkeypatch.setattr(origin, "hf_hub_download", lambda *args, **settings: str(card))
    assert find_origin("x/y", "abc") == Origin("x/y", "other", "mine", "https://a/b")
    (tmp_path / "plan.json").write_text("{}")
    assert find_origin(str(tmp_path)).hub_id == "a/b"
    card.write_text("---\nlicense: [\n---\n")
    with caplog.at_level(logging.INFO):
        assert find_origin(str(tmp_path)) == Origin()
    assert "cannot be read" in caplog.text

    def refuse(*args, **settings):
        raise http_error("404")

    monkeypatch.setattr(origin, "hf_hub_download", refuse)
    assert find_origin("x/y") == Origin("x/y")


# The push


def test_a_push_makes_a_private_repository_and_leaves_the_folder_unchanged(hub, save):
    folder = save()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert push_checkpoint(folder, REPOSITORY) == "https://huggingface.co/mine/pruned"
    assert hub.calls[0] == ("create_repo", REPOSITORY, {"private": True, "exist_ok": True})
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert set(hub.files) == {file.relative_to(folder).as_posix() for file in before}
    card = hub.files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("mine/pruned")' in card and '"."' not in card
    assert str(folder) not in "".join(
        data.decode() for name, data in hub.files.items() if name.endswith((".json", ".md"))
    )


@pytest.mark.parametrize("width", [None, UNEVEN])
def test_an_adapter_is_pushed_with_the_repository_as_its_base(hub, save, width):
    folder = save(PLAN if width is None else PruningPlan(num_hidden_layers=6, method="test", width=width), True)
    assert str(folder) in (folder / "adapter" / "adapter_config.json").read_text()
    push_checkpoint(folder, REPOSITORY)
    assert json.loads(hub.files["adapter/adapter_config.json"])["base_model_name_or_path"] == REPOSITORY
    for name in ("README.md", "adapter/README.md"):
        assert f'PeftModel.from_pretrained(model, "{REPOSITORY}", subfolder="adapter")' in hub.files[name].decode()
        assert (f'snapshot_download("{REPOSITORY}")' in hub.files[name].decode()) == (width is not None)


def test_a_failed_push_says_how_to_push_again_and_never_the_token(hub, save, capsys):
    folder = save()
    hub.error = RuntimeError(f"connection closed, header: Bearer {TOKEN}")
    with pytest.raises(PushError, match=r"push to mine/pruned failed, got RuntimeError: .*push_checkpoint") as caught:
        push_checkpoint(folder, REPOSITORY)
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None
    again = str(caught.value).split("python -m experiments.push_checkpoint ")[1].split()
    assert command.main(again) == 1
    hub.error = None
    assert command.main(again) == 0
    printed = capsys.readouterr()
    assert printed.out == "https://huggingface.co/mine/pruned\n" and "error: The push to" in printed.err
    assert TOKEN not in printed.err


def test_what_cannot_be_pushed(hub, tmp_path, monkeypatch, caplog):
    for name in ("true", "mine", "a/b/c", "a/b c"):
        with pytest.raises(ValueError, match=rf"must name a repository of the Hub, OWNER/NAME, got '{name}'\. Write"):
            check_push(name)
    with pytest.raises(ValueError, match=r"A checkpoint has a config\.json, got .* without one\. Give the folder"):
        push_checkpoint(tmp_path, REPOSITORY)
    hub.whoami_error = http_error(f"401 Client Error: token {TOKEN} is invalid")
    with pytest.raises(
        ValueError, match=r"a token that the Hugging Face Hub takes, got .*\*\*\* is.*hf auth"
    ) as caught:
        check_push(REPOSITORY)
    assert TOKEN not in str(caught.value)
    check_push(REPOSITORY, asks_hub=False)
    monkeypatch.setattr(push, "unreachable_reason", lambda: "no network")
    check_push(REPOSITORY)
    assert "cannot be reached now (no network)" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"needs the Hugging Face Hub, got HF_HUB_OFFLINE=1\. Unset it"):
        check_push(REPOSITORY)


def test_without_a_token_nothing_is_pushed(hub, no_token):
    with pytest.raises(ValueError, match=r"push_to_hub=mine/pruned needs a token .* got none\. Run `hf auth login`"):
        check_push(REPOSITORY)


# In a run


@pytest.fixture
def start(tmp_path, shared_cache, in_process):
    """Returns `start(*overrides)`, which runs the same short command each time."""

    def run(*overrides):
        fixed = [
            "debug=smoke",
            "method=last",
            "reference=null",
            "evaluate_before=false",
            f"output_dir={tmp_path / 'run'}",
        ]
        fixed += [f"cache_dir={shared_cache}", f"push_to_hub={REPOSITORY}"]
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return run_job(compose("config", overrides=[*fixed, *overrides]))

    return run


def test_a_run_without_a_token_is_refused_before_any_work(start, hub, no_token, tmp_path):
    with pytest.raises(ValueError, match="needs a token"):
        start()
    with pytest.raises(ValueError, match=r"must name a repository of the Hub, OWNER/NAME, got 'True'\. Write"):
        start("push_to_hub=true")
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_refused(start, hub, monkeypatch):
    monkeypatch.setattr("experiments.job.is_sweep", lambda: True)
    with pytest.raises(ValueError, match=r"holds one model, got push_to_hub=mine/pruned in a sweep\. Push the best"):
        start()


def test_a_run_pushes_once_and_a_failed_push_loses_nothing(start, hub, tmp_path, caplog, capsys):
    run_dir = tmp_path / "run"
    hub.error = RuntimeError("connection closed")
    with pytest.raises(PushError, match="The push to mine/pruned failed"):
        start()
    assert RunRecord.load(run_dir).status == "finished" and (run_dir / "checkpoint").is_dir()
    assert not (run_dir / PUSHED_FILE).exists()
    hub.error = None
    start()  # has finished, so it only pushes
    assert "Pushed: https://huggingface.co/mine/pruned" in capsys.readouterr().out
    results = ModelCard(hub.files["README.md"].decode()).data.eval_results
    assert results[0].dataset_type == "allenai/ai2_arc"
    num_calls = len(hub.calls)
    start()
    assert len(hub.calls) == num_calls
    texts = [file.read_text() for file in run_dir.rglob("*") if file.suffix in (".json", ".yaml", ".log", ".md")]
    assert TOKEN not in "".join(texts) + caplog.text
    shutil.rmtree(run_dir)
