"""APT's work in the steps of a fine-tune, as a Trainer callback."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from baselines.apt.adapters import (
    ADAPTER,
    adapters,
    change_parameters,
    narrow_with_adapters,
    num_adapter_parameters,
    take,
)
from baselines.apt.distill import StateMap, distillation_loss, drawn_layers
from baselines.apt.growth import Saliences
from baselines.apt.hooks import UnitHooks
from baselines.apt.pruning import hidden_step
from baselines.apt.schedule import WINDOW, Schedule, learning_rate_factors
from baselines.apt.scores import (
    Costs,
    Units,
    densest_units,
    keep_one,
    running,
    unit_costs,
    width_plan,
)
from baselines.apt.settings import AptSettings
from baselines.apt.teacher import SAVED_KEPT, Teacher, evaluation_batches
from gradpruner.encoding import Batch
from gradpruner.finetune.result import REPORT_FILE
from gradpruner.finetune.run import PruningCallback
from gradpruner.hidden_states import answer_loss, answer_nll
from gradpruner.models.counting import count_model
from gradpruner.models.shape import LayerShape, ModelShape, config_shape, head_dim
from gradpruner.plan import PruningPlan
from gradpruner.surgery import sharing_copy

STATE_FILE = "apt.safetensors"  # in a Trainer checkpoint
STATE_MAP = "state_map"  # name of a module of the trained model; not saved with the adapters


class AptTraining(PruningCallback):
    """Callback that scores, masks and prunes units, grows adapters, and distils."""

    def __init__(self, apt: AptSettings) -> None:
        self._apt = apt
        self._hooks: UnitHooks | None = None  # until the last cut
        self._teacher: Teacher | None = None
        self._step = 0
        if apt.distil:
            self.loss = self._loss

    # ---- events ----

    def prepare(self, model: PreTrainedModel, checkpoint: Path | None) -> None:
        """Prepares for training and restores a checkpoint's state; see `PruningCallback.prepare`.

        Raises:
            ValueError: if the checkpoint is not from this method.
        """
        config = model.config
        self._dense, self._hidden_step = config_shape(config), hidden_step(config)
        self._rep = self._dense.layers[0].num_attention_heads // self._dense.layers[0].num_key_value_heads
        self._unit_costs = unit_costs(self._dense, head_dim(config))
        self._costs, self._target = self._apt.budget(config)
        self._all_costs, self._counts = Costs.of(config, "total"), count_model(config)
        self._scores, self._masks = Units.full(self._dense, 0.0), Units.full(self._dense, 1.0)
        self._kept = Units.full(self._dense, True)
        self._saved: dict[str, Tensor] = {}
        self._cuts: list[dict[str, int]] = []
        self._evaluations: list[dict[str, Any]] = []
        if checkpoint is not None:
            if not (checkpoint / STATE_FILE).is_file():
                raise ValueError(
                    f"A checkpoint of method=apt holds scores and masks, got none in {checkpoint / STATE_FILE}. Delete "
                    "the checkpoints to train from the start."
                )
            self._saved = load_file(checkpoint / STATE_FILE)
            self._scores, self._masks, self._kept = (
                Units.from_tensors(self._saved, f"{name}.") for name in ("scores", "masks", "kept")
            )
            report = json.loads((checkpoint / REPORT_FILE).read_text())
            self._cuts, self._evaluations = report["cuts"], report["evaluations"]
            if self._part(SAVED_KEPT):
                self._untaught = sharing_copy(model)
        self._describe()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the state map before the optimizer is made."""
        assert model is not None
        if self._distils:
            lora = model.peft_config[ADAPTER]
            with torch.random.fork_rng():
                torch.manual_seed(self._apt.seed)
                state_map = StateMap(int(self._kept.hidden.sum()), lora.r, lora.lora_alpha / lora.r)
            state_map.load_state_dict(self._part("map.") or state_map.state_dict())
            model.add_module(STATE_MAP, state_map.to(model.device))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel | None = None,
        lr_scheduler: LambdaLR | None = None,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Restores the teacher, sets the restarts of the learning rate, and starts to watch units."""
        assert model is not None and lr_scheduler is not None and train_dataloader is not None
        self._model = model
        self._schedule: Schedule = self._apt.schedule(state.max_steps)
        self._saliences = Saliences(model, self._saved.get("saliences"))
        if self._part(SAVED_KEPT):
            self._teacher = Teacher.restored(self._saved, self._untaught, self._rep, model.peft_config[ADAPTER])
            del self._untaught
        self._saved = {}
        if self._distils:
            restarts = (self._schedule.distil_start, self._schedule.distil_end)
            factor = learning_rate_factors(args, restarts, state.max_steps)
            lr_scheduler.lr_lambdas = [factor] * len(lr_scheduler.lr_lambdas)
            apt, batch_size = self._apt, args.per_device_train_batch_size
            self._evaluated = evaluation_batches(train_dataloader, apt.evaluation_rows, batch_size, apt.seed)
        if state.global_step < self._schedule.cuts[-1]:
            self._watch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the step, for the loss."""
        self._step = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scores the adapters, whose gradients are complete now."""
        if self._hooks is not None:
            self._saliences.update()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Scores the units, then makes a cut or moves masks, and evaluates the model where a window begins."""
        step, schedule = state.global_step, self._schedule
        assert optimizer is not None
        if self._hooks is not None:
            self._scores = running(self._scores, self._hooks.scores())
            if step in schedule.cuts:
                self._cut(self._chosen(step), step, optimizer)
        if self._hooks is not None and step >= schedule.start:
            cut = schedule.next_cut(step)
            begin = schedule.window_start(cut)
            if step == begin and self._distils and schedule.kept_part(cut, self._last_part) < 1.0:
                self._evaluate(step)
            if begin <= step and step not in schedule.cuts:
                self._move(self._chosen(cut), cut - begin)
        if self._distils and step in (schedule.distil_start, schedule.distil_end):
            optimizer.state.clear()  # the objective changes, and the learning rate restarts
        if step >= schedule.distil_end:
            self._teacher = None  # also frees weights of its time

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves everything that a resumed run needs besides weights."""
        super().on_save(args, state, control, **kwargs)
        units = {"scores": self._scores, "masks": self._masks, "kept": self._kept}
        tensors = {name: value for kind, own in units.items() for name, value in own.tensors(f"{kind}.").items()}
        tensors["saliences"] = self._saliences.tensor()
        if self._teacher is not None:
            tensors |= self._teacher.tensors()
        if self._distils:
            tensors |= {f"map.{name}": value for name, value in self._state_map.state_dict().items()}
        save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes hooks and state map from the model."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._distils:
            delattr(self._model, STATE_MAP)

    # ---- pruning ----

    @property
    def _last_part(self) -> float:
        """Fraction of the parameters to keep at the last cut."""
        return self._target / self._costs.of_shape(self._dense)

    @property
    def _distils(self) -> bool:
        """Whether there is a teacher at any time: not if nothing is pruned."""
        return self._apt.distil and self._last_part < 1.0

    def _chosen(self, cut: int) -> Units:
        """Returns the units to keep at that cut, by the scores so far."""
        part = self._schedule.kept_part(cut, self._last_part)
        budget = round(part * self._costs.of_shape(self._dense))
        scores = keep_one(self._scores, self._hidden_step)
        kept, _ = densest_units(scores, self._unit_costs, self._costs, budget, self._hidden_step)
        return kept

    def _move(self, kept: Units, window: int) -> None:
        """Moves masks towards the units to keep, by a step in proportion to the window."""
        assert self._hooks is not None
        step = self._apt.mask_step * WINDOW / window

        def moved(mask: Tensor, stays: Tensor) -> Tensor:
            return (mask + torch.where(stays, step, -step)).clamp(0.0, 1.0)

        self._masks = self._masks.combine(moved, kept)
        self._hooks.mask(self._masks)

    def _cut(self, kept: Units, step: int, optimizer: Optimizer) -> None:
        """Slices the model and grows adapters."""
        assert self._hooks is not None
        self._hooks.remove()
        width = width_plan(kept, self._rep, self._kept)
        if width is not None:
            narrow_with_adapters(self._model, width, optimizer)
            if width.hidden is not None and self._distils:
                hidden = torch.tensor(width.hidden)
                changes = take(self._state_map.a, hidden, 1), take(self._state_map.b, hidden, 0)
                change_parameters(optimizer, [change for change in changes if change is not None])
        self._kept, self._masks = kept, kept.combine(Tensor.double)
        self._grow(step, optimizer)
        own = adapters(self._model).values()
        num_adapted = sum(map(num_adapter_parameters, own))
        num_parameters = self._all_costs.of_shape(self._shape())
        self._cuts.append({"step": step, "num_parameters": num_parameters, "num_adapter_parameters": num_adapted})
        self._describe()
        self._hooks = None
        if step < self._schedule.cuts[-1]:
            self._watch()

    def _grow(self, step: int, optimizer: Optimizer) -> None:
        first = self._counts.num_lora_parameters(self._model.peft_config[ADAPTER].r)
        target = first * (1 + (self._apt.growth - 1) * self._schedule.progress(step))
        self._saliences.grow(target, self._apt.max_rank, optimizer, self._apt.seed, step)

    def _watch(self) -> None:
        self._hooks = UnitHooks(self._model.get_base_model(), self._kept)
        self._hooks.mask(self._masks)

    def _shape(self) -> ModelShape:
        groups, channels = (values.sum(1).tolist() for values in (self._kept.groups, self._kept.channels))
        layers = (LayerShape(own * self._rep, own, size) for own, size in zip(groups, channels, strict=True))
        return ModelShape(int(self._kept.hidden.sum()), tuple(layers))

    def _describe(self) -> None:
        """Updates plan and report."""
        shape = self._shape()
        width = width_plan(self._kept, self._rep, Units.full(self._dense, True))
        self.plan = PruningPlan(num_hidden_layers=len(shape.layers), method=self._apt.name, width=width)
        self.report = {
            "kept_part": self._kept.parts(),
            "cuts": self._cuts,
            "evaluations": self._evaluations,
            "num_parameters": self._all_costs.of_shape(shape),
            "shape": shape.to_dict(),
        }

    # ---- distillation ----

    @property
    def _state_map(self) -> StateMap:
        module: Any = self._model.get_submodule(STATE_MAP)
        assert isinstance(module, StateMap)
        return module

    def _part(self, prefix: str) -> dict[str, Tensor]:
        """Returns the checkpoint's tensors under a prefix."""
        return {name.removeprefix(prefix): value for name, value in self._saved.items() if name.startswith(prefix)}

    def _evaluate(self, step: int) -> None:
        """Evaluates the model, which becomes the teacher if it is better than all teachers before it."""
        assert self._hooks is not None
        self._model.eval()
        nll = answer_nll(self._model.get_base_model(), self._evaluated)
        self._model.train()
        best = min((entry["answer_nll"] for entry in self._evaluations), default=float("inf"))
        self._evaluations.append({"step": step, "answer_nll": nll, "is_teacher": nll < best})
        self._describe()
        if nll < best:
            self._hooks.remove()
            self._teacher = Teacher.of(self._model, self._kept)
            self._watch()

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        assert isinstance(model, PeftModel)
        student, apt = model.get_base_model(), self._apt
        if self._teacher is None or self._step < self._schedule.distil_start:
            return answer_loss(student, batch)
        hidden = self._kept.hidden[self._teacher.kept.hidden].nonzero().flatten()
        return distillation_loss(
            student,
            self._teacher.model,
            batch,
            mu=self._schedule.progress(self._step),
            layers=drawn_layers(len(self._dense.layers), apt.seed, self._step),
            hidden=hidden.to(student.device),
            state_map=self._state_map,
            layer_weight=apt.layer_weight,
            logit_weight=apt.logit_weight,
            temperature=apt.temperature,
        )
