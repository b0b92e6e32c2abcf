"""Models on disk: Hugging Face folders, with the factors beside the weights where there are any.

A compressed checkpoint is an ordinary folder whose weights are already S·D, so any tool can load it; the factors
themselves lie in ``factors.safetensors`` and what was done in ``training.json``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from compressor.config import ConfigError
from compressor.export import Factors
from compressor.files import replace_file, replaced_folder
from compressor.stf import materialize, stacks_of
from compressor.tasks import Task

FACTORS = "factors.safetensors"
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
    """A loaded folder: dense effective weights, its tokenizer, and the factors and record if it has them."""

    model: Any
    tokenizer: Any
    factors: list[Factors]
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
        raise ConfigError(f"cannot load the model {source!r}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {source!r} has no fast form; the service needs a tokenizer.json")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"the checkpoint {source!r} is broken: {name} has entries that are not finite")
    folder = Path(source)
    return Checkpoint(model, tokenizer, load_factors(folder), load_record(folder))


def save(target: Path, model: Any, tokenizer: Any, record: Record) -> None:
    """Write a checkpoint folder; a factorized model is turned into plain layers that hold S·D (in place)."""
    tensors, names = {}, []
    for i, stack in enumerate(stacks_of(model)):
        names.append(list(stack.names))
        tensors[f"{i}.dictionary"] = stack.dictionary.detach().contiguous().cpu()
        tensors[f"{i}.indices"] = stack.indices.to(torch.int32).contiguous().cpu()
        tensors[f"{i}.values"] = stack.values.detach().contiguous().cpu()
    materialize(model)
    with replaced_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if tensors:
            save_file(tensors, str(folder / FACTORS), metadata={"members": json.dumps(names)})
        save_record(folder, record)


def save_record(folder: Path, record: Record) -> None:
    """Write what made a checkpoint, or what has been measured since, into its folder."""
    replace_file(folder / RECORD, (json.dumps(asdict(record), indent=2) + "\n").encode())


def load_factors(folder: Path) -> list[Factors]:
    """The factors of a compressed checkpoint; empty for a dense one."""
    path = folder / FACTORS
    if not path.is_file():
        return []
    try:
        with safe_open(str(path), "np") as file:
            return [
                Factors(
                    tuple(members), *(file.get_tensor(f"{i}.{part}") for part in ("dictionary", "indices", "values"))
                )
                for i, members in enumerate(json.loads(file.metadata()["members"]))
            ]
    except Exception as error:
        raise ConfigError(f"{path} is broken: {_first_line(error)}; compress the model again") from error


def load_record(folder: Path) -> Record | None:
    path = folder / RECORD
    return Record(**json.loads(path.read_text())) if path.is_file() else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
