"""Waits are named after two seconds, and nothing waits long for a Hub that cannot be reached."""

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import close_session, constants

from gradpruner import waiting
from gradpruner.evaluate.encoders import TextEncoder
from gradpruner.lease import own_host
from gradpruner.models import assets, hub, spec
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.cache import StageCache
from gradpruner.tasks.sources import read_hub
from gradpruner.waiting import locked, say_if_waiting

FAST_SECONDS = 8.0  # with a wide margin for a busy machine; the Hub's client alone would take 23 s


def tried(given, gets=None):
    return pytest.mark.bad_input("Waiting", given, gets) if gets else pytest.mark.bad_input("Waiting", given)


@pytest.fixture
def soon(monkeypatch, caplog):
    """Shortens the silent time to 0.05 s."""
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.05)
    caplog.set_level(logging.INFO)


def until_said(caplog):
    """Waits until something is said about a wait."""
    deadline = time.monotonic() + 30
    while "Waiting for" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)


# ---- what is said ----


@tried("anything that takes more than 2 s", "is named, with its time limit, and how long it took")
@pytest.mark.parametrize(("limit", "shown"), [(None, "no time limit"), (10.0, "10 s at most")])
def test_a_long_wait_is_named_while_it_lasts(soon, caplog, limit, shown):
    with say_if_waiting("the moon", limit):
        until_said(caplog)
        assert f"Waiting for the moon ({shown})" in caplog.text and "Waited" not in caplog.text
    assert "Waited 0 s for the moon" in caplog.text


@tried("a wait that ends with an error", "is named, and so is the error")
def test_a_failed_wait(soon, caplog):
    with pytest.raises(ZeroDivisionError), say_if_waiting("the moon"):
        until_said(caplog)
        raise ZeroDivisionError
    assert "Waited 0 s for the moon" in caplog.text


def test_a_short_wait_is_not_named(caplog):
    caplog.set_level(logging.INFO)
    threads = threading.active_count()
    with say_if_waiting("the moon"):
        pass
    assert caplog.text == "" and waiting.SILENT_SECONDS == 2.0
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


@tried("a cache in which another process computes the same stage", "is waited for, and named")
def test_a_stage_that_another_process_computes(soon, caplog, tmp_path):
    cache, key = StageCache(tmp_path), {"seed": 0}
    holding, release = threading.Event(), threading.Event()

    def hold():
        with locked(f"{cache.path('prune', key)}.lock", "computes"):
            holding.set()
            release.wait(60)

    cache.path("prune", key).parent.mkdir()
    other = threading.Thread(target=hold)
    other.start()
    holding.wait(60)
    threading.Thread(target=lambda: (until_said(caplog), release.set())).start()
    entry = cache.get("prune", key, lambda folder: (folder / "x").write_text("x"))
    other.join()
    assert (entry / "x").is_file()
    lock = f"{cache.path('prune', key)}.lock"
    holder = f"process {os.getpid()} on {own_host()}"
    assert f"that computes the stage prune in this cache; {holder} holds {lock} (no time limit)" in caplog.text


@tried("a model that is converted on first use", "the conversion is named")
def test_a_first_conversion(soon, caplog, tmp_path, monkeypatch):
    def convert(gguf, folder):
        until_said(caplog)
        folder.mkdir()

    monkeypatch.setattr(assets, "find_wheel", lambda *args: tmp_path)
    monkeypatch.setattr(assets, "_convert_gguf", convert)
    folder = assets.resolve("packaged:smollm2-135m", tmp_path / "assets")
    assert f"Waiting for the model smollm2-135m to be converted or made, once, in {tmp_path}/assets" in caplog.text
    caplog.clear()
    assert assets.resolve("packaged:smollm2-135m", tmp_path / "assets") == folder and caplog.text == ""


@tried("weights that take long to read or download", "are named")
def test_slow_weights(soon, caplog, tiny_spec, assets_dir, monkeypatch):
    tiny_spec.load(assets_dir)  # makes the model, which may be said to take long as well
    caplog.clear()
    read = spec.AutoModelForCausalLM.from_pretrained

    def slow(*args, **kwargs):
        until_said(caplog)
        return read(*args, **kwargs)

    monkeypatch.setattr(spec.AutoModelForCausalLM, "from_pretrained", slow)
    tiny_spec.load(assets_dir)
    assert "Waiting for the weights of random:llama (no time limit)" in caplog.text


# ---- the Hub ----


@contextmanager
def answering(status):
    """Yields the address of a server that gives every request this status, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def network(tmp_path, monkeypatch):
    """Returns `network(address)`, which sets the Hub's address; nothing of it is in a cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    functions = (hub.resolve_commit, hub.use_cache_without_hub)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def clear():
        close_session()
        for function in functions:
            function.cache_clear()

    def set_address(address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        clear()

    yield set_address
    clear()


NOWHERE = "http://localhost:9"  # nothing listens there


@pytest.mark.parametrize(("use", "match"), [
    pytest.param(lambda folder: ModelSpec("a/b").load_config(folder),
                 r"Cannot find the commit of model 'a/b', revision 'main': http://localhost:9 cannot be reached \(Con",
                 marks=tried("a Hub model without network")),
    pytest.param(lambda folder: ModelSpec("a/b", revision="c" * 40).load_tokenizer(folder),
                 r"Cannot find the commit of model 'a/b', revision 'c{40}': http://localhost:9 cannot be reached",
                 marks=tried("a commit of a Hub model without network",
                             "error: … cannot be reached, and the cache … does not have it")),
    pytest.param(lambda folder: list(read_hub("a/b", None, "train", None)), r"The Hugging Face Hub cannot be reached, "
                 r"asked for a/b .* No network: ConnectError: .*\. HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy\.",
                 marks=tried("a Hub dataset without network",
                             "error: The Hugging Face Hub cannot be reached … HF_ENDPOINT names a mirror")),
    pytest.param(lambda folder: TextEncoder("a/b", 3).folder(), r"The encoder of BERTScore cannot be had, got .*"
                 r"\.bertscore_model='a/b' and ConnectionError: http://localhost:9 cannot be reached .*\. Give",
                 marks=tried("a Hub encoder without network", "error: The encoder of BERTScore cannot be had")),
])  # fmt: skip
def test_without_network_the_error_comes_at_once(network, tmp_path, use, match):
    network(NOWHERE)
    start = time.monotonic()
    with pytest.raises((OSError, ValueError), match=match):
        use(tmp_path)
    assert time.monotonic() - start < FAST_SECONDS


@tried("no network, and files in the local cache", "the cache is used, without retries; warning")
def test_without_network_the_cache_is_used(network, tmp_path, tiny_llama, tiny_tokenizer, caplog):
    network(NOWHERE)
    snapshot = tmp_path / "hub/models--a--b/snapshots" / ("c" * 40)
    tiny_llama(num_hidden_layers=2).save_pretrained(snapshot)
    tiny_tokenizer.save_pretrained(snapshot)
    (tmp_path / "hub/models--a--b/refs").mkdir()
    (tmp_path / "hub/models--a--b/refs/main").write_text("c" * 40)
    start, model = time.monotonic(), ModelSpec("a/b")
    assert model.load_config(tmp_path).num_hidden_layers == 2
    assert model.load_tokenizer(tmp_path) and model.load(tmp_path)
    assert time.monotonic() - start < FAST_SECONDS
    assert caplog.text.count("this process reads the local cache alone, as with HF_HUB_OFFLINE=1") == 1


@pytest.mark.parametrize("status", [
    pytest.param(200, marks=tried("a mirror in HF_ENDPOINT that answers 200", "counts as reachable")),
    pytest.param(403, marks=tried("a mirror in HF_ENDPOINT that refuses its front page", "counts as reachable")),
    pytest.param(502, marks=tried("a mirror in HF_ENDPOINT that has a fault", "counts as reachable, and is retried")),
])  # fmt: skip
def test_any_answer_of_a_mirror_counts(network, status):
    with answering(status) as (address, asked):
        network(address)
        assert hub.use_cache_without_hub() is None and hub.use_cache_without_hub() is None
        assert len(asked) == 1 and not constants.HF_HUB_OFFLINE


@tried("a proxy in HTTP_PROXY", "is asked instead of the Hub")
def test_a_proxy_is_used(network, monkeypatch):
    with answering(200) as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        network("http://hub.invalid")
        assert hub.unreachable_reason() is None and asked == ["http://hub.invalid/"]


@tried("a proxy that cannot be reached", "the error comes at once")
def test_a_dead_proxy(network, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)
    network("http://hub.invalid")
    assert hub.unreachable_reason().startswith("ConnectError: ")


@tried("a Hub that accepts a connection and says nothing", "is named after 2 s, for 10 s at most; counts as reachable")
def test_a_slow_hub_is_not_given_up(network, monkeypatch, soon, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        network(address)
        monkeypatch.setattr(hub, "REACH_SECONDS", 0.5)
        assert hub.unreachable_reason() is None
    assert f"Waiting for an answer of {address} (0.5 s at most)" in caplog.text


@tried("`HF_HUB_OFFLINE=1`", "nobody is asked")
def test_offline_mode_asks_nobody(network, monkeypatch):
    with answering(200) as (address, asked):
        network(address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert hub.unreachable_reason() == "HF_HUB_OFFLINE is set" and not asked
