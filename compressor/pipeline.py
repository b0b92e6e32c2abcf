"""The stages of a compression and what they hand to each other: folders, so that a killed run goes on from the last.

finetune   model → dense checkpoint                 (FT)
compress   dense checkpoint → compressed checkpoint (one of methods.py: factorize, then train)
export     checkpoint → model folder for the service
run        all of them, and the measured card
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from compressor import checkpoint, processes
from compressor.calibration import Calibration
from compressor.checkpoint import Checkpoint, Record
from compressor.config import CompressionConfig, ConfigError, KSVDConfig, Schedule, TrainConfig
from compressor.data import Example, Feature, classify_features, complete_task, data_files, load_examples, qa_features
from compressor.evaluate import answer, evaluate_folder, evaluate_model
from compressor.export import EmbeddingStorage, Storage, export
from compressor.fake_quantize import on_grid
from compressor.files import replace_file
from compressor.ksvd import factorize, relative_error, svd_error
from compressor.layers import StackSpec, stacked_weight
from compressor.methods import Method, dense_weights, find_schedule, relative_errors
from compressor.progress import progress
from compressor.scoring import agreement, score
from compressor.starts import start_of
from compressor.stf import plan_model
from compressor.tasks import Task, find_task
from compressor.train import TrainResult, train

log = logging.getLogger(__name__)

# How the service calls models: as their methods, but for two.
_VARIANTS = {None: "dense", "ds": "dsformer"}
# Share of a user's only file that is held out to measure on.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Data:
    """Where the examples come from: a folder of known tasks, the user's own files, or (neither given) the hub.

    ``rows`` draws that many training rows at random, by the stage's seed.
    """

    task: str
    folder: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    rows: int | None = None

    def resolve(self) -> Task:
        """The task, with labels read from the user's file where it defines them."""
        return complete_task(find_task(self.task), self.train_file)

    def examples(self, task: Task, seed: int) -> tuple[list[Example], list[Example]]:
        """Training and validation examples; a user's single file is split by ``seed``."""
        sources = (self.folder, self.train_file, self.validation_file)
        training = load_examples(task, "train", *sources)
        if self.train_file and not self.validation_file:
            order = np.random.default_rng(seed).permutation(len(training)).tolist()
            held_out = max(1, round(_HELD_OUT * len(training)))
            if held_out == len(training):
                raise ConfigError(f"{self.train_file} has one example; training needs at least two")
            validation = [training[i] for i in order[:held_out]]
            training = [training[i] for i in order[held_out:]]
            log.info("held out %d of the rows of %s to measure on", held_out, self.train_file)
        else:
            validation = self.validation(task)
        if self.rows is not None and self.rows < len(training):
            order = np.random.default_rng(seed).permutation(len(training)).tolist()
            training = [training[i] for i in order[: self.rows]]
        return training, validation

    def validation(self, task: Task) -> list[Example]:
        return load_examples(task, "validation", self.folder, self.train_file, self.validation_file)


def features_of(examples: Sequence[Example], tokenizer: Any, task: Task, config: TrainConfig) -> list[Feature]:
    """Training features of the task's kind."""
    if task.kind == "qa":
        return qa_features(
            examples,  # type: ignore[arg-type]
            tokenizer,
            config.max_length,
            config.doc_stride,
            training=True,
            unanswerable=task.unanswerable,
        )
    return classify_features(examples, tokenizer, config.max_length)  # type: ignore[arg-type]


def finetune(
    source: str,
    data: Data,
    config: TrainConfig,
    output: Path,
    *,
    fake_quantize: bool = False,
    resume: bool = False,
    measure: bool = True,
) -> Record:
    """Fine-tune ``source`` densely and write the checkpoint folder ``output``.

    ``fake_quantize``: on an 8-bit grid (fake_quantize.py); the record has the metrics on it as ``metrics_on_grid``.
    """
    task = data.resolve()
    torch.manual_seed(config.seed)  # the task head is drawn here
    loaded = checkpoint.load(source, task)
    model = loaded.model.to(_device())
    training, validation = data.examples(task, config.seed)
    features = features_of(training, loaded.tokenizer, task, config)
    quantized: dict[str, Any] = {}
    with on_grid(model) if fake_quantize else nullcontext():
        result = train(
            model,
            features,
            task,
            config,
            pad_id=loaded.tokenizer.pad_token_id,
            checkpoint=_beside(output, "training.pt"),
            score=_headline(model, loaded.tokenizer, task, validation),
            resume=resume,
            title=f"fine-tuning on {task.name}",
            subject={"fake_quantize": True} if fake_quantize else None,
        )
        if fake_quantize and measure:
            quantized["metrics_on_grid"] = evaluate_model(model, loaded.tokenizer, task, validation)
    record = Record(
        task=task.name,
        base_model=model_name(source),
        stage="finetune",
        seed=config.seed,
        minutes=round(result.minutes, 1),
        train=asdict(config),
        versions=versions(),
        extra={
            "train_rows": len(training),
            "validation_rows": len(validation),
            "steps": result.steps,
            "kept_step": result.kept_step,
            **quantized,
        },
    )
    return _finish(output, model, loaded.tokenizer, task, validation if measure else [], record)


def compress(
    source: str,
    data: Data,
    method: Method,
    config: TrainConfig,
    output: Path,
    *,
    schedule: Schedule | None = None,
    teacher: str | None = None,
    resume: bool = False,
    measure: bool = True,
    starts: Path | None = None,
) -> Record:
    """Factorize the fine-tuned checkpoint ``source`` by ``method`` and train what comes of it into ``output``.

    A checkpoint that is factorized already is trained further from its own factors. ``schedule``: one of the method's,
    by default its first. ``teacher``: the checkpoint to learn from besides the task; by default the dense ``source``
    as it was. ``starts``: a folder that keeps factors for other runs (starts.py); by default they are kept until the
    run ends.
    """
    task = data.resolve()
    schedule = find_schedule(method, schedule)
    loaded = checkpoint.load(source, task)
    _require_startable(source, loaded, method, config, teacher)
    model, pad_id = loaded.model.to(_device()), loaded.tokenizer.pad_token_id
    if not loaded.factors:
        method.prepare(model)
    method.plan(model)  # what cannot work is refused before any data is read
    training, validation = data.examples(task, config.seed)
    features = features_of(training, loaded.tokenizer, task, config)
    guide = None if schedule == "ft-f" else _teacher(model, teacher, task, config)
    before = loaded.record if loaded.factors else None
    calibration = Calibration(features, task, pad_id, config.batch_size, config.seed)
    memory = _beside(output, "sizes.json")
    if not resume and processes.is_first():
        memory.unlink(missing_ok=True)
    undecided = method
    method = processes.from_first(lambda: undecided.settle(model, loaded.factors, calibration, memory))
    plan = method.plan(model)
    kept = starts or _beside(output, "starts")
    factors: Sequence[Any] = loaded.factors or processes.from_first(
        lambda: start_of(kept, method, model, plan, calibration)
    )
    dense_answers = None
    if measure and not loaded.factors and processes.is_first():
        dense_answers = answer(model, loaded.tokenizer, task, validation, name="the dense model")
    weights = dense_weights(model, factors)
    method.attach(model, plan, factors, schedule)
    errors = None if loaded.factors else relative_errors(model, factors, weights)
    del weights, factors
    if schedule == "ft-f":
        result = TrainResult(steps=0, kept_step=0, minutes=0.0, loss=math.nan, support_flip_share=0.0)
    else:
        result = train(
            model,
            features,
            task,
            config,
            pad_id=pad_id,
            checkpoint=_beside(output, "training.pt"),
            teacher=guide,
            score=_headline(model, loaded.tokenizer, task, validation),
            resume=resume,
            title=f"{schedule} on {task.name}",
            subject={"method": repr(method), "schedule": schedule},
        )
    steps_before = int(before.extra.get("steps") or 0) if before else 0
    record = Record(
        task=task.name,
        base_model=loaded.record.base_model if loaded.record else Path(source).name,
        stage=schedule,
        seed=config.seed,
        minutes=round(result.minutes + (before.minutes if before else 0), 1),
        train=asdict(config),
        compression={"method": method.name, **((before and before.compression) or method.describe(plan, errors))},
        teacher_metrics=loaded.record.metrics if loaded.record else None,
        versions=versions(),
        extra={
            "train_rows": len(training),
            "validation_rows": len(validation),
            "steps": steps_before + result.steps,
            "kept_step": steps_before + result.kept_step,
            "support_flip_share": round(result.support_flip_share, 5),
            "support_flips": [round(share, 5) for share in result.support_flips],
        },
    )
    examples = validation if measure else []
    return _finish(output, model, loaded.tokenizer, task, examples, record, method, dense_answers)


def measure(source: str, data: Data) -> Record:
    """The record of the fine-tuned checkpoint ``source`` with its metrics on ``data``; it is left as it is."""
    task = data.resolve()
    loaded = checkpoint.load(source, task)
    validation = data.validation(task)
    record = loaded.record or Record(
        task.name, model_name(source), "finetune", seed=0, minutes=0.0, versions=versions()
    )
    record.metrics = evaluate_model(loaded.model.to(_device()), loaded.tokenizer, task, validation)
    record.extra = {"train_rows": None, "steps": None, **record.extra, "validation_rows": len(validation)}
    return record


def _require_startable(
    source: str, loaded: Checkpoint, method: Method, config: TrainConfig, teacher: str | None
) -> None:
    """A dense checkpoint is; a factorized one by the same method, with another one to teach it."""
    if not loaded.factors:
        return
    if loaded.method != method.name:
        raise ConfigError(
            f"{source} is compressed by {loaded.method} already; say --method {loaded.method} to train it further, or "
            f"give the dense checkpoint to compress it by {method.name}"
        )
    if _is_taught(config) and not teacher:
        raise ConfigError(
            f"{source} is factorized already, and cannot be its own teacher; to train it further give the dense "
            f"checkpoint as --teacher, or say --no-distill"
        )


def _is_taught(config: TrainConfig) -> bool:
    return bool(config.distill_weight or config.hidden_weight or config.attention_weight)


def _teacher(model: Any, teacher: str | None, task: Task, config: TrainConfig) -> Any:
    """What the model learns from besides the task: the checkpoint ``teacher`` or a copy of itself; perhaps nothing."""
    if not _is_taught(config):
        return None
    guide = checkpoint.load(teacher, task).model.to(_device()) if teacher else copy.deepcopy(model)
    guide.eval().requires_grad_(False)
    _require_alike(guide, model, config)
    return guide


def _require_alike(teacher: Any, model: Any, config: TrainConfig) -> None:
    """The teacher reads the same tokens, and has as many of the states and maps that are compared."""
    names = ["vocab_size"]
    names += ["num_hidden_layers"] if config.hidden_weight or config.attention_weight else []
    names += ["hidden_size"] if config.hidden_weight else []
    names += ["num_attention_heads"] if config.attention_weight else []
    for name in names:
        expected, found = getattr(model.config, name), getattr(teacher.config, name)
        if found != expected:
            raise ConfigError(
                f"the teacher's {name} is {found}, but the model's {expected}"
                + ("; compare logits alone: --hidden-weight 0 --attention-weight 0" if name != "vocab_size" else "")
            )


def _headline(model: Any, tokenizer: Any, task: Task, validation: Sequence[Example]) -> Callable[[], float]:
    """What weights are chosen by: the task's first metric over the validation set, of the model as it is then."""
    return lambda: evaluate_model(model, tokenizer, task, validation, show=False)[task.metric_names[0]]


def _finish(
    output: Path,
    model: Any,
    tokenizer: Any,
    task: Task,
    validation: Sequence[Example],
    record: Record,
    method: Method | None = None,
    dense_answers: Sequence[Any] | None = None,
) -> Record:
    """Save a trained model's folder, measure it (on no examples: not at all), and drop the training state.

    With the ``dense_answers`` to the same examples the record also has, as ``agreement``, how far the model keeps to
    them (scoring.py): of a small dev set that says more than the difference of two scores.

    Saved before it is measured, so that whoever stops the measuring has the model all the same. Of several processes
    the first does it.
    """

    def finished() -> Record:
        checkpoint.save(output, model, tokenizer, record, method)
        if validation:
            answers = answer(model, tokenizer, task, validation)
            record.metrics = score(task, validation, answers)
            if dense_answers is not None:
                record.extra["agreement"] = round(agreement(task, dense_answers, answers), 3)
            checkpoint.save_record(output, record)
        for name in ("training.pt", "sizes.json"):
            _beside(output, name).unlink(missing_ok=True)
        shutil.rmtree(_beside(output, "starts"), ignore_errors=True)
        return record

    return processes.from_first(finished)


def export_checkpoint(
    source: Path,
    data: Data,
    output: Path,
    *,
    storage: Storage = "int8",
    embeddings: EmbeddingStorage | None = None,
    measure: bool = True,
) -> dict[str, Any]:
    """Write the model folder ``output`` for the service from a checkpoint folder; returns its card.

    The card's numbers are measured on the exported model itself, over the whole validation set.
    """
    task = data.resolve()
    loaded = checkpoint.load(str(source), task)
    record = loaded.record or Record(task.name, source.name, "unknown", 0, 0.0, versions=versions())
    _, validation = data.examples(task, record.seed) if data.train_file else ([], data.validation(task))
    card: dict[str, Any] = {
        "task": task.name,
        "base_model": record.base_model,
        "stage": record.stage,
        "seed": record.seed,
        "training_minutes": record.minutes,
        "train": record.train,
        "compression": record.compression,
        "data": {key: record.extra.get(key) for key in ("train_rows", "validation_rows", "steps", "kept_step")},
        "versions": record.versions,
        "cpu": kernels.cpu_name(),
    }
    compression = record.compression or {}
    entry = {
        "task": task.kind,
        "variant": _VARIANTS.get(loaded.method, loaded.method),
        "preset": compression.get("preset"),
        "gamma": compression.get("gamma"),
        "delta": compression.get("delta"),
        "block_size": compression.get("block_size"),
        "base_model": record.base_model,
    }
    factors = {factor.members[0]: factor for factor in loaded.factors}
    card["sizes"] = export(
        loaded.model,
        loaded.tokenizer,
        factors or None,
        output,
        config_entry=entry,
        storage=storage,
        embeddings=embeddings,
        check_texts=_texts(validation),
        card=card,
    )
    if measure:
        card["metrics"] = evaluate_folder(output, task, validation)
        write_card(output, card)
    return card


def write_card(folder: Path, card: dict[str, Any]) -> None:
    replace_file(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())


def run(
    source: str,
    data: Data,
    method: Method,
    dense: TrainConfig,
    compressing: TrainConfig,
    output: Path,
    *,
    work: Path,
    dense_output: Path | None = None,
    finetuned: bool = False,
    schedule: Schedule | None = None,
    storage: Storage = "int8",
    embeddings: EmbeddingStorage | None = None,
) -> dict[str, Any]:
    """Everything: fine-tune (unless ``finetuned``), compress, export dense and compressed, measure both.

    Stages leave their folders in ``work``; a stage whose folder is there with the same settings is not run again.
    """
    task = data.resolve()
    schedule = find_schedule(method, schedule)
    method.plan(checkpoint.load(source, task).model)  # settings that do not fit are refused before hours of work
    if finetuned:
        dense_folder = Path(source)
    else:
        dense_folder = work / f"dense-{_digest(source, data, dense)}"
        if not processes.from_first(lambda: checkpoint.load_record(dense_folder)):
            finetune(source, data, dense, dense_folder, resume=True, measure=False)
    key = _digest(source, data, dense, method, compressing, schedule)
    compressed_folder = work / f"compressed-{key}"
    if not processes.from_first(lambda: checkpoint.load_record(compressed_folder)):
        compress(
            str(dense_folder),
            data,
            method,
            compressing,
            compressed_folder,
            schedule=schedule,
            resume=True,
            measure=False,
        )

    def exported() -> dict[str, Any]:
        stored: dict[str, Any] = {"storage": storage, "embeddings": embeddings}
        dense_card = export_checkpoint(dense_folder, data, dense_output or work / "dense-onnx", **stored)
        card = export_checkpoint(compressed_folder, data, output, **stored)
        headline = task.metric_names[0]
        card["dense"] = {"metrics": dense_card["metrics"], "sizes": dense_card["sizes"]}
        card["drop"] = {headline: round(dense_card["metrics"][headline] - card["metrics"][headline], 3)}
        write_card(output, card)
        return card

    return processes.from_first(exported)


def error_table(source: str, task: str, compression: CompressionConfig, ksvd: KSVDConfig) -> list[dict[str, Any]]:
    """K-SVD against SVD at the same eq.-11 size, matrix by matrix (the paper's figure 1)."""
    model = checkpoint.load(source, find_task(task)).model.to(_device())
    planned = plan_model(model, compression)
    rows = []
    with progress("K-SVD against SVD", total=len(planned)) as advance:
        for spec, plan in planned:
            weight = stacked_weight(model, spec.names).detach()
            rank, low_rank = svd_error(weight, plan.inverse_ratio)
            sparse = relative_error(weight, factorize(weight, plan, ksvd).dense())
            rows.append(
                {
                    "matrix": _short_name(spec),
                    "shape": f"{plan.out_features}x{plan.in_features}",
                    "CR": 1 / plan.inverse_ratio,
                    "K": plan.n_atoms,
                    "S": plan.n_nonzero,
                    "rank": rank,
                    "SVD": low_rank,
                    "DS": sparse,
                    "DS/SVD": sparse / low_rank if low_rank else math.nan,
                }
            )
            advance()
    return rows


def _short_name(spec: StackSpec) -> str:
    """``4.attention_output`` for the fourth layer's; where layers are shared, the role alone."""
    number = next((part for part in spec.names[0].split(".") if part.isdigit()), "")
    return f"{number}.{spec.role}".lstrip(".")


def model_name(source: str) -> str:
    """A hub id as it is, and a folder without the place on this machine where it lies."""
    return Path(source).name if Path(source).is_dir() else source


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in ("dsformer", "torch", "transformers", "onnxruntime", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _texts(validation: Sequence[Example]) -> list[Any]:
    """A few real inputs, short and long, on which the export is checked."""
    by_length = sorted(validation, key=lambda example: len(str(example)))
    return [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(8, len(by_length))).astype(int)]


def _digest(*values: Any) -> str:
    """Eight characters that name a stage: its settings, and the state of every file or folder among them."""
    states = [_state(path) for value in values for path in _paths(value)]
    return hashlib.sha256(repr((values, states)).encode()).hexdigest()[:8]


def _paths(value: Any) -> list[Path]:
    """The files a setting names: a model's folder, the user's own files; a hub id names none."""
    if isinstance(value, Data):
        task = find_task(value.task)
        own = [path for path in (value.train_file, value.validation_file) if path]
        shared = data_files(task, "train", value.folder) if value.folder and not own else []
        return own + shared
    return sorted(Path(value).iterdir()) if isinstance(value, str) and Path(value).is_dir() else []


def _state(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}.{name}")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
