"""One training loop for every stage: dense fine-tuning, STF, and fine-tuning with frozen supports.

The task's gradient moves the weights; the dictionaries' gradient is that of ½‖W − SD‖² and is kept apart from it:
its own learning rate, its own clipping, no weight decay, collected once per step (see ``stf.py``). There is no loss
scaler anywhere: reduced precision is bfloat16, which needs none. A checkpoint holds everything the next step depends
on, so a killed run that is resumed gives the numbers of an unbroken one.

Several processes (``processes.py``) share the rows of each batch and add up the gradients of the task's loss, so they
do what one would with the whole batch. The gradient of the dictionaries needs no data: each has all of it, once.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import processes
from compressor.config import TrainConfig
from compressor.data import Feature, collate, length_bucketed_batches
from compressor.files import replace_file
from compressor.losses import LABELS, attention_loss, distillation_loss, hidden_loss, task_loss
from compressor.progress import progress
from compressor.stf import FactorizedLinear, code_model, pull_to_products, solve_dictionaries, stacks_of
from compressor.tasks import Task

log = logging.getLogger(__name__)

# Support flips are kept for so many parts of the run.
_FLIP_POINTS = 20


class TrainingError(RuntimeError):
    """Training cannot go on, or cannot be resumed; the message says why."""


@dataclass(frozen=True)
class TrainResult:
    """What a stage did: optimiser steps, wall-clock minutes, the last smoothed loss, mean support flip share.

    ``kept_step``: the step whose weights the model has now. ``support_flips``: the flip share through the run, from its
    first twentieth to its last; shorter where there was nothing to flip.
    """

    steps: int
    kept_step: int
    minutes: float
    loss: float
    support_flip_share: float
    support_flips: list[float] = field(default_factory=list)


def train(
    model: Any,
    features: Sequence[Feature],
    task: Task,
    config: TrainConfig,
    *,
    pad_id: int,
    checkpoint: Path,
    teacher: Any = None,
    score: Callable[[], float] | None = None,
    resume: bool = False,
    title: str = "training",
    subject: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place on ``features`` and leave the checkpoint file behind.

    With factorized stacks in the model this is STF (or frozen-support training, if the stacks are frozen). With a
    ``teacher`` the loss is the usual mix of the task's and the teacher's soft targets. ``score`` measures ``model`` as
    it is, more being better; with ``config.evaluate_every`` it is called after so many steps and after the last.
    ``subject``: plain values that say what is trained, where ``config`` does not; a checkpoint of another is refused.
    """
    if not features:
        raise TrainingError("there is nothing to train on: no example gave a usable feature")
    loop = _Loop(model, features, task, config, pad_id, teacher, score, subject)
    if resume and processes.from_first(checkpoint.exists):
        loop.load(checkpoint)
    shown = title if processes.is_first() else None
    with progress(shown, total=loop.total_steps, done=loop.step) as advance:
        while loop.step < loop.total_steps:
            loss = loop.advance()
            advance(f"loss {loss:.3f}")
            if processes.from_first(loop.save_is_due):
                loop.save(checkpoint)
    loop.keep_best()
    loop.save(checkpoint)
    kept, flips = loop.best_step or loop.step, sum(loop.flips) / max(1, sum(loop.codings))
    over_time = [total / times for total, times in zip(loop.flips, loop.codings, strict=True) if times]
    return TrainResult(loop.step, kept, loop.seconds / 60, loop.loss, flips, over_time)


class _Loop:
    """The state of one run; :meth:`advance` does one optimiser step."""

    def __init__(
        self,
        model: Any,
        features: Sequence[Feature],
        task: Task,
        config: TrainConfig,
        pad_id: int,
        teacher: Any,
        score: Callable[[], float] | None = None,
        subject: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.features, self.task, self.config = model, features, task, config
        self.pad_id, self.teacher, self.score, self.subject = pad_id, teacher, score, dict(subject or {})
        self.device = next(model.parameters()).device
        self.stacks = stacks_of(model)
        self.batches_per_epoch = math.ceil(len(features) / config.batch_size)
        self.total_steps = config.max_steps or max(1, config.min_steps, round(config.epochs * self.batches_per_epoch))
        # The step before which the supports are frozen, if they are.
        self.freeze_at = self.total_steps - round(config.frozen_share * self.total_steps)
        self.step, self.seconds, self.loss, self.saved = 0, 0.0, math.nan, time.monotonic()
        self.flips, self.codings = [0.0] * _FLIP_POINTS, [0] * _FLIP_POINTS
        self.best: dict[str, Tensor] | None = None
        self.best_step, self.best_score = 0, -math.inf
        self.bfloat16 = _use_bfloat16(config, self.device)
        torch.manual_seed(config.seed + (processes.rank() << 32))  # every process draws a dropout of its own
        if config.dropout is not None:
            set_dropout(model, config.dropout)
        processes.broadcast(list(model.parameters()))
        self.weights, self.factors, groups = _parameter_groups(model, config)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self._batches: Iterator[list[Feature]] = iter(())
        self._epoch = -1

    def _share_of_peak(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warmup = max(1, round(self.config.warmup_share * self.total_steps))
        return min((step + 1) / warmup, max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup)))

    @property
    def factorizes(self) -> bool:
        """Weights are coded anew as they move: STF, before its supports are frozen."""
        return bool(self.stacks) and not any(stack.frozen for stack in self.stacks)

    def advance(self) -> float:
        started = time.monotonic()
        self.model.train()
        if self.factorizes:
            part = self.step * _FLIP_POINTS // self.total_steps
            self.flips[part] += self._code(self.step % self.config.omp_interval == 0 or self.step == self.freeze_at)
            self.codings[part] += 1
            if self.step == self.freeze_at:
                self._freeze()
        batch, share = self._next_batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self._loss(batch) * share
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(
                f"the loss became {float(loss.detach())} at step {self.step}; lower the learning rate or check the data"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        value = self._add_up(loss)
        self._update()
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        self.step += 1
        every = self.config.evaluate_every
        if self.score and every and (self.step % every == 0 or self.step == self.total_steps):
            self._evaluate(self.score)
        self.seconds += time.monotonic() - started
        return self.loss

    def _add_up(self, loss: Tensor) -> float:
        """Gradients over all processes, of what the task's loss moves; returns the loss of the whole batch."""
        moved = self.weights if self.factorizes else [*self.weights, *self.factors]
        total = loss.detach()
        processes.add_up([*(p.grad for p in moved if p.grad is not None), total])
        return float(total)

    def _update(self) -> None:
        """One step of the optimiser with the gradients as they are."""
        config = self.config
        if config.pull and self.factorizes:
            pull_to_products(self.model, config.pull)
        nn.utils.clip_grad_norm_(self.weights, config.max_grad_norm)
        nn.utils.clip_grad_norm_(
            self.factors, config.dictionary_max_grad_norm if self.factorizes else config.max_grad_norm
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._share_of_peak(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.closed_form_share and self.factorizes:
            solve_dictionaries(self.model, config.closed_form_share)

    def _freeze(self) -> None:
        """From here on the supports stay, and D and the values are trained in the place of W.

        What else was trained keeps its moments.
        """
        for stack in self.stacks:
            stack.freeze_supports()
        moments = self.optimizer.state
        self.weights, self.factors, groups = _parameter_groups(self.model, self.config)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        for parameter in self.weights:
            if parameter in moments:
                self.optimizer.state[parameter] = moments[parameter]

    def _evaluate(self, score: Callable[[], float]) -> None:
        """Measure the model, and remember its weights if they are the best so far (of equals, the later ones)."""
        self._settle()
        value = processes.from_first(score)
        log.info("step %d: %.2f", self.step, value)
        if value >= self.best_score:
            self.best_step, self.best_score = self.step, value
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def keep_best(self) -> None:
        """Leave the model with the best weights measured, or with the last ones if none were."""
        if self.best is None:
            self._settle()
        else:
            self.model.load_state_dict(self.best)

    def _code(self, afresh: bool) -> float:
        return code_model(self.model, afresh=afresh, hysteresis=self.config.support_hysteresis)

    def _settle(self) -> None:
        """Codes of the weights as they are, so that a model is measured and kept as it was trained.

        That is with the supports of the last step; where every step codes afresh, as the next one would.
        """
        if self.factorizes:
            self._code(afresh=self.config.omp_interval == 1)

    def _next_batch(self) -> tuple[dict[str, Tensor], float]:
        """This process's rows of the next batch and their share of it: zero where there is no row left for it."""
        batch = {key: value.to(self.device) for key, value in collate(self._next(), self.pad_id).items()}
        rank, count, n_rows = processes.rank(), processes.count(), len(batch["input_ids"])
        own = range(rank, n_rows, count)
        step = count if own else n_rows  # without a row of its own a process takes one along, for nothing
        return {key: value[rank if own else 0 :: step] for key, value in batch.items()}, len(own) / n_rows

    def _next(self) -> list[Feature]:
        epoch, place = divmod(self.step, self.batches_per_epoch)
        if epoch != self._epoch:  # a new epoch, or the first step after a resume
            batches = length_bucketed_batches(self.features, self.config.batch_size, self.config.seed, epoch)
            self._batches, self._epoch = iter(batches[place:]), epoch
        return next(self._batches)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        config = self.config
        hidden = config.hidden_weight > 0 and self.teacher is not None
        attention = config.attention_weight > 0 and self.teacher is not None
        asked = {"output_hidden_states": hidden, "output_attentions": attention}
        outputs = self.model(**inputs, **asked)
        loss = task_loss(outputs, batch, self.task)
        if self.teacher is None or not (config.distill_weight or hidden or attention):
            return loss
        with torch.no_grad():
            soft = self.teacher(**inputs, **asked)
        taught = distillation_loss(outputs, soft, batch, self.task, config.distill_temperature)
        loss = (1 - config.distill_weight) * loss + config.distill_weight * taught
        if hidden:
            loss = loss + config.hidden_weight * hidden_loss(outputs, soft, batch["attention_mask"])
        if attention:
            loss = loss + config.attention_weight * attention_loss(outputs, soft, batch["attention_mask"])
        return loss

    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved > self.config.checkpoint_seconds

    def save(self, path: Path) -> None:
        """Write a checkpoint: the first process does, and all of them call this."""
        randoms = processes.from_all(_random_states(self.device))
        processes.from_first(lambda: self._write(path, randoms))
        self.saved = time.monotonic()

    def _write(self, path: Path, randoms: list[list[Tensor]]) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": randoms,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "flips": self.flips,
            "codings": self.codings,
            "best": self.best,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "fingerprint": self._fingerprint(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        replace_file(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        state = processes.from_first(lambda: _read(path))
        if state["fingerprint"] != self._fingerprint():
            raise TrainingError(
                f"the checkpoint {path} belongs to another configuration: {state['fingerprint']}, but this run is "
                f"{self._fingerprint()}; give the same options, or remove it to start over"
            )
        self.model.load_state_dict(state["model"])
        if self.factorizes and state["step"] > self.freeze_at:
            self._freeze()
        self.optimizer.load_state_dict(state["optimizer"])
        _set_random_states(state["random"][processes.rank()], self.device)
        for name in ("step", "seconds", "loss", "flips", "codings", "best", "best_step", "best_score"):
            setattr(self, name, state[name])
        log.info("resumed %s at step %d of %d", path, self.step, self.total_steps)

    def _fingerprint(self) -> dict[str, Any]:
        settings = asdict(replace(self.config, checkpoint_seconds=1.0))
        rows = {"task": self.task.name, "features": len(self.features), "steps": self.total_steps}
        return {**settings, **rows, "processes": processes.count(), **self.subject}


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(f"the checkpoint {path} cannot be read ({error}); remove it to start over") from error
    return state


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the processor and, where there is one, the accelerator."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _parameter_groups(
    model: nn.Module, config: TrainConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[dict[str, Any]]]:
    """Weights, factors, and the optimiser's groups: decay on matrices of the task alone, rates at their peak."""
    stacks = stacks_of(model)
    frozen = any(stack.frozen for stack in stacks)
    if frozen:
        for module in model.modules():
            if isinstance(module, FactorizedLinear):
                module.weight.requires_grad_(False)
    elif config.closed_form_share:
        for stack in stacks:
            stack.dictionary.requires_grad_(False)
    factors = [stack.dictionary for stack in stacks] + [stack.values for stack in stacks if frozen]
    factors = [factor for factor in factors if factor.requires_grad]
    known = {id(factor) for factor in factors}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    # With frozen supports the factors get the task's gradient and so the task's learning rate.
    factor_rate = config.learning_rate if frozen else config.dictionary_learning_rate
    decay, rate = config.weight_decay, config.learning_rate
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "peak": rate, "weight_decay": decay},
        {"params": [p for p in weights if p.dim() <= 1], "peak": rate, "weight_decay": 0.0},
        {"params": factors, "peak": factor_rate, "weight_decay": 0.0},
    ]
    return weights, factors, [group for group in groups if group["params"]]


def set_dropout(model: nn.Module, share: float) -> None:
    """Give every dropout of the model this probability (0 makes a CPU step a quarter faster)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = share  # type: ignore[assignment]


def _use_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without native instructions PyTorch emulates bfloat16, which is slower than float32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
