"""Models on disk: Hugging Face folders.

A compressed checkpoint is one too: factors stand in the place of weights (huggingface.py), and what was done in
``training.json``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from compressor import huggingface
from compressor.config import ConfigError
from compressor.factors import WeightFactors, read_factors
from compressor.files import replace_file, replaced_folder
from compressor.layers import materialize
from compressor.methods import Method, find_method
from compressor.tasks import Task

# Beside dense effective weights, in folders of before factors took their place.
_FACTORS = "factors.safetensors"
RECORD = "training.json"


@dataclass
class Record:
    """What made a checkpoint; it travels into ``card.json``."""

    task: str
    base_model: str
    stage: str
    seed: int
    minutes: float
    train: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    teacher_metrics: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A loaded folder: dense effective weights, its tokenizer, and the factors and record if it has them.

    ``method``: the name of the one that the factors are of; None where there are none.
    """

    model: Any
    tokenizer: Any
    method: str | None
    factors: list[WeightFactors]
    record: Record | None


def load(source: str, task: Task) -> Checkpoint:
    """Load a model by folder or hub id, with a head for ``task``.

    Raises :class:`ConfigError` when it is no readable checkpoint, or its head was trained for other labels.
    """
    auto = AutoModelForQuestionAnswering if task.kind == "qa" else AutoModelForSequenceClassification
    heads: dict[str, Any] = {}
    if task.kind == "classify":
        names = task.label_names or ("score",)
        heads = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": task.problem_type,
        }
    if os.path.isdir(source) and not (Path(source) / "config.json").is_file():
        raise ConfigError(f"{source} is no model folder: it has no config.json")
    try:
        # eager attention: without it every training step on a CPU goes through a slower general path
        model = auto.from_pretrained(source, attn_implementation="eager", dtype=torch.float32, **heads)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:
        raise ConfigError(f"cannot load the model {source!r}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {source!r} has no fast form; the service needs a tokenizer.json")
    folder = Path(source)
    method, factors = _take_factors(model) if hasattr(model, "compression") else _factors_beside(folder)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"the checkpoint {source!r} is broken: {name} has entries that are not finite")
    return Checkpoint(model, tokenizer, method, factors, load_record(folder))


def save(target: Path, model: Any, tokenizer: Any, record: Record, method: Method | None = None) -> None:
    """Write a checkpoint folder; ``method``'s layers become plain ones that hold effective weights (in place)."""
    with replaced_folder(target) as folder:
        if method:
            huggingface.save(model, folder, method, record.stage)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_record(folder, record)
    materialize(model)


def save_record(folder: Path, record: Record) -> None:
    """Write what made a checkpoint, or what has been measured since, into its folder."""
    replace_file(folder / RECORD, (json.dumps(asdict(record), indent=2) + "\n").encode())


def _take_factors(model: Any) -> tuple[str, list[WeightFactors]]:
    """The method of a compressed model and its factors; the model gets plain layers, in place."""
    method, factors = model.compression.method.name, list(model.compression.factors(model))
    model.dequantize()
    return method, factors


def _factors_beside(folder: Path) -> tuple[str | None, list[WeightFactors]]:
    """The method of a compressed checkpoint and its factors; None and nothing for a dense one."""
    path = folder / _FACTORS
    if not path.is_file():
        return None, []
    try:
        return read_factors(path, lambda method: find_method(method).factors_type)
    except Exception as error:
        raise ConfigError(f"{path} is broken: {first_line(error)}; compress the model again") from error


def load_record(folder: Path) -> Record | None:
    path = folder / RECORD
    return Record(**json.loads(path.read_text())) if path.is_file() else None


def first_line(error: BaseException) -> str:
    """Of its message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
