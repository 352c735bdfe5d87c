"""Save a LoRA adapter in a folder inside the checkpoint of the pruned model that it belongs to.

Inside rather than beside the weights: next to `config.json`, plain transformers would apply the adapter only if peft is
installed, and vLLM would take it for weights of the model.
"""

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from gradpruner.checkpoints.probe import PROBE_FILE, make_probe
from gradpruner.files import write_json

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG_FILE = "adapter_config.json"


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: Path) -> None:
    """Writes the adapter and the probe of the adapted model to `folder`; the model is unchanged.

    peft itself names the dense model as the base: its layers are others, so that the adapter would load onto wrong ones
    without an error. It looks for a relative base in the working directory and not beside the adapter, so the base is
    an absolute path: peft finds it from everywhere until the checkpoint is moved, and then says that it is not there.

    Args:
        model: pruned model with adapter.
        tokenizer: for the probe.
        folder: where to write.
        base: folder in which the pruned model will be.

    Raises:
        ValueError: if the model answers with NaN or infinity.
    """
    probe = make_probe(model, tokenizer)
    model.save_pretrained(folder)
    file = folder / ADAPTER_CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, config | {"base_model_name_or_path": str(base.absolute()), "revision": None})
    write_json(folder / PROBE_FILE, probe)
