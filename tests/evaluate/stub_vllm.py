"""Stands in for the package vllm in the worker's environment; `test_vllm_engine.py` copies it there.

The variable STUB_VLLM says how it behaves. What it is asked goes into the file of the variable STUB_VLLM_LOG.
"""

import json
import os
import signal
import subprocess
import sys
import time

HOW = os.environ.get("STUB_VLLM", "canned")


def log(**what):
    if file := os.environ.get("STUB_VLLM_LOG"):
        with open(file, "a") as stream:
            stream.write(json.dumps(what) + "\n")


class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings
        log(sampling=settings)


class Output:
    def __init__(self, token_ids):
        self.token_ids = token_ids
        self.outputs = [self]


class LLM:
    def __init__(self, model, **settings):
        log(model=model, path=sys.path, **settings)
        if sockets := os.environ.get("VLLM_RPC_BASE_PATH"):
            log(sockets=sockets)
            with open(os.path.join(sockets, "socket"), "w"):
                pass
        print("stub: this line must not be taken for an answer", flush=True)
        subprocess.run([sys.executable, "-c", "print('nor one of a child process', flush=True)"], check=True)
        if HOW == "no-load":
            print("RuntimeError: Unsupported attention, head size 16", file=sys.stderr)
            for number in range(40):
                print(f"shutting down {number}", file=sys.stderr)
            raise ValueError("the engine is dead")
        if HOW in ("hang", "hang-early"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            log(pids=[os.getpid(), child.pid])
        if HOW == "hang-early":
            time.sleep(600)
        if HOW == "model":
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=settings["dtype"]).eval()

    def generate(self, prompts, params, use_tqdm):
        log(batch=len(prompts))
        if HOW == "killed-later" and os.path.exists(f"{os.environ['STUB_VLLM_LOG']}.answered"):
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{os.environ['STUB_VLLM_LOG']}.answered", "w"):
            pass
        if HOW == "hang":
            time.sleep(600)
        return [Output(self.answer(prompt["prompt_token_ids"], **params.settings)) for prompt in prompts]

    def answer(self, prompt, max_tokens, stop_token_ids, temperature, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0, True, False)
        new = []
        while len(new) < max_tokens and not (new and new[-1] in stop_token_ids):
            new.append(self.next_token([*prompt, *new]))
        return new

    def next_token(self, ids):
        if HOW != "model":
            return 2 + sum(ids) % 200
        import torch

        with torch.no_grad():
            return int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
