"""APT, fast: prune once by APT's scores before fine-tuning, without distillation (Zhao et al., arXiv:2401.12200).

The authors' variant for LLaMA. Scores are summed over small batches of the downstream task; see `apt.scores`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from baselines.apt.hooks import static_scores
from baselines.apt.pruning import AptPruning, hidden_step
from baselines.apt.scores import Units, densest_units, keep_one, unit_costs, width_plan
from baselines.calibration import Calibrated, checked
from baselines.width_pruning import load_scores, save_scores
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
        seed: seed of the row sample.
    """

    name: ClassVar[str] = "apt_fast"

    batch_size: int = 2

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
