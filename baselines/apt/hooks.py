"""Hooks by which APT watches and masks the units of a model, plain or with LoRA, without changing its modules.

Masks multiply the inputs of o_proj (KV groups) and down_proj (MLP channels), and everything that is written to the
residual stream (hidden channels). RMSNorm then divides its sum of squares by the sum of the mask instead of the number
of channels. With a mask of zeros and ones, the norm of the sliced model does the same.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.apt.adapters import ADAPTER
from baselines.apt.scores import Units, group_scores, outlier_term, salience
from gradpruner.encoding import Batch
from gradpruner.hidden_states import answer_loss
from gradpruner.models.architectures import decoder_layers
from gradpruner.models.shape import config_shape, head_dim
from gradpruner.width_surgery import WRITES_HIDDEN

Site = tuple[int, str]  # layer, and a projection that writes to the residual stream


class _Sums:
    """Sums over real tokens, per channel, of an activation, its magnitude and its gradient's magnitude; float32."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self.value, self.absolute, self.gradient = torch.zeros(3, num_channels, device=device)

    @torch.no_grad()
    def add(self, activation: Tensor, real: Tensor) -> None:
        """Adds an activation (B, T, C), and its gradient as soon as it is computed; `real` is (B, T, 1)."""
        values = activation.float() * real
        self.value += values.sum((0, 1))
        self.absolute += values.abs().sum((0, 1))

        def backward(gradient: Tensor) -> None:
            self.gradient += (gradient.float() * real).abs().sum((0, 1))

        activation.register_hook(backward)  # type: ignore[no-untyped-call]


class UnitHooks:
    """Hooks that watch a model's units in forwards with gradients, and mask the units in all forwards.

    Args:
        model: a decoder whose projections are nn.Linear or peft's LoRA layers around them.
        kept: units of the dense model that `model` has, bool.
    """

    def __init__(self, model: PreTrainedModel, kept: Units) -> None:
        self._layers, self._kept, self._width = decoder_layers(model), kept, head_dim(model.config)
        self._masks: dict[Site, Tensor] = {}  # of a projection's input, per channel
        self._hidden_mask: Tensor | None = None
        self._real = torch.ones(1, 1, 1)
        self._reset()
        decoder = model.get_decoder()
        norms = [decoder.norm]
        self._handles = [decoder.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles.append(model.get_input_embeddings().register_forward_hook(self._written))
        for index, layer in enumerate(self._layers):
            norms += [layer.get_submodule(name) for name in ("input_layernorm", "post_attention_layernorm")]
            for name in WRITES_HIDDEN:
                module = layer.get_submodule(name)
                self._handles.append(module.register_forward_pre_hook(partial(self._before, (index, name))))
                self._handles.append(module.register_forward_hook(partial(self._after, (index, name))))
        self._handles += [norm.register_forward_hook(self._normalized) for norm in norms]

    def remove(self) -> None:
        """Removes all hooks; the model is then unmasked."""
        for handle in self._handles:
            handle.remove()

    def mask(self, masks: Units) -> None:
        """Masks units from now on; `masks` covers the dense model, and entries of pruned units are ignored."""
        self._masks, self._hidden_mask = {}, None
        for index, layer in enumerate(self._layers):
            channels = self._rep(layer) * self._width
            groups = masks.groups[index][self._kept.groups[index]].repeat_interleave(channels)
            for name, mask in zip(
                WRITES_HIDDEN, (groups, masks.channels[index][self._kept.channels[index]]), strict=True
            ):
                if bool((mask != 1).any()):
                    self._masks[index, name] = mask.to(_weight(layer, name).device, torch.float32)
        hidden = masks.hidden[self._kept.hidden]
        if bool((hidden != 1).any()):
            self._hidden_mask = hidden.to(_weight(self._layers[0], WRITES_HIDDEN[0]).device, torch.float32)

    @torch.no_grad()
    def scores(self) -> Units:
        """Returns the scores of all units from the forwards since the last call; -inf for pruned units."""
        scores = self._kept.combine(
            lambda kept: torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, -torch.inf)
        )
        for index, layer in enumerate(self._layers):
            attention, mlp = ((index, name) for name in WRITES_HIDDEN)
            for site in (attention, mlp):
                into, out = self._into[site], self._out[site]
                # The sum serves as well as the mean of the activations: kurtosis does not depend on scale.
                contribution = _tuned_weight(layer, site[1]) * into.value
                per_channel = salience(into.absolute, into.gradient)
                if site == attention:
                    kept = self._kept.groups[index]
                    scores.groups[index, kept] = group_scores(per_channel, contribution, int(kept.sum()), self._width)
                else:
                    scores.channels[index, self._kept.channels[index]] = per_channel + outlier_term(contribution, 0)
                scores.hidden[self._kept.hidden] += salience(out.absolute, out.gradient) + outlier_term(contribution, 1)
        self._reset()
        return scores

    def _reset(self) -> None:
        self._into: dict[Site, _Sums] = {}
        self._out: dict[Site, _Sums] = {}
        for index, layer in enumerate(self._layers):
            for name in WRITES_HIDDEN:
                weight = _weight(layer, name)
                outputs, inputs = weight.shape
                self._into[index, name] = _Sums(inputs, weight.device)
                self._out[index, name] = _Sums(outputs, weight.device)

    def _rep(self, layer: nn.Module) -> int:
        return _weight(layer, "self_attn.q_proj").shape[0] // _weight(layer, "self_attn.k_proj").shape[0]

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._real = kwargs["attention_mask"].float().unsqueeze(-1)  # (B, T, 1)

    def _before(self, site: Site, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        mask, value = self._masks.get(site), args[0]
        if mask is not None:
            value = value * mask.to(value.dtype)
        if value.requires_grad:
            self._into[site].add(value, self._real)
        return (value,)

    def _after(self, site: Site, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = self._written(module, args, output)
        if output.requires_grad:
            self._out[site].add(output, self._real)
        return output

    def _written(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Masks what is written to the residual stream."""
        return output if self._hidden_mask is None else output * self._hidden_mask.to(output.dtype)

    def _normalized(self, norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Corrects RMSNorm(x) = w x / sqrt(sum x^2 / d + eps) to use the sum of the mask in place of d."""
        if self._hidden_mask is None:
            return output
        epsilon: Any = norm.variance_epsilon
        mean = args[0].float().square().mean(-1, keepdim=True)
        of_kept = mean * len(self._hidden_mask) / self._hidden_mask.sum()
        corrected: Tensor = output * ((mean + epsilon) / (of_kept + epsilon)).sqrt().to(output.dtype)
        return corrected


def static_scores(model: PreTrainedModel, batches: Iterable[Batch]) -> Units:
    """Returns the sum of the scores of all batches, without training.

    Args:
        model: the dense model; unchanged.
        batches: with answers, on which the loss is computed.
    """
    kept = Units.full(config_shape(model.config), True)
    total = Units.full(config_shape(model.config), 0.0)
    embedded: list[Tensor] = []
    hooks = UnitHooks(model, kept)
    # Gradients flow back to the embedding's output, and to no weight.
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output.requires_grad_())
    )
    try:
        for batch in batches:
            embedded.clear()
            loss, num_tokens = answer_loss(model, batch)
            torch.autograd.grad(loss / num_tokens, embedded)
            total = total.combine(torch.add, hooks.scores())
    finally:
        hooks.remove()
        handle.remove()
    return total


def _tuned_weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the weight of a sublayer with its adapter, W + s B A, float32."""
    module: Any = layer.get_submodule(name)
    weight = _weight(layer, name).float()
    return weight + module.get_delta_weight(ADAPTER).float() if isinstance(module, lora.Linear) else weight


def _weight(layer: nn.Module, name: str) -> Tensor:
    """Returns the frozen weight of a sublayer, without its adapter."""
    module: Any = layer.get_submodule(name)
    weight: Tensor = getattr(module, "base_layer", module).weight
    return weight
