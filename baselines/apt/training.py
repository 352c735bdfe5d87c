"""APT's work in the steps of a fine-tune, as a Trainer callback."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from baselines.apt.adapters import (
    ADAPTER,
    adapters,
    change_parameters,
    factors,
    grow,
    narrow_with_adapters,
    num_adapter_parameters,
    take,
)
from baselines.apt.distill import StateMap, distillation_loss, drawn_layers, make_teacher
from baselines.apt.hooks import UnitHooks
from baselines.apt.pruning import hidden_step
from baselines.apt.scores import (
    DECAY,
    Costs,
    Schedule,
    Units,
    densest_units,
    grown_ranks,
    keep_one,
    kept_fraction,
    rank_salience,
    running,
    unit_costs,
    width_plan,
)
from baselines.apt.settings import AptSettings
from gradpruner.encoding import Batch
from gradpruner.files import content_hash
from gradpruner.finetune.result import REPORT_FILE
from gradpruner.finetune.run import PruningCallback
from gradpruner.hidden_states import answer_loss
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
        self._teacher: PreTrainedModel | None = None
        self._teacher_state: dict[str, Tensor] = {}
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
        self._all_costs, self._counts = Costs.of(config, embeddings=True), count_model(config)
        self._untaught = sharing_copy(model) if self._apt.distil else None
        self._scores, self._masks = Units.full(self._dense, 0.0), Units.full(self._dense, 1.0)
        self._kept = Units.full(self._dense, True)
        self._saved: dict[str, Tensor] = {}
        self._cuts: list[dict[str, int]] = []
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
            self._cuts = json.loads((checkpoint / REPORT_FILE).read_text())["cuts"]
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
        if self._apt.distil:
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
        **kwargs: Any,
    ) -> None:
        """Restores the teacher and starts to watch units."""
        assert model is not None
        self._model = model
        self._schedule: Schedule = self._apt.schedule(state.max_steps)
        saliences = self._saved.get("saliences", torch.zeros(len(adapters(model)), dtype=torch.float64))
        self._saliences: list[float] = saliences.tolist()
        if self._part("teacher."):
            self._teach(self._part("teacher."))
        self._saved = {}
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
        if self._hooks is None:
            return
        for index, layer in enumerate(adapters(self._model).values()):
            weight = factors(layer)[0].weight
            assert weight.grad is not None
            salience = rank_salience(weight.detach(), weight.grad)
            self._saliences[index] = DECAY * self._saliences[index] + (1 - DECAY) * salience

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Scores the units, then moves masks or makes a cut."""
        step = state.global_step
        if step >= self._schedule.distil_end:
            self._teacher, self._untaught, self._teacher_state = None, None, {}  # also frees the dense weights
        if self._hooks is None:
            return
        self._scores = running(self._scores, self._hooks.scores())
        if step == self._schedule.start and self._untaught is not None:
            state_dict = get_peft_model_state_dict(self._model)
            self._teach({name: value.detach().clone() for name, value in state_dict.items()})
        if step < self._schedule.start:
            return
        cut = self._schedule.next_cut(step)
        kept = self._chosen(cut)
        if step == cut:
            assert optimizer is not None
            self._cut(kept, step, optimizer)
        else:
            self._masks = self._masks.combine(self._moved, kept)
            self._hooks.mask(self._masks)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves everything that a resumed run needs besides weights."""
        super().on_save(args, state, control, **kwargs)
        units = {"scores": self._scores, "masks": self._masks, "kept": self._kept}
        tensors = {name: value for kind, own in units.items() for name, value in own.tensors(f"{kind}.").items()}
        tensors["saliences"] = torch.tensor(self._saliences, dtype=torch.float64)
        tensors |= {f"teacher.{name}": value for name, value in self._teacher_state.items()}
        if self._apt.distil:
            tensors |= {f"map.{name}": value for name, value in self._state_map.state_dict().items()}
        save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes hooks and state map from the model."""
        if self._hooks is not None:
            self._hooks.remove()
        if self._apt.distil:
            delattr(self._model, STATE_MAP)

    # ---- pruning ----

    def _chosen(self, cut: int) -> Units:
        """Returns the units to keep at that cut, by the scores so far."""
        whole, schedule = self._costs.of_shape(self._dense), self._schedule
        part = kept_fraction(cut, schedule.start, schedule.cuts[-1], self._target / whole)
        scores = keep_one(self._scores, self._hidden_step)
        kept, _ = densest_units(scores, self._unit_costs, self._costs, round(part * whole), self._hidden_step)
        return kept

    def _moved(self, mask: Tensor, kept: Tensor) -> Tensor:
        step = self._apt.mask_step
        return (mask + torch.where(kept, step, -step)).clamp(0.0, 1.0)

    def _cut(self, kept: Units, step: int, optimizer: Optimizer) -> None:
        """Slices the model and grows adapters."""
        assert self._hooks is not None
        self._hooks.remove()
        width = width_plan(kept, self._rep, self._kept)
        if width is not None:
            narrow_with_adapters(self._model, width, optimizer)
            if width.hidden is not None and self._apt.distil:
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
        own = adapters(self._model)
        first = self._counts.num_lora_parameters(self._model.peft_config[ADAPTER].r)
        target = first * (1 + (self._apt.growth - 1) * self._schedule.progress(step))
        ranks = [layer.r[ADAPTER] for layer in own.values()]
        widths = [num_adapter_parameters(layer) // rank for layer, rank in zip(own.values(), ranks, strict=True)]
        grown = grown_ranks(ranks, widths, self._saliences, target, self._apt.max_rank)
        # Seeded by the step, a draw needs no generator state in the checkpoint. torch takes only 32 bits.
        generator = torch.Generator().manual_seed(int(content_hash([self._apt.seed, step])[:8], 16))
        grow(self._model, dict(zip(own, grown, strict=True)), optimizer, generator)

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

    def _teach(self, adapter_state: dict[str, Tensor]) -> None:
        """Makes the teacher from the adapters of the model before the first cut."""
        assert self._untaught is not None
        config = copy.deepcopy(self._model.peft_config[ADAPTER])
        config.rank_pattern, config.alpha_pattern = {}, {}
        self._teacher, self._teacher_state = make_teacher(self._untaught, config, adapter_state), adapter_state

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        assert isinstance(model, PeftModel)
        student, apt = model.get_base_model(), self._apt
        if self._teacher is None:
            return answer_loss(student, batch)
        return distillation_loss(
            student,
            self._teacher,
            batch,
            mu=self._schedule.progress(self._step),
            layers=drawn_layers(len(self._dense.layers), apt.seed, self._step),
            hidden=self._kept.hidden.nonzero().flatten().to(student.device),
            state_map=self._state_map,
            layer_weight=apt.layer_weight,
            logit_weight=apt.logit_weight,
            temperature=apt.temperature,
        )
