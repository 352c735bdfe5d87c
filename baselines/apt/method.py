"""APT, adaptive pruning and tuning: prune while LoRA trains, and grow the adapters that matter (Zhao et al., 2024).

The fine-tune starts from the dense model. After a warm-up, KV groups, MLP channels and channels of the residual stream
leave in several cuts on a cubic schedule, by running scores (`scores`) of what training itself shows. Between two
cuts, masks of the units that are to leave next move to 0 step by step (`hooks`); at a cut they are set to it,
weights and adapters are sliced, and the more salient half of the adapters gets higher ranks (`adapters`). The model
before the first cut teaches the pruned one for a while (`distill`). arXiv:2401.12200.

Deviations from the code (ROIM1998/APT), besides those of `scores` and `distill`: schedules are parts of the
training steps, in the proportions of its LLaMA script; adapters are on all linear sublayers, as with every method here,
where the script's are on q and v; weights are sliced at every cut, where the code does so after distillation; masks
move in every step from the warm-up on, where the code's do in the last 200 before a cut; RMSNorm under masks is that of
the sliced model; the final model is that of the last step, not of the best evaluation.

In a short run 1 % of the steps hardly tunes the model, which then is no good teacher: raise `prune_start`.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainerCallback

from baselines.apt.settings import AptSettings
from baselines.apt.training import AptTraining


@dataclass(frozen=True)
class Apt(AptSettings):
    """Prunes while it trains, so only through `finetune` (or the runner); `compress` alone changes nothing."""

    name: ClassVar[str] = "apt"

    def callbacks(self) -> list[TrainerCallback]:
        """The callback that does the work."""
        return [AptTraining(self)]
