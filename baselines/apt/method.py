"""APT, adaptive pruning and tuning: prune while LoRA trains, and grow the adapters that matter (Zhao et al., 2024).

The fine-tune starts from the dense model. After a warm-up, KV groups, MLP channels and channels of the residual stream
are pruned in several cuts on a cubic schedule, by running scores of the training's own passes (`scores`). Between two
cuts, the masks of the units to prune next move to 0 step by step (`hooks`). At a cut the masks are set to 0, weights
and adapters are sliced, and the more salient half of the adapters gets higher ranks (`adapters`). The model before the
first cut teaches the pruned model for a while (`distill`). arXiv:2401.12200.

Deviations from the code (ROIM1998/APT), besides those of `scores` and `distill`: schedules are fractions of the
training steps, in the proportions of the code's LLaMA script; adapters are on all linear sublayers, as for every method
here, where the script has them on q and v; weights are sliced at every cut, where the code slices after distillation;
masks move in every step after the warm-up, where the code moves them in the last 200 steps before a cut; RMSNorm under
masks is that of the sliced model; the final model is that of the last step, not of the best evaluation.

In a short run, 1 % of the steps hardly tunes the model, which is then a poor teacher: raise `prune_start`.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainerCallback

from baselines.apt.settings import AptSettings
from baselines.apt.training import AptTraining


@dataclass(frozen=True)
class Apt(AptSettings):
    """APT, which prunes only while `finetune` (or the runner) trains; `compress` alone changes nothing."""

    name: ClassVar[str] = "apt"

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callback that prunes, grows adapters and distils."""
        return [AptTraining(self)]
