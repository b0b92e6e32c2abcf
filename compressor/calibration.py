"""What the training data says about the weights: the inputs they meet, and how much the loss depends on them.

Three statistics of each layer, gathered by hooks while the dense model reads some training rows in batches:

- the Gram matrix of its inputs, ``XXᵀ`` over all tokens that are not padding (DRONE);
- the empirical Fisher information of its weights, the mean over rows of the squared gradient of the task's loss,
  summed over each output row of W (FWSVD);
- the importance of its outputs: how far the hidden states of the model move with each (data_aware.py);

and one that is measured layer by layer: how far the model moves when other weights take a layer's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.config import ConfigError
from compressor.data import Feature, collate
from compressor.layers import StackSpec, finite_weight, linear_layer
from compressor.losses import LABELS, distillation_loss, hidden_loss, task_loss
from compressor.progress import progress
from compressor.tasks import Task

# The importance of outputs needs fewer rows than the inputs of layers: it is one number an output, of all their tokens.
_IMPORTANCE_ROWS = 256
_PROBES = 2


@dataclass(frozen=True)
class Calibration:
    """Training features that a method may look at; it draws as many as it needs."""

    features: Sequence[Feature]
    task: Task
    pad_id: int
    batch_size: int = 32
    seed: int = 0

    def batches(self, n_rows: int) -> list[dict[str, Tensor]]:
        """``n_rows`` random rows (all, if there are fewer), those of like length together."""
        if not self.features:
            raise ConfigError("there is nothing to calibrate on: no training example gave a usable feature")
        chosen = np.random.default_rng(self.seed).permutation(len(self.features))[:n_rows].tolist()
        rows = sorted((self.features[i] for i in chosen), key=lambda row: len(row["input_ids"]))
        starts = range(0, len(rows), self.batch_size)
        return [collate(rows[start : start + self.batch_size], self.pad_id) for start in starts]


def inputs_of(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What the ``model`` reads of a batch, all but the labels, on its device."""
    return {name: tensor.to(model.device) for name, tensor in batch.items() if name not in LABELS}


@torch.no_grad()
def input_grams(model: Any, specs: Sequence[StackSpec], calibration: Calibration, n_rows: int) -> dict[str, Tensor]:
    """``XXᵀ`` (N, N) float64 of each layer's inputs, by module name; the layers of a stack share one tensor."""
    grams: dict[str, Tensor] = {}
    mask = torch.empty(0, dtype=torch.bool)

    def add(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0][mask].double()  # (tokens, N)
            gram = tokens.T @ tokens
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    batches = calibration.batches(n_rows)
    handles = [model.get_submodule(spec.names[0]).register_forward_pre_hook(add(spec.names[0])) for spec in specs]
    with measuring(model, handles), progress("inputs of the layers", total=len(batches)) as advance:
        for batch in batches:
            inputs = inputs_of(batch, model)
            mask = inputs["attention_mask"].bool()
            model(**inputs)
            advance()
    for name, gram in grams.items():
        require_finite(gram, f"the inputs of {name}")
    return {name: grams[spec.names[0]] for spec in specs for name in spec.names}


def fisher_rows(model: Any, names: Sequence[str], calibration: Calibration, n_rows: int) -> dict[str, Tensor]:
    """``Σ_j E[(∂L/∂W_ij)²]`` (M,) float64 of each layer's weights, by module name; the mean is over rows of data.

    A row's gradient is ``Σ_t δ_t x_tᵀ`` over its tokens, so the sum over j of its squares is ``δ_iᵀ(XᵀX)δ_i`` with the
    tokens' Gram matrix: exact for each row of data, though a batch goes through the model at once.
    """
    totals: dict[str, Tensor] = {}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}  # inputs and their outputs' gradients

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: calls[name].append((x, gradient)))  # type: ignore[no-untyped-call]

        return hook

    batches = calibration.batches(n_rows)
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with measuring(model, handles), progress("Fisher information", total=len(batches)) as advance:
        for batch in batches:
            rows = {name: tensor.to(model.device) for name, tensor in batch.items()}
            inputs = {name: tensor for name, tensor in rows.items() if name not in LABELS}
            loss = task_loss(model(**inputs), rows, calibration.task) * len(rows["input_ids"])  # a sum, not a mean
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            for name, pairs in calls.items():
                # A layer that is called several times (ALBERT) has one gradient: its calls are further tokens.
                x = torch.cat([x for x, _ in pairs], dim=1).double()  # (rows, tokens, N)
                delta = torch.cat([gradient for _, gradient in pairs], dim=1).double()  # (rows, tokens, M)
                squares = (delta * (x @ x.transpose(1, 2) @ delta)).sum(dim=(0, 1))
                totals[name] = totals.get(name, torch.zeros_like(squares)) + squares
                pairs.clear()
            advance()
    for name, total in totals.items():
        require_finite(total, f"the gradients of {name}")
    n_seen = sum(len(batch["input_ids"]) for batch in batches)
    return {name: total.clamp_min(0) / n_seen for name, total in totals.items()}  # rounding may go below zero


def output_importance(model: Any, names: Sequence[str], calibration: Calibration, n_rows: int) -> dict[str, Tensor]:
    """``Σ_t ‖∂h/∂y_ti‖²`` (M,) float64 of each output y_i of each layer, by module name; t are the tokens of the data.

    h are the hidden states of all layers, each relative to its size, as distillation compares them. The squares are
    estimated by random projections: with v standard normal, ∂(v·h)/∂y has the square of ∂h/∂y for its mean.
    """
    totals: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(calibration.seed)
    outputs: list[tuple[str, Tensor]] = []  # of one batch; layers that share their weights (ALBERT) have several

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            outputs.append((name, output))

        return hook

    batches = calibration.batches(min(n_rows, _IMPORTANCE_ROWS))
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with measuring(model, handles), progress("importance of the outputs", total=len(batches)) as advance:
        for batch in batches:
            inputs = inputs_of(batch, model)
            mask = inputs["attention_mask"].unsqueeze(2)
            states = [state * mask for state in model(**inputs, output_hidden_states=True).hidden_states[1:]]
            for probe in range(_PROBES):
                projected = [
                    (state * torch.randn(state.shape, generator=generator).to(state)).sum() / state.detach().norm()
                    for state in states
                ]
                watched, more = [output for _, output in outputs], probe + 1 < _PROBES
                gradients = torch.autograd.grad(torch.stack(projected).sum(), watched, retain_graph=more)
                for (name, _), gradient in zip(outputs, gradients, strict=True):
                    squares = len(mask) * gradient.double().square().flatten(0, -2).sum(0)
                    totals[name] = totals[name] + squares if name in totals else squares
            outputs.clear()
            advance()
    return {name: require_finite(totals[name], f"the gradients of {name}") for name in names}


@torch.no_grad()
def displacement(
    model: Any, names: Sequence[str], stacked: Tensor, calibration: Calibration, n_rows: int
) -> tuple[float, float]:
    """How far the hidden states and the answers move when ``stacked`` (M, N) are the weights of these layers.

    The two losses of distillation (``train.py``) between the model as it is and the one with that weight, at
    temperature 1, averaged over rows. ``model`` is left as it was.
    """
    layers = [linear_layer(model, name) for name in names]
    own = [finite_weight(model, name).clone() for name in names]
    others = torch.split(stacked, [layer.out_features for layer in layers])
    hidden = answers = n_seen = 0.0
    try:
        with measuring(model, []):
            for batch in calibration.batches(n_rows):
                inputs = inputs_of(batch, model)
                outputs = []
                for weights in (own, others):
                    for layer, weight in zip(layers, weights, strict=True):
                        layer.weight.copy_(weight)
                    outputs.append(model(**inputs, output_hidden_states=True))
                before, after = outputs
                rows = len(inputs["input_ids"])
                n_seen += rows
                hidden += rows * float(hidden_loss(after, before, inputs["attention_mask"]))
                answers += rows * float(distillation_loss(after, before, inputs, calibration.task, 1.0))
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.copy_(weight)
    return hidden / n_seen, max(0.0, answers) / n_seen  # rounding may go below zero


@contextmanager
def measuring(model: Any, handles: Sequence[Any]) -> Iterator[None]:
    """The model without dropout; afterwards as it was, and without the hooks."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def require_finite(statistic: Tensor, what: str) -> Tensor:
    """The ``statistic``; raises :class:`ConfigError` where it is not finite."""
    if not torch.isfinite(statistic).all():
        raise ConfigError(f"{what} are not finite on the calibration data; check the checkpoint and the data")
    return statistic
