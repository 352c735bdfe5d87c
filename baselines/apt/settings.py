"""Settings of APT."""

from dataclasses import dataclass

from baselines.apt.pruning import AptPruning
from baselines.apt.scores import Schedule
from gradpruner.checks import check_positive
from gradpruner.finetune.spec import TrainingSpec


@dataclass(frozen=True)
class AptSettings(AptPruning):
    """Settings for when APT prunes, how adapters grow, and how the teacher contributes to the loss.

    Attributes:
        prune_start: fraction of the training steps before masks move.
        prune_end: fraction of the training steps by which the last cut is made.
        num_cuts: cuts from `prune_start` to `prune_end`.
        mask_step: how far a mask moves per training step.
        growth: adapter parameters at the last cut, as a multiple of those at the start.
        max_rank: rank beyond which no adapter grows.
        distil: learn from the model before the first cut.
        distil_end: fraction of the training steps after which distillation ends.
        layer_weight: weight of the loss that compares states.
        logit_weight: weight of the loss that compares predictions.
        temperature: divides the logits of teacher and student.
        seed: seed of new ranks, and of the layers that are compared.
    """

    prune_start: float = 0.01
    prune_end: float = 0.333
    num_cuts: int = 16
    mask_step: float = 0.01
    growth: float = 4.0
    max_rank: int = 64
    distil: bool = True
    distil_end: float = 0.667
    layer_weight: float = 0.9
    logit_weight: float = 1.0
    temperature: float = 0.667
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_positive(self, "num_cuts", "max_rank", "growth")
        if not 0.0 <= self.prune_start <= self.prune_end <= self.distil_end <= 1.0:
            raise ValueError(
                "prune_start, prune_end and distil_end are parts of the training steps, in [0, 1] and in this order, "
                f"got {self.prune_start}, {self.prune_end} and {self.distil_end}. APT's are 0.01, 0.333 and 0.667."
            )
        for name in ("mask_step", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}. Raise method.{name}.")

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError unless `training` uses LoRA without gradient checkpointing."""
        super().check_training(training)
        if training.gradient_checkpointing:
            raise ValueError(
                "APT scores units by what passes through the model in training, where recomputing activations would "
                "count twice, got gradient_checkpointing=true. Set finetune.gradient_checkpointing=false."
            )

    def variant(self) -> str:
        """Returns how much is pruned, and whether there is a teacher."""
        return super().variant() + ("" if self.distil else "-alone")

    def schedule(self, num_steps: int) -> Schedule:
        """Returns the schedule of a run of `num_steps` optimizer steps."""
        return Schedule.of(num_steps, self.prune_start, self.prune_end, self.distil_end, self.num_cuts)
