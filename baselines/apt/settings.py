"""Settings of APT."""

from dataclasses import dataclass
from typing import Self

from baselines.apt.pruning import AptPruning
from baselines.apt.schedule import Schedule
from gradpruner.checks import check_above_zero, check_positive
from gradpruner.finetune.spec import ANSWERS_LOSS, TrainingSpec


@dataclass(frozen=True)
class AptSettings(AptPruning):
    """Settings for when APT prunes, how adapters grow, and how the teacher contributes to the loss.

    Attributes:
        prune_start: fraction of the training steps before masks move.
        prune_end: fraction of the training steps by which the last cut is made.
        sparsity_warmup: fraction of the training steps after `prune_start` in which cuts prune nothing yet.
        num_cuts: cuts from `prune_start` to `prune_end`.
        min_interval: fewest steps from one cut to the next; a training with less room is refused, as in the code, whose
            value is 200.
        mask_step: how far a mask moves per training step of a window of 200 steps; in a shorter window further, in
            proportion, so that masks get as far by the cut.
        distil: learn from earlier states of the model.
        distil_end: fraction of the training steps after which distillation ends.
        evaluation_rows: training rows on which a state of the model is evaluated before it becomes the teacher.
        layer_weight: weight of the loss that compares states.
        logit_weight: weight of the loss that compares predictions.
        temperature: divides the logits of teacher and student.
        seed: seed of new ranks, and of the layers that are compared.
    """

    prune_start: float = 0.01
    prune_end: float = 0.333
    sparsity_warmup: float = 0.067
    num_cuts: int = 16
    min_interval: int = 1
    mask_step: float = 0.01
    distil: bool = True
    distil_end: float = 0.777
    evaluation_rows: int = 256
    layer_weight: float = 0.9
    logit_weight: float = 0.1
    temperature: float = 0.667
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values that cannot work."""
        super().__post_init__()
        check_positive(self, "num_cuts", "min_interval", "evaluation_rows")
        if not 0.0 <= self.prune_start <= self.prune_end <= self.distil_end <= 1.0:
            raise ValueError(
                "prune_start, prune_end and distil_end are parts of the training steps, in [0, 1] and in this order, "
                f"got {self.prune_start}, {self.prune_end} and {self.distil_end}. APT's are 0.01, 0.333 and 0.777."
            )
        if not 0.0 <= self.sparsity_warmup <= 1.0:
            raise ValueError(
                f"sparsity_warmup is a fraction of the training steps, in [0, 1], got {self.sparsity_warmup}. APT's is "
                "0.067."
            )
        check_above_zero(self, "mask_step", "temperature")

    def resolve(self, num_hidden_layers: int, training_steps: int | None = None) -> Self:
        """Checks that the training has room for the cuts; see `Method.resolve`."""
        if training_steps is not None and self.min_interval > 1:
            schedule = self.schedule(training_steps)
            room = schedule.cuts[-1] - schedule.start
            if len(schedule.cuts) < self.num_cuts or room < self.num_cuts * self.min_interval:
                fitting = room // self.min_interval
                lower = f"lower method.num_cuts to {fitting}, or " if fitting else ""
                raise ValueError(
                    f"APT's cuts must be min_interval={self.min_interval} steps apart, got {room} steps for "
                    f"{self.num_cuts} cuts in a training of {training_steps} steps. Train longer (finetune.epochs), "
                    f"{lower}lower method.min_interval: masks then move faster."
                )
        return super().resolve(num_hidden_layers, training_steps)

    def check_training(self, training: TrainingSpec) -> None:
        """Raises ValueError unless `training` uses LoRA without gradient checkpointing, and leaves the loss to APT."""
        super().check_training(training)
        if training.loss != ANSWERS_LOSS and self.distil:
            raise ValueError(
                f"APT learns from earlier states of its own model, got finetune.loss={training.loss}. Set "
                "method.distil=false to train APT with this loss, or finetune.loss=answers."
            )
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
        return Schedule.of(
            num_steps, self.prune_start, self.prune_end, self.distil_end, self.num_cuts, self.sparsity_warmup
        )
