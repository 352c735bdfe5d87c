"""What can be known of a run, and refused, before any weight is loaded."""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gradpruner import processes
from gradpruner.conversation_rows import encode_rows
from gradpruner.data_warnings import warn_of_leaked_rows, warn_of_second_bos
from gradpruner.encoding import Encoder, TrainingRow
from gradpruner.evaluate.base import Evaluation, Question
from gradpruner.files import content_hash
from gradpruner.finetune.few_steps import warn_of_few_steps
from gradpruner.finetune.parallel import check_parallel
from gradpruner.finetune.spec import MERGE_DTYPES, TrainingSpec
from gradpruner.method import Method, Recovery
from gradpruner.models.architectures import count_parameters, empty_model
from gradpruner.models.shape import ModelShape
from gradpruner.models.spec import ModelSpec
from gradpruner.tasks import DataError, Example, Task

NUM_NAMED_TOKENS = 5  # in a message


@dataclass(frozen=True)
class Setup:
    """Everything that decides a run.

    Attributes:
        model: the dense model.
        task: training data, and test data unless there is a `test_task`.
        method: what to do to the model.
        training: how to fine-tune.
        evaluation: how to evaluate.
        seed: of data order, adapters and draws.
        cache_dir: folder for stages and converted models.
        evaluate_before: also evaluate before fine-tuning.
        test_task: another dataset to test on (Table 12).
        recovery_task: data for the method's training between pruning and the fine-tune.
        measure_speed: time training steps and inference, beside the dense model.
    """

    model: ModelSpec
    task: Task
    method: Method
    training: TrainingSpec
    evaluation: Evaluation
    seed: int
    cache_dir: Path
    evaluate_before: bool = True
    test_task: Task | None = None
    recovery_task: Task | None = None
    measure_speed: bool = False

    def with_method(self, method: Method, training: TrainingSpec) -> "Setup":
        """Returns a setup of the same data, with its examples and rows, without other training."""
        other = dataclasses.replace(self, method=method, training=training, recovery_task=None)
        other.take_examples(self)
        if other.base_model == self.base_model:
            vars(other).update(rows=self.rows, rows_hash=self.rows_hash)
        return other

    # ---- data ----

    @cached_property
    def train_examples(self) -> list[Example]:
        """Rendered training examples."""
        return self.task.load("train", self.seed)

    @cached_property
    def test_examples(self) -> list[Example]:
        """Rendered test examples."""
        if self.test_task is None:
            return self.task.load("test", self.seed)
        advice = "These are rows of dataset.test. Its settings belong into dataset.test_settings={...}"
        return _load_second(self.test_task, "test", self.seed, advice)

    def take_examples(self, other: "Setup") -> None:
        """Takes over the examples of a run with the same data, which would otherwise be read and rendered again."""
        if (self.task, self.test_task, self.seed) == (other.task, other.test_task, other.seed):
            vars(self).update(train_examples=other.train_examples, test_examples=other.test_examples)

    @cached_property
    def rows(self) -> list[TrainingRow]:
        """Tokenized training rows."""
        return encode_rows(self.train_examples, self.encoder(self.task))

    @cached_property
    def rows_hash(self) -> str:
        """Identifies the training rows in keys of stages."""
        return hash_rows(self.rows)

    @cached_property
    def recovery_rows(self) -> list[TrainingRow]:
        """Tokenized rows for `recovery`; empty if there is none."""
        if self.recovery_task is None or self.recovery is None:
            return []
        task, distillation = self.recovery_task, self.recovery.distillation
        advice = (
            f"These are rows of method.recover_on, on which {self.method.name} trains before the fine-tune. Their "
            "settings belong into method.recover_settings={...}, and method.recover_on=null omits that training"
        )
        rows = encode_rows(_load_second(task, "train", self.seed, advice), self.encoder(task))
        if distillation is None or distillation.tokens == "answer":
            return rows
        # The first token of a row is predicted from nothing.
        return [dataclasses.replace(row, num_answer_tokens=len(row.input_ids) - 1, gaps=()) for row in rows]

    @cached_property
    def questions(self) -> list[Question]:
        """Tokenized test examples."""
        return self.resolved_evaluation.questions(self.test_examples, self.encoder(self.tested_task))

    @property
    def tested_task(self) -> Task:
        """Dataset of the test examples."""
        return self.test_task or self.task

    @property
    def dataset_name(self) -> str:
        """Name of the training data, with that of the test data where it is other data."""
        return self.task.name + (f"-to-{self.test_task.name}" if self.test_task else "")

    def encoder(self, task: Task) -> Encoder:
        """How examples of a dataset become tokens."""
        return Encoder(self.tokenizer, task.max_length, self.model.chat_template or task.holds_conversations)

    # ---- models ----

    @property
    def assets_dir(self) -> Path:
        """Folder of converted and random models."""
        return self.cache_dir / "assets"

    @cached_property
    def base_model(self) -> ModelSpec:
        """The model that the method starts from: the dense one, except with `small_dense`."""
        return self.method.base_model(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights that the method starts from; see `ModelSpec.fingerprint`."""
        return self.base_model.fingerprint(self.assets_dir)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Config of the model that the method starts from."""
        return self.base_model.load_config(self.assets_dir)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model that the method starts from."""
        return self.base_model.load_tokenizer(self.assets_dir)

    @cached_property
    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense model."""
        return self.config if self.base_model == self.model else self.model.load_config(self.assets_dir)

    @cached_property
    def num_dense_parameters(self) -> int:
        """Parameters of the dense model, tied ones once."""
        return count_parameters(empty_model(self.dense_config))

    # ---- the method and the evaluation, with nothing left open ----

    @cached_property
    def resolved_method(self) -> Method:
        """The method with counts and steps made definite for this model and this training length."""
        return self.method.resolve(self.config.num_hidden_layers, self.training.num_steps(len(self.rows)))

    @cached_property
    def shape(self) -> ModelShape:
        """Shape of the compressed model."""
        return self.resolved_method.shape(self.config)

    @property
    def repairs(self) -> bool:
        """Whether the method repairs the pruned model in closed form."""
        return self.resolved_method.repair_calibration() is not None

    @cached_property
    def recovery(self) -> Recovery | None:
        """The method's training between pruning and the fine-tune; None without data for it."""
        recovery = self.resolved_method.recovery() if self.recovery_task is not None else None
        if recovery is None:
            return None
        training = dataclasses.replace(recovery.training, parallel=self.training.parallel)
        return dataclasses.replace(recovery, training=training)

    @cached_property
    def resolved_evaluation(self) -> Evaluation:
        """The evaluation with everything that depends on the task, the model and this machine made definite."""
        dtype = MERGE_DTYPES.get(self.training.merge_dtype, self.base_model.torch_dtype)
        return self.evaluation.resolve(self.tested_task, self.test_examples).for_dtype(dtype)

    # ---- checks ----

    def check(self) -> None:
        """Reads config and data and resolves the method, once; raises what `ModelSpec`, `Task` and `Method` raise.

        Raises:
            ValueError: also if the processes of the run cannot share a batch, if `max_length` is over the model's
                positions, or if the data have tokens that the model has no embedding for.
        """
        _ = self._checked

    @cached_property
    def _checked(self) -> bool:
        """Whether `check` has passed: `Pipeline.run` checks again what a command has checked before."""
        processes.start()
        with processes.main_first():
            self._check()
        return True

    def _check(self) -> None:
        self._check_positions()
        self.base_model.check_weights(self.assets_dir, self.config)
        self.method.check_training(self.training)
        _ = self.resolved_method, self.shape
        self.resolved_method.check_rows(len(self.rows))
        check_parallel(self.training, self.resolved_method.callbacks())
        if self.recovery is not None:
            check_parallel(self.recovery.training, (), self.recovery.distillation is not None)
        self._check_vocabulary()
        warn_of_leaked_rows(self.train_examples, self.test_examples)
        warn_of_second_bos(self.train_examples, self.rows, self.encoder(self.task))
        warn_of_few_steps(self.training, len(self.rows))
        self.cache_dir.mkdir(parents=True, exist_ok=True)

    def _check_positions(self) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        tasks = [task for task in (self.task, self.test_task, self.recovery_task) if task is not None]
        longest = max(task.max_length for task in tasks)
        if limit is not None and longest > limit:
            raise ValueError(
                f"dataset.max_length must be at most the {limit} positions that {self.base_model.name} was made for, "
                f"got {longest}. Lower dataset.max_length."
            )

    def _check_vocabulary(self) -> None:
        """Raises ValueError if rows or questions have token ids beyond the model's vocabulary."""
        rows = [row.input_ids for row in (*self.rows, *self.recovery_rows)]
        rows += [(*question.prompt, *itertools.chain(*question.completions)) for question in self.questions]
        if not self.base_model.has_own_tokenizer:
            return
        size = self.config.vocab_size
        beyond = [{token for token in row if token >= size} for row in rows]
        if tokens := sorted(set().union(*beyond)):
            names = self.tokenizer.convert_ids_to_tokens(tokens[:NUM_NAMED_TOKENS])
            named = ", ".join(f"{name!r} ({token})" for name, token in zip(names, tokens, strict=False))
            more = f" and {len(tokens) - len(names)} more" if len(tokens) > len(names) else ""
            raise ValueError(
                f"The model must have an embedding for every token of the data, got vocab_size={size} in "
                f"{self.base_model.path} and tokens {named}{more} in {sum(map(bool, beyond))} of {len(rows)} rows. "
                "Use the tokenizer that the model was trained with, or resize the embedding (resize_token_embeddings) "
                "and save the model again."
            )


def _load_second(task: Task, split: str, seed: int, advice: str) -> list[Example]:
    """Loads a split of a dataset whose settings are not at `dataset`, as its errors say."""
    try:
        return task.load(split, seed)
    except DataError as error:
        raise DataError(f"{str(error).rstrip()} {advice}.") from error


def hash_rows(rows: list[TrainingRow]) -> str:
    """Identifies tokenized rows in keys of stages."""
    return content_hash([[row.input_ids, row.num_answer_tokens, *([row.gaps] if row.gaps else [])] for row in rows])
