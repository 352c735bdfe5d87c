"""Hub models: one commit for key, config, tokenizer and weights. A folder laid out like the Hub's cache stands in."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from gradpruner.models import hub
from gradpruner.models.assets import AssetError
from gradpruner.models.hub import resolve_commit
from gradpruner.models.spec import ModelSpec

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, without network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for function in (resolve_commit, hub.use_cache_without_hub):
        function.cache_clear()
    yield folder
    for function in (resolve_commit, hub.use_cache_without_hub):
        function.cache_clear()


@pytest.fixture
def repository(cache, tiny_llama, tiny_tokenizer):
    """Two commits of a/b with different weights and tokenizers; main is at the old one."""
    folder = cache / "models--a--b"
    for seed, commit in enumerate((OLD, NEW)):
        snapshot = folder / "snapshots" / commit
        tiny_llama(seed=seed, num_hidden_layers=2 + seed).save_pretrained(snapshot)
        tiny_tokenizer.save_pretrained(snapshot)
        (snapshot / "chat_template.jinja").write_text(f"template {commit}")
    move(folder, "main", OLD)
    return folder


def move(repository: Path, revision: str, commit: str) -> None:
    reference = repository / "refs" / revision
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit)


def online(monkeypatch, answer):
    """Lets the Hub answer with a commit, or raise; returns the revisions that it was asked for."""
    asked = []

    def model_info(self, repo_id, *, revision=None, **kwargs):
        asked.append((repo_id, revision))
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(sha=answer)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "unreachable_reason", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


def weight(model):
    return model.lm_head.weight.detach()


def test_offline_the_cache_knows_the_commit(repository, assets_dir):
    assert ModelSpec("a/b").commit(assets_dir) == OLD
    assert ModelSpec("a/b", revision=NEW).commit(assets_dir) == NEW


def test_the_fingerprint_holds_the_commit(repository, assets_dir):
    assert ModelSpec("a/b").fingerprint(assets_dir) == f"a/b@{OLD}"
    assert ModelSpec("a/b", revision="main").fingerprint(assets_dir) == f"a/b@{OLD}"
    assert ModelSpec("a/b", revision=NEW).fingerprint(assets_dir) == f"a/b@{NEW}"


def test_a_moved_branch_changes_the_fingerprint(repository, assets_dir):
    before = ModelSpec("a/b").fingerprint(assets_dir)
    move(repository, "main", NEW)
    resolve_commit.cache_clear()  # as in another process
    assert ModelSpec("a/b").fingerprint(assets_dir) != before


@pytest.mark.parametrize("commit", [OLD, NEW])
def test_everything_comes_from_the_resolved_commit(repository, assets_dir, tiny_llama, commit):
    """Even if the branch moves between the first use and the others."""
    move(repository, "main", commit)
    spec, seed = ModelSpec("a/b"), (OLD, NEW).index(commit)
    assert spec.fingerprint(assets_dir) == f"a/b@{commit}"
    move(repository, "main", NEW if commit == OLD else OLD)
    assert spec.load_config(assets_dir).num_hidden_layers == 2 + seed
    assert spec.load_tokenizer(assets_dir).chat_template == f"template {commit}"
    assert torch.equal(weight(spec.load(assets_dir)), weight(tiny_llama(seed=seed, num_hidden_layers=2 + seed)))
    assert spec.commit(assets_dir) == commit


def test_online_the_hub_is_asked_once(repository, assets_dir, monkeypatch):
    asked = online(monkeypatch, NEW)
    spec = ModelSpec("a/b", revision="main")
    assert spec.commit(assets_dir) == NEW
    assert ModelSpec("a/b", revision="main").commit(assets_dir) == NEW
    assert asked == [("a/b", "main")]
    assert (repository / "refs" / "main").read_text() == NEW  # for the next time without network


def test_the_cache_answers_when_the_hub_does_not(repository, assets_dir, monkeypatch):
    online(monkeypatch, OfflineModeIsEnabled("no route"))
    assert ModelSpec("a/b").commit(assets_dir) == OLD


def test_the_commit_is_in_no_saved_config(repository, assets_dir, tmp_path):
    config = ModelSpec("a/b").load_config(assets_dir)
    config.save_pretrained(tmp_path / "saved")
    assert OLD not in (tmp_path / "saved" / "config.json").read_text()
    assert OLD not in str(config.to_dict())


def test_a_folder_has_no_commit(tiny_spec, assets_dir):
    assert tiny_spec.commit(assets_dir) is None
    assert ModelSpec(tiny_spec.source(assets_dir)).commit(assets_dir) is None


UNKNOWN = (
    r"Cannot find the commit of model 'a/b', revision '{}': .*\. Check model\.path and model\.revision.*local folder"
)


@pytest.mark.bad_input("Checkpoints", "a Hub id without network and cache", "error: Cannot find the commit of model")
@pytest.mark.parametrize("use", ["commit", "fingerprint", "load_config", "load_tokenizer", "load"])
def test_without_network_and_cache(assets_dir, use):
    with pytest.raises(OSError, match=UNKNOWN.format("main")):
        getattr(ModelSpec("a/b"), use)(assets_dir)


@pytest.mark.bad_input("Checkpoints", "model.revision that does not exist", "error: Cannot find the commit of model")
def test_a_revision_that_the_cache_does_not_know(repository, assets_dir):
    with pytest.raises(OSError, match=UNKNOWN.format("v2")):
        ModelSpec("a/b", revision="v2").commit(assets_dir)


@pytest.mark.bad_input("Checkpoints", "a Hub id that does not exist", "error: Cannot find the commit of model")
def test_a_model_that_the_hub_does_not_know(repository, assets_dir, monkeypatch):
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    online(monkeypatch, RepositoryNotFoundError("404 Client Error\n\nRepository Not Found.", response=response))
    with pytest.raises(OSError, match=r"revision 'main': 404 Client Error Repository Not Found\. Check model\.path"):
        ModelSpec("a/b").commit(assets_dir)


def test_a_path_that_is_no_hub_id(assets_dir):
    with pytest.raises(OSError, match=r"Cannot find the commit of model 'a/b/c'.*\. Check model\.path"):
        ModelSpec("a/b/c").load_config(assets_dir)


def test_an_error_is_not_remembered(cache, assets_dir, request):
    with pytest.raises(OSError, match="Cannot find the commit"):
        ModelSpec("a/b").commit(assets_dir)
    repository = request.getfixturevalue("repository")
    move(repository, "main", NEW)
    assert ModelSpec("a/b").commit(assets_dir) == NEW


@pytest.mark.bad_input("Checkpoints", "a Hub id with a typo", "error: Cannot find the commit (did you mean …?)")
def test_the_nearest_model_of_the_cache_is_named(repository, assets_dir):
    with pytest.raises(
        OSError, match=r"the commit of model 'a/bb' \(did you mean 'a/b'\?\), revision 'main': .*\. Check"
    ):
        ModelSpec("a/bb").load_config(assets_dir)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (
            "https://huggingface.co/a/b",
            r"'https://huggingface\.co/a/b' \(an address; its id is the part behind the host",
        ),
        ("tests/no-such-model", r"'tests/no-such-model' \(no folder of that name in .*tests either\), revision"),
    ],
)
@pytest.mark.bad_input("Checkpoints", "model.path={path}")
def test_what_is_no_hub_id_is_explained(assets_dir, path, match):
    with pytest.raises(OSError, match=match):
        ModelSpec(path).load_config(assets_dir)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["README.md", "model.Q4_K_M.gguf"], r"GGUF weights, .*\(model\.Q4_K_M\.gguf\)\. Use the safetensors"),
        (["config.json", "pytorch_model.bin"], r"only pickle files \(pytorch_model\.bin\)\. Pickle files"),
        (["adapter_config.json", "adapter_model.safetensors"], r"an adapter alone .*\. Merge the adapter"),
        (["config.json", "original/config.json", "README.md"], r"models in folders of its own \(original\)\. Use one"),
    ],
)
@pytest.mark.bad_input("Checkpoints", "a Hub repository with {names}")
def test_a_repository_without_a_whole_model(cache, assets_dir, monkeypatch, names, match):
    online(monkeypatch, f"{len(match):040x}")
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, path, revision: names)
    with pytest.raises(AssetError, match=rf"No model in a/b: it holds {match}"):
        ModelSpec("a/b").load_config(assets_dir)


def test_without_the_list_of_files_the_cache_is_judged(repository, assets_dir, monkeypatch):
    online(monkeypatch, OLD)
    (repository / "snapshots" / OLD / "model.safetensors").unlink()

    def fail(self, path, revision):
        raise HTTPError("no route")

    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    assert ModelSpec("a/b").load_config(assets_dir).num_hidden_layers == 2


def test_a_cached_model_is_judged_without_the_hub(repository, assets_dir, monkeypatch):
    online(monkeypatch, OLD)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    config = repository / "snapshots" / OLD / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert ModelSpec("a/b").load_config(assets_dir).tie_word_embeddings is False


@pytest.mark.bad_input("Checkpoints", "an adapter on the Hub", "error: No model in a/b: it holds an adapter alone")
def test_an_adapter_without_its_base_model_is_refused(repository, assets_dir):
    snapshot = repository / "snapshots" / OLD
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).unlink()
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(
        AssetError, match=r"No model in a/b: it holds an adapter alone.*Merge the adapter into its base"
    ):
        ModelSpec("a/b").load_config(assets_dir)


def test_an_adapter_beside_whole_weights_is_ignored_with_a_warning(repository, assets_dir, tiny_llama, caplog):
    (repository / "snapshots" / OLD / "adapter_config.json").write_text("{}")
    assert torch.equal(weight(ModelSpec("a/b").load(assets_dir)), weight(tiny_llama(num_hidden_layers=2)))
    assert "a/b holds the weights of a whole model and an adapter beside them" in caplog.text


def test_the_tied_flag_is_corrected_on_a_first_download(repository, assets_dir, monkeypatch, tiny_llama):
    config = repository / "snapshots" / OLD / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    monkeypatch.setattr("gradpruner.models.spec.local_snapshot", lambda path, commit: None)
    model = ModelSpec("a/b").load(assets_dir)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(weight(model), weight(tiny_llama(num_hidden_layers=2)))


def test_weights_that_do_not_fit_are_refused(repository, assets_dir):
    tensors = load_file(repository / "snapshots" / OLD / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, repository / "snapshots" / OLD / "model.safetensors", metadata={"format": "pt"})
    message = r"The weights in a/b do not fit .* lack 1 tensor \(model\.norm\.weight\); .* shapes in 1 tensor \(lm"
    with pytest.raises(ValueError, match=message):
        ModelSpec("a/b").load(assets_dir)
