"""One training loop for every stage: dense fine-tuning, STF, and fine-tuning with frozen supports.

The task's gradient moves the weights; the dictionaries' gradient is that of ½‖W − SD‖² and is kept apart from it:
its own learning rate, its own clipping, no weight decay, collected once per step (see ``stf.py``). There is no loss
scaler anywhere: reduced precision is bfloat16, which needs none. A checkpoint holds everything the next step depends
on, so a killed run that is resumed gives the numbers of an unbroken one.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.config import TrainConfig
from compressor.data import Feature, collate, length_bucketed_batches
from compressor.files import replace_file
from compressor.progress import progress
from compressor.stf import FactorizedLinear, code_model, stacks_of
from compressor.tasks import Task

log = logging.getLogger(__name__)

LABELS = ("labels", "start_positions", "end_positions")


class TrainingError(RuntimeError):
    """Training cannot go on, or cannot be resumed; the message says why."""


@dataclass(frozen=True)
class TrainResult:
    """What a stage did: optimiser steps, wall-clock minutes, the last smoothed loss, mean support flip share.

    ``kept_step``: the step whose weights the model has now.
    """

    steps: int
    kept_step: int
    minutes: float
    loss: float
    support_flip_share: float


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
    if resume and checkpoint.exists():
        loop.load(checkpoint)
    saved = time.monotonic()
    with progress(title, total=loop.total_steps, done=loop.step) as advance:
        while loop.step < loop.total_steps:
            loss = loop.advance()
            advance(f"loss {loss:.3f}")
            if time.monotonic() - saved > config.checkpoint_seconds:
                loop.save(checkpoint)
                saved = time.monotonic()
    loop.keep_best()
    loop.save(checkpoint)
    kept, flips = loop.best_step or loop.step, loop.flips / max(1, loop.codings)
    return TrainResult(loop.step, kept, loop.seconds / 60, loop.loss, flips)


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
        self.frozen = any(stack.frozen for stack in self.stacks)
        self.batches_per_epoch = math.ceil(len(features) / config.batch_size)
        self.total_steps = config.max_steps or max(1, config.min_steps, round(config.epochs * self.batches_per_epoch))
        self.step, self.seconds, self.loss, self.flips, self.codings = 0, 0.0, math.nan, 0.0, 0
        self.best: dict[str, Tensor] | None = None
        self.best_step, self.best_score = 0, -math.inf
        self.bfloat16 = _use_bfloat16(config, self.device)
        torch.manual_seed(config.seed)
        if config.dropout is not None:
            set_dropout(model, config.dropout)
        self.weights, self.dictionaries, groups = _parameter_groups(model, config)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_peak)
        self._batches: Iterator[list[Feature]] = iter(())
        self._epoch = -1

    def _share_of_peak(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warmup = max(1, round(self.config.warmup_share * self.total_steps))
        return min((step + 1) / warmup, max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup)))

    def advance(self) -> float:
        started = time.monotonic()
        self.model.train()
        if self.stacks and not self.frozen:
            self.flips += code_model(self.model, afresh=self.step % self.config.omp_interval == 0)
            self.codings += 1
        batch = {key: value.to(self.device) for key, value in collate(self._next(), self.pad_id).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self._loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {self.step}; lower the learning rate or check the data"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        for parameters in (self.weights, self.dictionaries):
            nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        self.step += 1
        every = self.config.evaluate_every
        if self.score and every and (self.step % every == 0 or self.step == self.total_steps):
            self._evaluate(self.score)
        self.seconds += time.monotonic() - started
        return self.loss

    def _evaluate(self, score: Callable[[], float]) -> None:
        """Measure the model, and remember its weights if they are the best so far (of equals, the later ones)."""
        self._code()
        value = score()
        log.info("step %d: %.2f", self.step, value)
        if value >= self.best_score:
            self.best_step, self.best_score = self.step, value
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def keep_best(self) -> None:
        """Leave the model with the best weights measured, or with the last ones if none were."""
        if self.best is None:
            self._code()
        else:
            self.model.load_state_dict(self.best)

    def _code(self) -> None:
        if self.stacks and not self.frozen:
            code_model(self.model)

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
        outputs = self.model(**inputs, output_hidden_states=hidden)
        loss = task_loss(outputs, batch, self.task)
        if self.teacher is None or not (config.distill_weight or hidden):
            return loss
        with torch.no_grad():
            soft = self.teacher(**inputs, output_hidden_states=hidden)
        taught = distillation_loss(outputs, soft, batch, self.task, config.distill_temperature)
        loss = (1 - config.distill_weight) * loss + config.distill_weight * taught
        if hidden:
            loss = loss + config.hidden_weight * hidden_loss(outputs, soft, batch["attention_mask"])
        return loss

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
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
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TrainingError(f"the checkpoint {path} cannot be read ({error}); remove it to start over") from error
        if state["fingerprint"] != self._fingerprint():
            raise TrainingError(
                f"the checkpoint {path} belongs to another configuration: {state['fingerprint']}, but this run is "
                f"{self._fingerprint()}; give the same options, or remove it to start over"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"].cpu())
        for name in ("step", "seconds", "loss", "flips", "codings", "best", "best_step", "best_score"):
            setattr(self, name, state[name])
        log.info("resumed %s at step %d of %d", path, self.step, self.total_steps)

    def _fingerprint(self) -> dict[str, Any]:
        settings = asdict(replace(self.config, checkpoint_seconds=1.0))
        rows = {"task": self.task.name, "features": len(self.features), "steps": self.total_steps}
        return {**settings, **rows, **self.subject}


def task_loss(outputs: Any, batch: dict[str, Tensor], task: Task) -> Tensor:
    """The task's own loss: cross-entropy, squared error for regression, start and end averaged for QA."""
    if task.kind == "qa":
        start = nn.functional.cross_entropy(outputs.start_logits, batch["start_positions"])
        return (start + nn.functional.cross_entropy(outputs.end_logits, batch["end_positions"])) / 2
    if task.problem_type == "regression":
        return nn.functional.mse_loss(outputs.logits.squeeze(-1), batch["labels"].to(outputs.logits.dtype))
    return nn.functional.cross_entropy(outputs.logits, batch["labels"])


def distillation_loss(outputs: Any, soft: Any, batch: dict[str, Tensor], task: Task, temperature: float) -> Tensor:
    """KL to the teacher's distribution at ``temperature``, scaled by its square; squared error for regression."""
    if task.problem_type == "regression":
        return nn.functional.mse_loss(outputs.logits, soft.logits)
    if task.kind == "qa":
        padding = batch["attention_mask"] == 0
        pairs = [
            (
                getattr(outputs, name).masked_fill(padding, -1e4),
                getattr(soft, name).masked_fill(padding, -1e4),
            )
            for name in ("start_logits", "end_logits")
        ]
    else:
        pairs = [(outputs.logits, soft.logits)]
    losses = [
        nn.functional.kl_div(
            (student / temperature).log_softmax(1),
            (target / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        for student, target in pairs
    ]
    return torch.stack(losses).mean() * temperature**2


def hidden_loss(outputs: Any, soft: Any, attention_mask: Tensor) -> Tensor:
    """Squared distance to the teacher's hidden states relative to their size, averaged over the layers.

    Every layer is compared with its own twin, so each gets a near and dense signal; the embeddings are not
    factorized and are left out. Relative, so that one weight suits models of every scale.
    """
    mask = attention_mask.unsqueeze(2)
    layers = [
        ((student - target).square() * mask).sum() / (target.square() * mask).sum()
        for student, target in zip(outputs.hidden_states[1:], soft.hidden_states[1:], strict=True)
    ]
    return torch.stack(layers).mean()


def _parameter_groups(
    model: nn.Module, config: TrainConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[dict[str, Any]]]:
    """Weights, dictionaries, and the optimiser's groups: decay on matrices of the task alone."""
    stacks = stacks_of(model)
    frozen = any(stack.frozen for stack in stacks)
    if frozen:
        for module in model.modules():
            if isinstance(module, FactorizedLinear):
                module.weight.requires_grad_(False)
    factors = [stack.dictionary for stack in stacks] + [stack.values for stack in stacks if frozen]
    known = {id(factor) for factor in factors}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    # With frozen supports the factors get the task's gradient and so the task's learning rate.
    factor_rate = config.learning_rate if frozen else config.dictionary_learning_rate
    groups = [
        {
            "params": [p for p in weights if p.dim() > 1],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in weights if p.dim() <= 1], "lr": config.learning_rate, "weight_decay": 0.0},
        {"params": factors, "lr": factor_rate, "weight_decay": 0.0},
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
