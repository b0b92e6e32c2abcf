"""Compressed checkpoints as Hugging Face folders: a method's factors in the place of the weights they stand for.

The file holds, for each set of weights, the factors' tensors under the name of the first member, and the members'
biases under their own names::

    bert.encoder.layer.0.attention.self.query.dictionary, .indices, .values      (Q, K and V)
    bert.encoder.layer.0.attention.self.query.bias, …key.bias, …value.bias

A loaded model computes with a method's own layers, which can be trained by Transformers' ``Trainer`` or any other
loop. Three hooks keep it whole:

- its state dict is the file's, in both directions. What STF holds besides, the weights W, is in no file: read again, W
  is S·D, so training that is resumed from a file does not give the very numbers of an unbroken run;
- weights are coded at the first forward pass, or save, after a step of an optimiser that moves them, so once a step
  however many batches its gradient is summed over.

``model.dequantize()`` gives plain linear layers instead, which compute faster and train without the factorization.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compressor.config import Schedule
from compressor.factors import WeightFactors
from compressor.layers import compressed_layers, linear_layer, materialize, replace_layer, set_weights
from compressor.methods import Method, find_method
from compressor.quantizer import DSFormerConfig
from compressor.stf import FactorizedLinear, code_model, stacks_of

# --- the file ------------------------------------------------------------------------------------------------


def save(model: Any, folder: Path, method: Method, schedule: str) -> None:
    """Write ``model``, whose layers are ``method``'s, to ``folder``; it is left as it is."""
    factors = method.collect(model)
    state = _compact(model, model.state_dict(), factors)
    model.config.quantization_config = DSFormerConfig(method.name, schedule, layout(factors))
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        del model.config.quantization_config


def layout(factors: Sequence[WeightFactors]) -> list[dict[str, Any]]:
    """What ``config.json`` says of them, so that a model can be made ready before its file is read."""
    return [
        {
            "members": list(factor.members),
            "tensors": {name: [str(each.dtype), list(each.shape)] for name, each in factor.tensors().items()},
        }
        for factor in factors
    ]


def _compact(
    model: nn.Module, state: dict[str, Tensor], factors: Sequence[WeightFactors], prefix: str = ""
) -> dict[str, Tensor]:
    """The state dict of a model with compressed layers as the file has it."""
    live = {prefix + name for name, _ in _live_tensors(model)}
    compact = {name: tensor for name, tensor in state.items() if name not in live}
    for name, layer in compressed_layers(model):
        if layer.bias is not None:
            compact[f"{prefix}{name}.bias"] = layer.bias.detach()
    for factor in factors:
        for name, array in factor.tensors().items():
            compact[f"{prefix}{factor.members[0]}.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    return compact


def _live_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that compressed layers hold, biases too."""
    inside = ("factorized_stacks.", *(f"{name}." for name, _ in compressed_layers(model)))
    every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*every):
        if name.startswith(inside):
            yield name, tensor


# --- loading -------------------------------------------------------------------------------------------------


class _Awaiting(nn.Module):
    """Stands in a linear layer's place while the file is read: its bias, and tensors where it is a first member."""

    def __init__(self, linear: nn.Linear, members: Sequence[str], tensors: dict[str, Any]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.members, self.names = tuple(members), tuple(tensors)
        for name, (dtype, shape) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device=linear.weight.device))


def await_factors(model: Any, factors: Sequence[dict[str, Any]]) -> None:
    """Make room in ``model``, in place, for what the file has in the place of weights."""
    for each in factors:
        members = [_name_here(model, name) for name in each["members"]]
        for i, name in enumerate(members):
            tensors = each["tensors"] if i == 0 else {}
            replace_layer(model, name, _Awaiting(linear_layer(model, name), members, tensors))


def _name_here(model: Any, name: str) -> str:
    """A module's name in ``model``, which may be the saved one without its head, or with one."""
    prefix = f"{model.base_model_prefix}."
    if model is model.base_model:
        return name.removeprefix(prefix)
    return name if name.startswith(prefix) else prefix + name


def receive_factors(model: Any, method: str, schedule: Any) -> list[dict[str, Any]]:
    """Turn what :func:`await_factors` made room for, and the file filled, into the method's layers, in place.

    Returns the factors' layout under this model's names.
    """
    kind = find_method(method).factors_type
    waiting = [(name, module) for name, module in model.named_modules() if isinstance(module, _Awaiting)]
    factors = [
        kind.from_tensors(module.members, {part: getattr(module, part).cpu().numpy() for part in module.names})
        for _, module in waiting
        if module.names
    ]
    for name, module in waiting:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device=model.device)
        linear.bias = module.bias
        replace_layer(model, name, linear)
    model.compression = Compression(model, _attach(model, method, schedule, factors), schedule)
    return layout(factors)


def _attach(model: nn.Module, method: str, schedule: Schedule, factors: Sequence[WeightFactors]) -> Method:
    """Put the method's layers in the place of linear ones, whose weights become those that the factors stand for."""
    for factor in factors:
        set_weights(model, factor.members, torch.from_numpy(factor.dense()))
    restored, plan = find_method(method).restore(factors)
    restored.attach(model, plan, factors, schedule)
    for module in model.modules():
        if isinstance(module, FactorizedLinear) and any(stack.frozen for stack in stacks_of(model)):
            module.weight.requires_grad_(False)  # the factors are trained in its place
    return restored


# --- a loaded model ------------------------------------------------------------------------------------------


class Compression:
    """What a loaded model knows of its compression, as ``model.compression``; it keeps codes and state dicts right."""

    def __init__(self, model: Any, method: Method, schedule: Schedule) -> None:
        self.method, self.schedule = method, schedule
        stacks = [stack for stack in stacks_of(model) if not stack.frozen]
        names = [name for stack in stacks for name in stack.names]
        # What codes depend on. STF's: all other methods' layers compute with what the optimiser moves.
        self.coded = [stack.dictionary for stack in stacks] + [model.get_submodule(name).weight for name in names]
        self.due = False
        self.hooks = [
            model.register_forward_pre_hook(_before_forward),
            model.register_state_dict_post_hook(_after_state_dict),
            model.register_load_state_dict_pre_hook(_before_load),
            model.register_load_state_dict_post_hook(_after_load),
        ]
        _watched.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is watched like the original."""
        self.__dict__.update(state)
        _watched.add(self)

    def factors(self, model: Any) -> Sequence[WeightFactors]:
        """As they are now."""
        self.code(model)
        return self.method.collect(model)

    def code(self, model: Any) -> None:
        """Code the weights, if they have been moved since they were coded."""
        if self.due:
            code_model(model)
            self.due = False


_watched: weakref.WeakSet[Compression] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Of any optimiser. Tensors' version counters would not tell: fused optimisers leave them as they are."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for compression in _watched:
        compression.due = compression.due or any(id(parameter) in moved for parameter in compression.coded)


register_optimizer_step_post_hook(_after_step)


def _before_forward(model: Any, _: Any) -> None:
    model.compression.code(model)


def _after_state_dict(model: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    compact = _compact(model, state, model.compression.factors(model), prefix)
    state.clear()
    state.update(compact)


def _before_load(model: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The file's factors → what the layers hold."""
    method, factors = model.compression.method, []
    for factor in model.compression.factors(model):
        names = {part: f"{prefix}{factor.members[0]}.{part}" for part in factor.tensors()}
        if not all(name in state for name in names.values()):
            return  # of another kind: let the usual complaint come
        arrays: dict[str, NDArray[Any]] = {part: state.pop(name).cpu().numpy() for part, name in names.items()}
        factors.append(method.factors_type.from_tensors(factor.members, arrays))
    shadow = materialize(copy.deepcopy(model))
    for name, _layer in compressed_layers(model):
        if (bias := f"{prefix}{name}.bias") in state:
            linear_layer(shadow, name).bias = nn.Parameter(state.pop(bias))
    _attach(shadow, method.name, model.compression.schedule, factors)
    state.update((prefix + name, tensor.detach()) for name, tensor in _live_tensors(shadow))


def _after_load(model: Any, _: Any) -> None:
    """The codes that were loaded hold."""
    model.compression.due = False


def release(model: Any) -> Any:
    """Plain linear layers with effective weights in the place of the method's, in place."""
    model.compression.code(model)
    for hook in model.compression.hooks:
        hook.remove()
    del model.compression
    return materialize(model)
