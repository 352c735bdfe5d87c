"""What a fine-tune learns from besides the answers: predictions of the dense model, in stages of their own."""

from dataclasses import dataclass
from pathlib import Path

from gradpruner.cost import COST_FILE, Cost
from gradpruner.finetune.losses import SignalLoss
from gradpruner.finetune.result import merge_for_checkpoint
from gradpruner.finetune.spec import ANSWERS_LOSS
from gradpruner.finetune.teacher import Teacher, write_predictions
from gradpruner.pipeline.code_version import code_version
from gradpruner.pipeline.runner import ModelStage, Stage, StageRunner, libraries
from gradpruner.pipeline.setup import Setup


def teach_stage(setup: Setup, runner: StageRunner, weights: ModelStage, tokens: str) -> Stage:
    """Predictions of a teacher on the training rows.

    Args:
        setup: the run whose rows are taught.
        runner: of its stages.
        weights: the teacher.
        tokens: for which tokens, one of `teacher.TOKENS`.
    """

    def compute(directory: Path) -> None:
        # Taken: the student starts from other weights.
        teacher = merge_for_checkpoint(runner.take(weights), setup.training)
        with Cost() as cost:
            write_predictions(teacher, setup.rows, setup.tokenizer.pad_token_id, tokens, directory)
        cost.save(directory / COST_FILE)

    key = {
        "weights": weights.id,
        "tokens": tokens,
        "rows": setup.rows_hash,
        "code": code_version(teach_stage),
        "libraries": libraries(),
    }
    return Stage("teach", key, compute, needs=(weights,))


@dataclass(frozen=True)
class Teachers:
    """Stages whose results a fine-tune learns from; None where it does not.

    Attributes:
        teach_prompts: predictions of the dense model on prompts.
        tuned_dense: the dense model after its own fine-tune.
        teach_answers: predictions of that model on answers.
    """

    teach_prompts: Stage | None = None
    tuned_dense: ModelStage | None = None
    teach_answers: Stage | None = None

    def named(self) -> dict[str, Stage]:
        """Returns the stages that there are, by name and in order."""
        return {name: stage for name, stage in vars(self).items() if stage is not None}

    @property
    def predictions(self) -> tuple[Stage, ...]:
        """Those of the stages that the student reads."""
        return tuple(stage for stage in (self.teach_prompts, self.teach_answers) if stage is not None)


def signal_loss(setup: Setup, runner: StageRunner, teachers: Teachers) -> SignalLoss | None:
    """Returns the loss of the fine-tune; None is the likelihood of the answers."""
    training = setup.training
    if training.loss == ANSWERS_LOSS:
        return None
    dense, tuned = (
        None if stage is None else Teacher(runner.folder(stage))
        for stage in (teachers.teach_prompts, teachers.teach_answers)
    )
    return SignalLoss(training.prompt_weight, dense, tuned, training.tuned_teacher)
