"""APT's teacher: a state of the model in training, with a copy of its adapters.

The teacher's frozen weights are the model's own tensors at the time when it becomes the teacher; only adapters are
copied. Later cuts give the student sliced copies of frozen weights, so memory holds both until the teacher is replaced
or discarded.
"""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from baselines.apt.adapters import ADAPTER, without_adapters
from baselines.apt.scores import Units, width_plan
from gradpruner.encoding import Batch
from gradpruner.files import content_hash
from gradpruner.surgery import sharing_copy
from gradpruner.width_surgery import narrow

PREFIX, LORA_A = "base_model.model.", ".lora_A."  # in peft's names of adapter weights
SAVED, SAVED_KEPT = "teacher.", "teacher_kept."  # prefixes of tensors in a checkpoint


@dataclass(frozen=True)
class Teacher:
    """A frozen earlier state of the model.

    Attributes:
        model: base model with frozen adapters.
        adapter_state: weights of the adapters, by peft's names.
        kept: units of the dense model that it has, bool.
    """

    model: PreTrainedModel
    adapter_state: dict[str, Tensor]
    kept: Units

    @classmethod
    def of(cls, student: PeftModel, kept: Units) -> Self:
        """Makes the teacher from the student as it is now, which must not have hooks: a copy would hold them, too."""
        with without_adapters(student) as plain:
            model = sharing_copy(plain)
        del model.peft_config  # peft's note on the model that was copied
        state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(student).items()}
        return cls(make_teacher(model, student.peft_config[ADAPTER], state), state, kept.combine(torch.clone))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], dense: PreTrainedModel, rep: int, config: LoraConfig) -> Self:
        """Makes the teacher of a resumed run, by pruning the dense model as the teacher was pruned.

        Args:
            tensors: what `tensors` returned, among others.
            dense: the dense model; changed in place.
            rep: query heads per KV group.
            config: config of the student's adapters.
        """
        kept = Units.from_tensors(tensors, SAVED_KEPT)
        state = {name.removeprefix(SAVED): value for name, value in tensors.items() if name.startswith(SAVED)}
        width = width_plan(kept, rep, kept.combine(torch.ones_like))
        if width is not None:
            narrow(dense, width)
        return cls(make_teacher(dense, config, state), state, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Returns what `restored` needs, for saving."""
        return {f"{SAVED}{name}": value for name, value in self.adapter_state.items()} | self.kept.tensors(SAVED_KEPT)


def make_teacher(model: PreTrainedModel, config: LoraConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Returns a model with frozen adapters.

    Args:
        model: the teacher without adapters; they are added in place.
        config: config of the adapters; their ranks are those of `state`.
        state: weights of the adapters, as peft's `get_peft_model_state_dict` returns them.
    """
    config = copy.deepcopy(config)
    ranks = {name.split(LORA_A)[0].removeprefix(PREFIX): len(a) for name, a in state.items() if LORA_A in name}
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: config.lora_alpha * rank / config.r for name, rank in config.rank_pattern.items()}
    with torch.random.fork_rng():  # peft draws the initial weights of adapters
        teacher = get_peft_model(model, config)
    set_peft_model_state_dict(teacher, dict(state))
    base: PreTrainedModel = teacher.get_base_model()
    return base.requires_grad_(False).eval()


def evaluation_batches(loader: DataLoader[Any], num_rows: int, batch_size: int, seed: int) -> list[Batch]:
    """Returns batches of a seeded draw of training rows, on which states of the model are evaluated.

    Args:
        loader: the Trainer's loader of training rows.
        num_rows: rows to draw, at most all.
        batch_size: rows per batch.
        seed: seed of the draw.
    """
    rows: Any = loader.dataset
    count = min(num_rows, len(rows))
    chosen = random.Random(content_hash([seed, "evaluation"])).sample(range(len(rows)), count)
    batches = (chosen[first : first + batch_size] for first in range(0, count, batch_size))
    return [loader.collate_fn([rows[index] for index in batch]) for batch in batches]
