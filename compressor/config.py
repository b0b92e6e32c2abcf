"""How much to compress, and how to train: plain frozen values, checked before any work starts.

A layer with M = ``out_features`` rows and N = ``in_features`` columns is cut into N/B blocks of B columns;
each block becomes K = γ·M atoms and S = δ·B nonzeros a row (section 4.1 of the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

from kernels.banks import bank_limit

# Windows in tokens, as the published BERT results use them.
CLASSIFY_LENGTH = 128
QA_LENGTH = 384
QA_STRIDE = 128

# Short texts that are looked at before factorizing. 256 of CoLA's hold some 3,000 tokens, which leave the inputs of a
# layer 1,536 wide half unknown; windows of question answering hold ten times as many.
SHORT_CALIBRATION_ROWS = 1024

# Steps from one fresh coding to the next. Accuracy hardly depends on it, and coding at every step costs a third more
# (docs/results.md).
OMP_INTERVAL = 8

ROLES = ("qkv", "attention_output", "ffn1", "ffn2")
Role = Literal["qkv", "attention_output", "ffn1", "ffn2"]
Schedule = Literal["ft-f-stf", "ft-f-ft", "sr-ste", "ft-f"]  # ft-f: factorized and left as it is


class ConfigError(ValueError):
    """A setting that cannot work; the message says what was expected and what came."""


@dataclass(frozen=True)
class Preset:
    """γ per role and δ, as fractions of the layer's own sizes."""

    gamma: dict[str, Fraction]
    delta: Fraction


def _uniform(gamma: Fraction) -> dict[str, Fraction]:
    return dict.fromkeys(ROLES, gamma)


# The γ and δ that reproduce the paper's own ratios by its eq. 11 (BERT-base, averaged by parameters).
# Section 5.2 prints γ = 1/4, which cannot give them.
PRESETS = {
    "2x": Preset(
        dict(zip(ROLES, (Fraction(5, 36), Fraction(1, 6), Fraction(13, 96), Fraction(1, 6)), strict=True)),
        Fraction(9, 32),
    ),
    "2.8x": Preset(_uniform(Fraction(1, 8)), Fraction(3, 16)),
    "3.57x": Preset(_uniform(Fraction(1, 8)), Fraction(1, 8)),
}


@dataclass(frozen=True)
class LayerPlan:
    """The sizes of one factorized matrix.

    ``out_features`` M, ``in_features`` N, ``block_size`` B, ``n_atoms`` K, ``n_nonzero`` S; ``bank_limit``: most
    nonzeros of a row in one bank of atoms, None for no limit.
    """

    out_features: int
    in_features: int
    block_size: int
    n_atoms: int
    n_nonzero: int
    bank_limit: int | None = None

    @property
    def n_blocks(self) -> int:
        return self.in_features // self.block_size

    @property
    def inverse_ratio(self) -> float:
        """1/CR of this matrix by eq. 11: γ + (1 + log2(K)/32)·δ, indices included."""
        gamma = self.n_atoms / self.out_features
        delta = self.n_nonzero / self.block_size
        return gamma + (1 + math.log2(self.n_atoms) / 32) * delta

    @property
    def n_weights(self) -> int:
        """M·N"""
        return self.out_features * self.in_features

    @property
    def bits(self) -> float:
        """By eq. 11: float32 numbers, and indices at their information content."""
        return 32 * self.n_weights * self.inverse_ratio


@dataclass(frozen=True)
class Size:
    """K and S of one stack, by the name of its first layer."""

    name: str
    n_atoms: int
    n_nonzero: int


@dataclass(frozen=True)
class Budget:
    """The ``ratio`` by eq. 11 over all stacks, each with sizes of its own (allocation.py).

    ``calibration_rows`` of the training data are looked at to choose them.
    """

    ratio: float
    calibration_rows: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 1):
            raise ConfigError(f"--ratio must be greater than 1, got {self.ratio}")
        if self.calibration_rows < 1:
            raise ConfigError(f"--calibration-rows must be at least 1, got {self.calibration_rows}")


@dataclass(frozen=True)
class CompressionConfig:
    """γ and δ, either by preset or free, and the block size B (0: the model's head size).

    ``limit_banks``: rows spread their nonzeros over the banks of a dictionary, which makes inference faster.
    ``budget``: in place of γ and δ; ``sizes`` of all stacks are what has been chosen within it, or nothing yet.
    """

    preset: str = "2.8x"
    gamma: float | None = None
    delta: float | None = None
    block_size: int = 0
    limit_banks: bool = True
    budget: Budget | None = None
    sizes: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"unknown preset {self.preset!r}: the presets are {', '.join(PRESETS)}")
        for name, value in (("gamma", self.gamma), ("delta", self.delta)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {value}")
        if self.block_size < 0:
            raise ConfigError(f"block size must be positive (or 0 for the head size), got {self.block_size}")

    @property
    def name(self) -> str:
        """The preset's name, or ``custom`` when γ or δ was given, or ``allocated`` with a budget."""
        if self.budget:
            return "allocated"
        return self.preset if self.gamma is None and self.delta is None else "custom"

    def gamma_of(self, role: str) -> float:
        return self.gamma if self.gamma is not None else float(PRESETS[self.preset].gamma[role])

    def delta_value(self) -> float:
        return self.delta if self.delta is not None else float(PRESETS[self.preset].delta)

    def plan(self, name: str, role: str, out_features: int, in_features: int) -> LayerPlan:
        """Sizes for one matrix; raises :class:`ConfigError` where γ, δ and B do not fit it."""
        block = self.block_size
        given = next((size for size in self.sizes if size.name == name), None)
        if given:
            return self._layer(out_features, in_features, given.n_atoms, given.n_nonzero)
        if in_features % block:
            raise ConfigError(
                f"{name}: in_features {in_features} is not divisible by the block size {block}; "
                f"choose a block size that divides it"
            )
        n_atoms = round(self.gamma_of(role) * out_features)
        n_nonzero = round(self.delta_value() * block)
        if n_atoms <= block:
            raise ConfigError(
                f"{name}: gamma {self.gamma_of(role):.4g} gives {n_atoms} atoms for {out_features} rows, but "
                f"a dictionary needs more atoms than the block size {block}; raise gamma or lower the block size"
            )
        if n_nonzero < 1:
            raise ConfigError(
                f"{name}: delta {self.delta_value():.4g} gives no nonzero in a block of {block}; raise delta"
            )
        if n_nonzero > n_atoms:
            raise ConfigError(f"{name}: {n_nonzero} nonzeros a row exceed the {n_atoms} atoms; lower delta")
        return self._layer(out_features, in_features, n_atoms, n_nonzero)

    def _layer(self, out_features: int, in_features: int, n_atoms: int, n_nonzero: int) -> LayerPlan:
        limit = bank_limit(n_atoms, n_nonzero) if self.limit_banks else None
        return LayerPlan(out_features, in_features, self.block_size, n_atoms, n_nonzero, limit)


def compression_ratio(plans: list[LayerPlan]) -> float:
    """CR by eq. 11 over several matrices, averaged by parameters."""
    return 32 * sum(plan.n_weights for plan in plans) / sum(plan.bits for plan in plans)


@dataclass(frozen=True)
class MethodOptions:
    """What was asked of a compression method; a field at its default was not asked for.

    ``preset`` or ``ratio`` (the target by eq. 11) set the size. ``gamma`` to ``order_neurons`` are of ``ds``;
    ``pattern`` ("2:4") and ``sparse_decay`` of ``nm``; ``calibration_rows`` of ``fwsvd``, ``drone`` and a ``ds`` that
    is data-aware or has a ``ratio``; ``sequential`` and ``weigh_outputs`` of ``drone`` and a data-aware ``ds``.
    """

    preset: str | None = None
    ratio: float | None = None
    gamma: float | None = None
    delta: float | None = None
    block_size: int = 0
    limit_banks: bool = True
    iterations: int = 50
    dictionary_update: Literal["auto", "mod", "ksvd"] = "mod"
    data_aware: bool = False
    sequential: bool = False
    weigh_outputs: bool = False
    order_neurons: bool = False
    pattern: str = "2:4"
    sparse_decay: float = 2e-4
    calibration_rows: int = 256
    seed: int = 0

    def require_only(self, method: str, *names: str) -> None:
        """Raise :class:`ConfigError` for what was asked for and is none of ``names``: it would be ignored."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in (*names, "seed"):
                flag, known = field.name.replace("_", "-"), ", ".join(f"--{name.replace('_', '-')}" for name in names)
                raise ConfigError(f"--{flag} {value} means nothing to --method {method}; its options are {known}")

    def require_one_size(self) -> None:
        """Raise :class:`ConfigError` if ``ratio`` is not alone in setting the size."""
        for name in ("preset", "gamma", "delta"):
            value = getattr(self, name)
            if self.ratio is not None and value is not None:
                raise ConfigError(f"--{name} {value} and --ratio {self.ratio} both set the size; give one of them")

    def target_ratio(self) -> float:
        """The ratio by eq. 11 that was asked for; a preset's is the number in its name."""
        self.require_one_size()
        if self.ratio is not None:
            if not (math.isfinite(self.ratio) and self.ratio > 1):
                raise ConfigError(f"--ratio must be greater than 1, got {self.ratio}")
            return self.ratio
        name = CompressionConfig(self.preset or CompressionConfig.preset).preset
        return float(name.removesuffix("x"))


@dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    ``learning_rate`` is for the weights; the dictionaries have their own, since their gradient is that of
    ½‖W − SD‖² and not of the task. ``max_steps`` 0 means whole epochs, of which ``min_steps`` may
    demand more: two passes over a few hundred rows teach nothing. ``dropout`` None keeps the model's own.
    ``evaluate_every`` steps the model is measured on the validation set, and the best weights are kept; 0: the last.
    ``batch_size`` rows make one step, however many processes share them.

    Of STF: ``omp_interval`` steps from one fresh coding to the next. ``pull``: of W to S·D, relative to the task's
    gradient. ``closed_form_share``: how far D goes to its least-squares solution at each step, in place of a gradient
    step (0: the gradient). ``support_hysteresis``: a row's support stays unless another lowers its error by more than
    this share. ``frozen_share`` of the steps, the last ones, keep the supports and train D and the values by their true
    gradients.
    """

    epochs: float = 2.0
    max_steps: int = 0
    min_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 5e-5
    dictionary_learning_rate: float = 1e-3
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dictionary_max_grad_norm: float = 1.0
    max_length: int = CLASSIFY_LENGTH
    doc_stride: int = QA_STRIDE
    dropout: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    checkpoint_seconds: float = 120.0
    evaluate_every: int = 0
    omp_interval: int = 1
    pull: float = 0.0
    closed_form_share: float = 0.0
    support_hysteresis: float = 0.0
    frozen_share: float = 0.0
    distill_weight: float = 0.9
    distill_temperature: float = 2.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "dictionary_learning_rate", "max_length")
        norms = ("max_grad_norm", "dictionary_max_grad_norm")
        for name in (*positive, *norms, "omp_interval", "distill_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_share", "distill_weight", "closed_form_share", "frozen_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("pull", "hidden_weight", "attention_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.support_hysteresis < 1:
            raise ConfigError(f"support_hysteresis must lie in [0, 1), got {self.support_hysteresis}")
        if self.evaluate_every < 0:
            raise ConfigError(f"evaluate_every must be steps, or 0 for never, got {self.evaluate_every}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class KSVDConfig:
    """The single-shot factorization: ``iterations`` sweeps of coding and dictionary update.

    ``calibration_rows``: of the training data, that are looked at to make the layers' outputs right (data_aware.py);
    with none it is their weights, as in the paper. ``sequential``: the outputs on what a layer gets once the layers
    before it are factorized (sequential.py). ``weigh_outputs``: each by how far the model's hidden states move with it.
    """

    iterations: int = 50
    update: Literal["auto", "mod", "ksvd"] = "mod"
    seed: int = 0
    calibration_rows: int = 0
    sequential: bool = False
    weigh_outputs: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1, got {self.iterations}")
        if self.calibration_rows < 0:
            raise ConfigError(f"calibration rows must be 0 or more, got {self.calibration_rows}")
        if self.sequential and not self.calibration_rows:
            raise ConfigError("--sequential follows training rows through the layers, so it wants --data-aware too")
        if self.weigh_outputs and not self.calibration_rows:
            raise ConfigError("--weigh-outputs looks at training rows, so it wants --data-aware too")

    @property
    def sweeps(self) -> int:
        """Codings of one matrix or block in all: the first, and one after each update."""
        return (self.iterations + 1) * (2 if self.update == "auto" else 1)
