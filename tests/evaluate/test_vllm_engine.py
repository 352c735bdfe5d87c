"""vLLM as an engine, with a stub in its place; all else is what runs. `make test-vllm` tries the real one.

The worker runs with this test's Python, and finds the stub through PYTHONPATH.
"""

import ast
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_model import CONFIG
from tiny_model import EXAMPLES as GENERATED

from baselines.apt import Apt
from baselines.llm_pruner import LlmPruner
from gradpruner.encoding import Encoder
from gradpruner.evaluate import vllm_engine, vllm_worker
from gradpruner.evaluate.base import JOURNAL_FILE, PREDICTIONS_FILE, predict_all
from gradpruner.evaluate.generate import Generation
from gradpruner.evaluate.vllm_engine import WORK_FOLDER, generate_with_vllm
from gradpruner.evaluate.vllm_python import find_vllm
from gradpruner.files import read_jsonl
from gradpruner.finetune.spec import TrainingSpec
from gradpruner.grad_pruner import GradPruner
from gradpruner.models.spec import ModelSpec
from gradpruner.pipeline.vllm_checks import check_vllm
from gradpruner.tasks import Example, JsonLines

STUB = Path(__file__).with_name("stub_vllm.py")
AREA = "Paths and overrides"
# vLLM refuses an empty prompt.
EXAMPLES = [*GENERATED[:-1], Example("e", "Well", " from nothing", (" from nothing", " z"), 0, " ")]
TASK = JsonLines(train_file="a", test_file="b", prompt="{q}", answer_field="a", max_new_tokens=10)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Installs the stub for workers; returns a function that says how it behaves, and one that reads what it logged."""
    folder, log = tmp_path / "site", tmp_path / "stub.log"
    (folder / "vllm").mkdir(parents=True)
    shutil.copyfile(STUB, folder / "vllm" / "__init__.py")
    install(folder, "9.9.9")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("STUB_VLLM_LOG", str(log))
    find_vllm.cache_clear()

    def behave(how):
        monkeypatch.setenv("STUB_VLLM", how)

    behave.log = lambda key: [row[key] for row in read_jsonl(log) if key in row]
    behave.folder = folder
    yield behave
    find_vllm.cache_clear()


def install(folder, version):
    info = folder / "vllm_stub-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-stub\nVersion: {version}\n")
    (info / "top_level.txt").write_text("vllm\n")


@pytest.fixture
def model_and_tokenizer(tmp_path):
    spec = ModelSpec("random:llama", config=CONFIG)
    return spec.load(tmp_path / "assets"), spec.load_tokenizer(tmp_path / "assets")


def make(engine="vllm", **changes):
    values = {"batch_size": 2, "engine": engine, "vllm_python": sys.executable, **changes}
    task = dataclasses.replace(TASK, metrics=("accuracy",))
    return Generation(**values).resolve(task, EXAMPLES)


@pytest.fixture
def answer(model_and_tokenizer, tmp_path):
    """Returns a function that answers `EXAMPLES` in a folder and returns the predictions."""
    model, tokenizer = model_and_tokenizer
    encoder = Encoder(tokenizer, 512)

    def answer(folder="answers", load_model=lambda: model, **changes):
        evaluation = make(**changes)
        (tmp_path / folder).mkdir(exist_ok=True)
        questions = evaluation.questions(EXAMPLES, encoder)
        how = generate_with_vllm if evaluation.engine == "vllm" else predict_all
        return read_jsonl(how(load_model, evaluation, encoder, questions, tmp_path / folder))

    return answer


def test_the_predictions_are_those_of_transformers(stub, answer, tmp_path):
    stub("model")
    rows = answer()
    assert rows == answer("transformers", engine="transformers")
    assert {row["is_finished"] for row in rows} and any(row["generated"] for row in rows)
    assert [path.name for path in (tmp_path / "answers").iterdir()] == [PREDICTIONS_FILE]
    assert stub.log("batch") == [2, 2, 1]
    [sockets] = stub.log("sockets")  # which vLLM leaves behind
    assert not Path(sockets).exists()


def test_an_answer_ends_at_what_the_model_and_the_fine_tune_take_for_an_end(stub, model_and_tokenizer, answer):
    stub("model")
    model, tokenizer = model_and_tokenizer
    prompt = tokenizer(EXAMPLES[3].prompt).input_ids
    with torch.no_grad():
        token = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [1, token]
    rows = answer()
    assert rows == answer("transformers", engine="transformers")
    assert rows[3]["is_finished"] and rows[3]["generated_tokens"] == 0
    assert stub.log("sampling")[-1]["stop_token_ids"] == sorted({1, token})


def test_what_vllm_is_asked_for(stub, answer):
    answer(batch_size=3)
    [model] = stub.log("model")
    settings = {key: stub.log(key)[0] for key in ("dtype", "max_model_len", "max_num_seqs", "enable_prefix_caching")}
    longest = max(len(example.prompt) for example in EXAMPLES)
    assert settings == {
        "dtype": "float32",
        "max_model_len": longest + TASK.max_new_tokens,
        "max_num_seqs": 3,
        "enable_prefix_caching": False,
    }
    assert Path(model).name == "checkpoint" and not Path(model).exists()
    assert str(STUB.parents[2] / "gradpruner" / "evaluate") not in stub.log("path")[0]


def test_a_dtype_can_be_chosen(stub, answer):
    answer(vllm_dtype="bfloat16")
    assert stub.log("dtype") == ["bfloat16"]


def test_a_worker_that_is_killed_ends_in_an_error_and_the_next_one_goes_on(stub, answer, tmp_path):
    expected = answer("whole")
    stub("killed-later")
    Path(f"{os.environ['STUB_VLLM_LOG']}.answered").unlink()
    with pytest.raises(
        ChildProcessError, match=r"could not answer.*ended \(was killed, as the system does when memory"
    ):
        answer()
    assert len(read_jsonl(tmp_path / "answers" / JOURNAL_FILE)) == 2
    stub("canned")
    before = len(stub.log("batch"))
    rows = answer(load_model=lambda: pytest.fail("the model was loaded again"))
    assert rows == expected and stub.log("batch")[before:] == [2, 1]
    assert not (tmp_path / "answers" / WORK_FOLDER).exists()


@pytest.mark.bad_input(AREA, "a model that vLLM cannot load", "error: vLLM could not answer, and its own errors")
def test_a_failure_says_what_vllm_said(stub, answer, tmp_path):
    stub("no-load")
    with pytest.raises(ChildProcessError) as caught:
        answer()
    message = str(caught.value)
    assert message.startswith(
        "vLLM could not answer the questions, got a worker that ended (status 1): RuntimeError: Unsupported attention, "
        "head size 16; ValueError: the engine is dead. Correct that and run the same command again"
    )
    assert "set evaluation.engine=transformers. The end of" in message
    assert str(tmp_path / "answers" / WORK_FOLDER / vllm_engine.LOG_FILE) in message
    assert message.endswith("ValueError: the engine is dead") and "shutting down 39" in message
    assert "shutting down 1\n" not in message


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("moment", ["pids", "batch"])
def test_ctrl_c_ends_the_worker_and_its_processes(stub, answer, moment):
    """While vLLM loads the model, and while it answers."""
    stub("hang" if moment == "batch" else "hang-early")

    def interrupt():
        wait_for(lambda: Path(os.environ["STUB_VLLM_LOG"]).exists() and stub.log(moment), 300)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            answer()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    [pids] = stub.log("pids")
    assert len(pids) == 2 and not any(map(alive, pids))


def test_a_worker_without_anybody_to_answer_ends(stub, tmp_path):
    """As after kill -9 of the run: its end of the pipe is closed."""
    stub("hang")
    job = {
        "dtype": "float32",
        "max_length": 9,
        "batch_size": 1,
        "enforce_eager": True,
        "max_new_tokens": 3,
        "ends": [1],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, vllm_worker.__file__, str(tmp_path / "job.json")]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert json.loads(worker.stdout.readline()) == vllm_worker.READY
    worker.stdin.write(b"[[5, 6]]\n")
    worker.stdin.close()
    [pids] = stub.log("pids")
    wait_for(lambda: worker.poll() is not None and not any(map(alive, pids)))
    worker.stdout.close()


def test_the_worker_imports_nothing_of_this_project():
    tree = ast.parse(Path(vllm_worker.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) == {"vllm"}


def test_versions_are_those_of_the_environment(stub):
    versions = find_vllm(sys.executable)
    assert versions.startswith(f"vllm-stub 9.9.9, torch {torch.__version__.partition('+')[0]}")


def not_a_python(tmp_path):
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\necho nothing useful\necho something wrong >&2\n")
    file.chmod(0o755)
    return str(file)


NEEDS = r"evaluation\.vllm_python must be the Python of an environment with vLLM, got .*, which "


@pytest.mark.parametrize(
    ("python", "match"),
    [
        pytest.param(given, match, marks=pytest.mark.bad_input(AREA, f"evaluation.engine=vllm and {what}", gets))
        for given, match, what, gets in [
            (
                lambda _: None,
                r"evaluation\.engine=vllm needs the Python .*, got evaluation\.vllm_python=None\. Run `make vllm`",
                "no vllm_python",
                "error: needs the Python of an environment with vLLM",
            ),
            (
                lambda folder: str(folder / "none"),
                rf"{NEEDS}cannot be run \(No such file or directory\)\. Run `make vllm`",
                "a vllm_python that does not exist",
                "error: cannot be run (No such file or directory)",
            ),
            (
                str,
                rf"{NEEDS}cannot be run \(Permission denied\)\. Run",
                "a folder as vllm_python",
                "error: cannot be run (Permission denied)",
            ),
            (
                not_a_python,
                rf"{NEEDS}is none, or older than 3\.10 \(something wrong\)\. Run",
                "a vllm_python that is no Python",
                "error: is none, or older than 3.10",
            ),
            (
                lambda _: sys.executable,
                rf"{NEEDS}has none\. Run `make vllm` and set evaluation\.vllm_python=.*or set evaluation\.engine=",
                "an environment without vLLM",
                "error: has none",
            ),
        ]
    ],
)
def test_an_environment_without_vllm_is_refused(tmp_path, python, match):
    find_vllm.cache_clear()
    with pytest.raises(ValueError, match=match):
        make(vllm_python=python(tmp_path))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"engine": "vlm"},
            r"engine must be one of transformers, vllm, got 'vlm' \(did you mean 'vllm'\?\)\. Change ev",
        ),
        ({"vllm_dtype": "fp16"}, r"vllm_dtype must be one of auto, .*, got 'fp16'.* Change evaluation\.vllm_dtype\."),
    ],
)
def test_values_that_cannot_work_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        Generation(**values)


# ---- in a run ----

METHOD = GradPruner(sparsity=0.5, merge_count=0, steps=2, batch_size=2)
TRAINING = TrainingSpec(learning_rate=1e-2, batch_size=4, micro_batch_size=2, epochs=1)
WIDE = {**CONFIG, "num_hidden_layers": 4, "max_position_embeddings": 128}


@pytest.fixture
def run(make_pipeline, make_sums_task):
    task = dataclasses.replace(make_sums_task(8), max_new_tokens=6)

    def run(method=METHOD, training=TRAINING, engine="vllm", **changes):
        evaluation = Generation(batch_size=4, engine=engine, vllm_python=sys.executable, **changes)
        return make_pipeline(WIDE, method, training, evaluation=evaluation, task=task)

    return run


def test_a_run_says_the_same_with_either_engine_and_names_vllm(stub, run):
    stub("model")
    outcome, plain = run().run(), run(engine="transformers").run()
    named = {"engine": "vllm", "engine_versions": find_vllm(sys.executable), "engine_dtype": "float32"}
    assert "engine" not in plain.metrics
    assert outcome.metrics == pytest.approx(plain.metrics | named)
    assert [row["generated"] for row in read_jsonl(outcome.predictions)] == [
        row["generated"] for row in read_jsonl(plain.predictions)
    ]


def test_engine_version_and_dtype_are_in_the_key(stub, run):
    def key(**changes):
        return run(**changes).stage_ids()["predict"]

    own = key()
    assert own == key() and len({own, key(engine="transformers"), key(vllm_dtype="bfloat16")}) == 3
    install(stub.folder, "9.9.10")
    find_vllm.cache_clear()
    assert key() != own


def refused(what, gets, match, **changes):
    mark = pytest.mark.bad_input(AREA, f"evaluation.engine=vllm and {what}", gets)
    return pytest.param(changes, match, marks=mark, id=what)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        refused(
            "layers that differ in width",
            "error: vLLM … reads no shape.json",
            r"vLLM builds a model from config\.json alone and reads no shape\.json, got layers .*intermediate_size: "
            r".* in .*\. Set evaluation\.engine=transformers, or choose a method that prunes whole layers",
            method=LlmPruner(sparsity=0.3, first_layer=1, end_layer=3),
        ),
        refused(
            "a method that decides widths while it runs",
            "error: vLLM … reads no shape.json",
            r"reads no shape\.json, got method=apt, whose layers differ in width.*Set evaluation\.engine=transformers",
            method=Apt(sparsity=0.3),
        ),
        refused(
            "finetune.merge_adapter=false",
            "error: generates with the merged checkpoint",
            r"generates with the merged checkpoint, got finetune\.merge_adapter=false\. Set finetune\.merge_adapter",
            training=dataclasses.replace(TRAINING, merge_adapter=False),
        ),
        refused(
            "answers beyond the model's positions",
            "error: vLLM needs a prompt and its answer within the … positions",
            r"within the 128 positions .*, got a prompt of \d+ tokens and evaluation\.max_new_tokens=125\. Lower",
            max_new_tokens=125,
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_a_weight_is_loaded(stub, run, monkeypatch, changes, match):
    monkeypatch.setattr(ModelSpec, "load", lambda *args: pytest.fail("a weight was loaded"))
    with pytest.raises(ValueError, match=match):
        run(**changes).run()


def test_several_processes_are_refused(stub, run, monkeypatch):
    pipeline = run()
    pipeline.check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"One process starts vLLM .*, got 2 processes from .*Run again with plain python"
    ):
        check_vllm(pipeline)


def test_a_model_whose_layers_differ_in_width_is_refused_by_the_library_too(stub, tiny_llama, answer):
    model = tiny_llama()
    layer = model.model.layers[0].mlp
    layer.down_proj.in_features -= 8
    with pytest.raises(ValueError, match=r"reads no shape\.json, got layers"):
        answer(load_model=lambda: model)
