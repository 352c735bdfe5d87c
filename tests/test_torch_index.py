"""Which build of torch `make setup` asks for, with a fake nvidia-smi and a fake index."""

import os
import runpy
import stat
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from experiments.config import CONF

SCRIPT = CONF.parent / "experiments" / "torch_index.py"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
OPTION = "--extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """Returns `choose(page, gpu=None)`: what the index answers (an error: nothing), and what nvidia-smi does."""
    namespace = runpy.run_path(str(SCRIPT))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(namespace["platform"], "system", lambda: "Linux")
    monkeypatch.setitem(namespace["choose"].__globals__, "DRIVER", tmp_path / "no-driver")

    def call(page, gpu=None):
        def urlopen(address, timeout):
            assert address == "https://download.pytorch.org/whl/cpu/torch/"
            if isinstance(page, Exception):
                raise page
            return open(tmp_path / "page.html", "rb")

        (tmp_path / "page.html").write_text("" if isinstance(page, Exception) else page)
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        monkeypatch.setenv("PATH", str(tmp_path))
        if gpu is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\n{gpu}\n")
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        return namespace["choose"]()

    return call


def test_without_a_gpu_it_is_the_cpu_build(choose):
    option, why = choose(f'<a href="torch-2.13.0%2Bcpu-{PYTHON}-{PYTHON}-manylinux_2_28_x86_64.whl">')
    assert option == OPTION and "no NVIDIA GPU" in why


def test_a_gpu_gets_the_build_with_cuda(choose):
    option, why = choose(OSError("not asked"), gpu='echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"')
    assert option == "" and why == "torch: the build with CUDA, for GPU 0: NVIDIA H100"


def test_a_driver_without_a_gpu_is_no_gpu(choose):
    assert choose(f"torch-2.13.0+cpu-{PYTHON}-", gpu="echo 'No devices were found'; exit 6")[0] == OPTION


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (urllib.error.URLError("no route"), r"cannot be reached (<urlopen error no route>)"),
        ("torch-2.13.0%2Bcpu-cp39-cp39-", "has none for this Python"),
        (f"torch-2.12.0%2Bcpu-{PYTHON}-", "has none for this Python"),
    ],
)
def test_what_the_index_lacks_comes_from_the_usual_one(choose, page, why):
    option, said = choose(page)
    assert option == "" and why in said


@pytest.mark.parametrize(
    ("given", "option"), [("https://mirror/cpu", "--extra-index-url https://mirror/cpu"), ("", "")]
)
def test_the_user_decides(choose, monkeypatch, given, option):
    monkeypatch.setenv("TORCH_INDEX", given)
    assert choose(OSError("not asked"))[0] == option


def test_as_make_calls_it():
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT)], env={**os.environ, "TORCH_INDEX": "x"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (
        *(0, "--extra-index-url x", "torch: from x (TORCH_INDEX)"),
    )
