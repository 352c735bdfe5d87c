"""APT, fast: prune once by APT's scores before fine-tuning, without distillation (Zhao et al., arXiv:2401.12200).

The authors' second variant for LLaMA (`adaptpruning_nodistill/llama_2_7b_alpaca_gpt4_preprune.sh`). Scores are summed
over small batches of the downstream task; see `apt.scores`. Adapters grow in the first quarter of the fine-tune; see
`apt.growth`. Deviations: those of `apt` about adapters, epochs and learning rate.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel, TrainerCallback

from baselines.apt.growth import GrowthCallback
from baselines.apt.hooks import static_scores
from baselines.apt.pruning import AptPruning, hidden_step
from baselines.apt.scores import Units, densest_units, keep_one, unit_costs, width_plan
from baselines.calibration import Calibrated, checked
from baselines.width_pruning import load_scores, save_scores
from gradpruner.checks import check_positive
from gradpruner.encoding import Batch
from gradpruner.method import Compressed
from gradpruner.models.architectures import check_finite_weights
from gradpruner.models.shape import config_shape, head_dim
from gradpruner.plan import PruningPlan
from gradpruner.surgery import apply_plan


@dataclass(frozen=True)
class AptFast(Calibrated, AptPruning):
    """Pruning of KV groups, MLP channels and channels of the residual stream by salience and outliers, in one cut.

    Attributes:
        num_rows: training rows to use.
        batch_size: rows per batch; changes the scores, which multiply sums over a batch.
        seed: seed of the row sample, and of new ranks.
        growth_start: fraction of the training steps before adapters grow.
        growth_end: fraction of the training steps by which they have grown for the last time.
        num_growths: how often they grow between the two.
    """

    name: ClassVar[str] = "apt_fast"

    batch_size: int = 2
    growth_start: float = 0.062
    growth_end: float = 0.25
    num_growths: int = 3

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_positive(self, "num_growths")
        if not 0.0 <= self.growth_start <= self.growth_end <= 1.0:
            raise ValueError(
                "growth_start and growth_end are parts of the training steps, in [0, 1] and in this order, got "
                f"{self.growth_start} and {self.growth_end}. APT's are 0.062 and 0.25."
            )

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callback that grows adapters."""
        times = self.growth_start, self.growth_end
        return [GrowthCallback(self.growth, self.max_rank, times, self.num_growths, self.seed)]

    def measure(self, model: PreTrainedModel, batches: Iterable[Batch], directory: Path) -> None:
        """Scores all units; raises ValueError if weights or scores are not finite, or there is no data."""
        check_finite_weights(model)
        scores = static_scores(model, checked(batches, self))
        save_scores(scores.tensors(), directory, self.name)

    def prune(self, model: PreTrainedModel, directory: Path) -> Compressed:
        """Keeps the units with the highest scores relative to their cost."""
        config, dense = model.config, config_shape(model.config)
        costs, budget = self.budget(config)
        scores, step = Units.from_tensors(load_scores(directory)), hidden_step(config)
        kept, _ = densest_units(keep_one(scores, step), unit_costs(dense, head_dim(config)), costs, budget, step)
        rep = dense.layers[0].num_attention_heads // dense.layers[0].num_key_value_heads
        width = width_plan(kept, rep, Units.full(dense, True))
        plan = PruningPlan(num_hidden_layers=len(dense.layers), method=self.name, width=width)
        return Compressed(apply_plan(model, plan), plan, {"kept_part": kept.parts()})
