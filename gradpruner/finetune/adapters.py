"""The LoRA adapters of a fine-tune."""

from pathlib import Path

from peft import LoraConfig
from transformers import PreTrainedModel

from gradpruner.finetune.spec import TrainingSpec
from gradpruner.models.architectures import lora_targets


def lora_config(model: PreTrainedModel, spec: TrainingSpec, resume_from: str | None) -> LoraConfig:
    """Returns adapters for all linear sublayers; on resuming with saved ranks, which a `PruningCallback` may change."""
    patterns = ("rank_pattern", "alpha_pattern")
    has_saved = resume_from is not None and (Path(resume_from) / "adapter_config.json").is_file()  # shards have none
    saved = LoraConfig.from_pretrained(resume_from) if has_saved else None
    return LoraConfig(
        **{name: getattr(saved, name) for name in patterns if saved is not None},
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=lora_targets(model),
        task_type="CAUSAL_LM",
    )
