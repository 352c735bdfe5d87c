"""Names for readers: settings, datasets and kinds of fine-tuning in words instead of config keys."""

import re
from typing import Any

MODES = {"lora": "LoRA", "full": "full fine-tuning"}
DATASETS = {  # the paper's, in its order
    "pubmedqa": "PubMedQA",
    "medmcqa": "MedMCQA",
    "billsum": "BillSum",
    "fingpt": "FinGPT",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-Easy",
    "piqa": "PIQA",
}
MORE_DATASETS = {"alpaca": "Alpaca", "mmlu_clinical_knowledge": "MMLU clinical knowledge"}  # not in the paper
# Settings that hold a path, a class or a prompt: a title says that they differ, and never shows them.
UNSHOWN = {
    "_target_": "kind",
    "path": "source",
    "revision": "revision",
    "prompt": "prompt",
    "prompt_with_options": "prompt",
    "choice": "answer format",
    "train_file": "training file",
    "test_file": "test file",
    "bertscore_model": "encoder",
}
WORDS = {
    "max_train_samples": "{} training rows",
    "max_test_samples": "{} test rows",
    "train_fraction": "{:.0%} of the training rows",
    "validation_fraction": "validation rows ({:.0%} of training)",
    "epochs": "{} epochs",
    "max_steps": "at most {} steps",
    "steps": "{} importance steps",
    "fraction": "importance from {:.1%} of the steps",
    "sparsity": "{:.0%} of layers pruned",
    "omission_rate": "{:.0%} of layers pruned",
    "num_pruned_layers": "{} layers pruned",
    "num_hidden_layers": "{} layers",
    "merge_count": "{} merged",
    "density": "merge density {:.0%}",
    "repair_rows": "{} repair rows",
    "batch_size": "batch {}",
    "accumulation": "{} batches per step",
    "mode": "{}",
    "adapter": "{} adapter",
    "gradient_estimate": "{} gradients",
    "step_weighting": "{} weighting",
    "test": "tested on {}",
    "recover_on": "recovery on {}",
    "learning_rate": "learning rate {}",
    "min_lr_ratio": "learning rate falls to {:.0%}",
    "datasets": "on {}",
    "tuned_teacher": "tuned teacher {}",
}
VALUES = {
    "merge_rule": {
        "sign_sum": "same signs summed (Eq. 5)",
        "sign_average": "same signs averaged (Eq. 6)",
        "weighted_average": "averaged regardless of sign",
        "fisher": "Fisher merging",
        "none": "no merging",
    },
    "repair": {"none": "no repair", "judged": "judged repair"},
    "loss": {"answers": "loss on answers", "distill": "distilled"},
    "tune_dense_first": {"True": "dense model tuned first"},
    "adapter": {"lora": "LoRA adapter", "dora": "DoRA adapter", "qlora": "QLoRA adapter"},
    "mode": MODES,
    "test": {name: f"tested on {shown}" for name, shown in DATASETS.items()},
}
SETTING = re.compile(r"\b([a-z_]+)=([^,;/()]+?)(?= on |[,;/()]|$)")


def dataset_title(name: str) -> str:
    """Returns the display name of `tables.dataset_name`: `arc_easy, validation rows` becomes `ARC-Easy, ...`."""
    return re.sub(r"[a-z][a-z0-9_]*", lambda found: (DATASETS | MORE_DATASETS).get(found[0], found[0]), name)


def plain_setting(key: str, value: Any) -> str:
    """Returns a setting in words; of those in `UNSHOWN` only the name, without the value."""
    if key in UNSHOWN:
        return UNSHOWN[key]
    if value is None:
        return f"{key.replace('_', ' ')}: default"
    if shown := VALUES.get(key, {}).get(str(value)):
        return shown
    if isinstance(value, bool):
        return key.replace("_", " ") if value else f"no {key.replace('_', ' ')}"
    if isinstance(value, str):
        value = value.replace("_", " ")
    is_number = isinstance(value, int | float)
    pattern = WORDS.get(key, "{0} {1}")
    if "%" in pattern and not is_number:  # sparsity=auto
        pattern = "{0} {1}"
    if "{0}" in pattern:
        return pattern.format(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value)
    if value == 1:
        pattern = re.sub(r"s$", "", pattern) if key in ("epochs", "steps") else pattern
    shortened = f"{value:.4g}" if isinstance(value, float) and "%" not in pattern else value
    return re.sub(r"(?<=\d)%", " %", pattern.format(shortened))


def plain_label(text: str) -> str:
    """Returns a label with every `key=value` in words, as rows of tables and lines of figures have them."""
    return SETTING.sub(lambda found: plain_setting(found[1], _value(found[2])), text)


def plain_header(text: str) -> str:
    """Returns the header of a column in words; columns of a sweep are named by setting and value, `density 0.2`."""
    key, _, rest = text.partition(" ")
    if key not in WORDS and key not in VALUES:
        return plain_label(text)
    value, *behind = rest.split(" ")
    return " ".join([plain_setting(key, _value(value.rstrip(","))) + "," * value.endswith(","), *behind])


def _value(text: str) -> Any:
    known = {"None": None, "True": True, "False": False}
    if text in known:
        return known[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
