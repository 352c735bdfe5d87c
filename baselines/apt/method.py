"""APT, adaptive pruning and tuning: prune while LoRA trains, and grow the adapters that matter (Zhao et al., 2024).

The fine-tune starts from the dense model. After a warm-up, KV groups, MLP channels and channels of the residual stream
are pruned in several cuts on a cubic schedule, by running scores of the training's own passes (`scores`). In a window
before each cut, the masks of the units to prune next move to 0 step by step (`hooks`, `schedule`). At a cut the masks
are set to 0, weights and adapters are sliced, and the more salient half of the adapters that can still grow gets higher
ranks (`adapters`, `growth`). States of the model in between teach it for a while (`distill`). arXiv:2401.12200.

In a short run, 1 % of the steps hardly tunes the model, which is then a poor teacher: raise `prune_start`.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainerCallback

from baselines.apt.settings import AptSettings
from baselines.apt.training import AptTraining


@dataclass(frozen=True)
class Apt(AptSettings):
    """APT as its authors run it for LLaMA; prunes only while `finetune` (or the runner) trains.

    `compress` alone changes nothing. What differs from the code (ROIM1998/APT, its script
    `adaptpruning/llama_2_7b_alpaca_gpt4.sh`), besides what `scores` and `distill` say:

    - Schedules are fractions of the training steps, in the proportions of the script (15 epochs, 24,375 steps).
      Epochs, batch, learning rate and length are those of all methods here (3 epochs at 1e-5 at the paper's scale,
      where the script has 15 at 1e-4). That leaves few steps for many cuts: `min_interval=200` insists on 200 steps per
      cut, as the code does; with less, masks move faster.
    - Adapters are on all linear sublayers, as for every method here; the script has them on q and v.
    - Evaluation, which decides whether a state becomes the teacher, is the likelihood of answers on a sample of the
      training rows: no run here looks at test rows while it trains.
    - Weights are sliced at every cut, where the code slices when it takes a new teacher; the teacher keeps the weights
      of its time either way.
    - The optimizer keeps its moments at cuts, except of adapters that grow. The code makes a new optimizer at each cut,
      whose learning rate its scheduler no longer changes until distillation begins or ends.
    - Tr keeps its rank; in the code it grows with the adapters. A student layer is compared with the teacher's layer of
      the same index: no layer is ever pruned completely here.
    - RMSNorm under masks is that of the sliced model.
    - The final model is that of the last step. The code goes back to the best evaluation when distillation ends.
    """

    name: ClassVar[str] = "apt"

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callback that prunes, grows adapters and distils."""
        return [AptTraining(self)]
