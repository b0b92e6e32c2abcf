"""Many runs of many methods, one JSON file a run: what ``results.py`` makes its tables and plots of.

A study is named by its runs: the dense reference of each task and seed, then every method at every size from that same
reference, all trained and distilled alike. Runs that have their file are not run again, so a killed study goes on where
it was, may be widened later, and may be worked off by several processes on one folder: each claims a run by a lock that
its death releases.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import kernels
from compressor import checkpoint, pipeline
from compressor.config import (
    CLASSIFY_LENGTH,
    PRESETS,
    QA_LENGTH,
    CompressionConfig,
    ConfigError,
    KSVDConfig,
    MethodOptions,
    Schedule,
    TrainConfig,
)
from compressor.files import replace_file
from compressor.methods import find_method, find_schedule
from compressor.progress import progress
from compressor.tasks import Task, find_task
from compressor.train import TrainingError

log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Budget:
    """What a run of a task may cost: training rows (None: all), examples a step, dense epochs, compressing steps."""

    rows: int | None
    batch_size: int
    dense_epochs: float
    steps: int


# Small tasks in full. Of the large ones so many rows as two cores read in a quarter of an hour; rows of the results
# name them.
BUDGETS = {
    "rte": Budget(None, 32, 5, 300),
    "mrpc": Budget(None, 32, 4, 300),
    "stsb": Budget(None, 32, 3, 360),
    "cola": Budget(None, 32, 4, 600),
    "sst2": Budget(20000, 32, 1, 600),
    "qnli": Budget(12000, 32, 1, 400),
    "qqp": Budget(20000, 32, 1, 600),
    "mnli": Budget(12988, 32, 2, 600),
    "squad": Budget(12000, 16, 1, 700),
    "squad_v2": Budget(12000, 16, 1, 700),
}


@dataclass(frozen=True)
class Variant:
    """A method as a study names it: ``ds``, ``nm:schedule=sr-ste``, ``ds:data-aware:omp-interval=1``.

    ``label`` is that word. What follows the method's name are fields of :class:`MethodOptions` and
    :class:`TrainConfig`, and ``schedule``; a field alone is true. A word that fixes a size (``preset``, ``ratio``,
    ``gamma``, ``delta``, or the method ``nm``) is run at that size only, any other at every size of the study.
    ``by_ratio``: ds with ``ratio`` alone, which is given the ratio by eq. 11 of every preset, and not its γ and δ.
    """

    label: str
    method: str
    schedule: Schedule | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    by_ratio: bool = False

    @property
    def has_size(self) -> bool:
        return self.method == "nm" or bool({"preset", "ratio", "gamma", "delta"} & set(self.options))


def parse_variant(label: str) -> Variant:
    """The variant of that word; raises :class:`ConfigError` for a method or an option there is none of."""
    method, *words = label.strip().split(":")
    find_method(method)
    parts: dict[str, dict[str, str]] = {"options": {}, "train": {}}
    homes = {name: part for part, kind in _HOMES.items() for name in (each.name for each in fields(kind))}
    schedule, by_ratio = None, False
    for word in words:
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if name == "schedule":
            schedule = value
        elif word == "ratio":
            by_ratio = True
        elif name in homes and name != "seed":
            parts[homes[name]][name] = value or "true"
        else:
            raise ConfigError(f"{label!r}: there is no option {name.replace('_', '-')!r}; see compress --help")
    values = {part: _typed(label, _HOMES[part], words) for part, words in parts.items()}
    variant = Variant(label.strip(), method, schedule, **values, by_ratio=by_ratio)  # type: ignore[arg-type]
    find_schedule(find_method(method).from_options(_options(variant, None, 2.0, 0)), variant.schedule)
    return variant


_HOMES: dict[str, type] = {"options": MethodOptions, "train": TrainConfig}


def _typed(label: str, home: type, words: Mapping[str, str]) -> dict[str, Any]:
    try:
        whole: Any = TypeAdapter(home).validate_python(dict(words))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{label!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {name: getattr(whole, name) for name in words}


def _options(variant: Variant, preset: str | None, ratio: float | None, seed: int) -> MethodOptions:
    """At a size of the study: the preset for ds, whose ratio by eq. 11 the others get."""
    size: dict[str, Any] = {}
    if not variant.has_size:
        size = {"preset": preset} if variant.method == "ds" and not variant.by_ratio else {"ratio": ratio}
    return MethodOptions(**{**size, **variant.options, "seed": seed})


@dataclass(frozen=True)
class Study:
    """What to run: every variant at every preset for every task and seed, from ``model``.

    ``output`` gets ``rows/*.json``; ``work`` holds checkpoints. ``learning_rates``: the dense grid, walked with the
    first seed; its best is every seed's. ``steps``, ``rows``, ``dense_epochs`` and ``batch_size`` stand in for those of
    all the tasks' budgets. ``fake_quantize``: the dense references are fine-tuned on an 8-bit grid.
    """

    model: str
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]
    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    work: Path
    data: Path | None = None
    learning_rates: tuple[float, ...] = (5e-5, 1e-4)
    batch_size: int | None = None
    rows: int | None = None
    dense_epochs: float | None = None
    steps: int | None = None
    max_length: int = 0
    fake_quantize: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{name.replace('_', '-')} wants at least one, each named once; got {values}")
        for name in self.presets:
            if name not in PRESETS:
                raise ConfigError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}")
        for name in self.tasks:
            if name not in BUDGETS:
                raise ConfigError(f"a study knows the tasks {', '.join(BUDGETS)}, not {name!r}")

    def budget(self, task: str) -> Budget:
        own = {name: getattr(self, name) for name in ("rows", "batch_size", "dense_epochs", "steps")}
        return replace(BUDGETS[task], **{name: value for name, value in own.items() if value is not None})

    def source(self, task: str) -> pipeline.Data:
        return pipeline.Data(task, self.data, rows=self.budget(task).rows)

    def length(self, task: Task) -> int:
        return self.max_length or (QA_LENGTH if task.kind == "qa" else CLASSIFY_LENGTH)


@dataclass(frozen=True)
class Run:
    """One row: of a dense reference (``variant`` None) with its learning rate, or of a variant at a size."""

    task: str
    seed: int
    variant: Variant | None = None
    size: str = ""
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        words = [self.variant.label, self.size] if self.variant else ["dense", f"{self.learning_rate:g}"]
        return re.sub(r"[^\w.=+-]+", "_", "-".join([self.task, str(self.seed), *filter(None, words)]))


# --- what is to be run -----------------------------------------------------------------------------------------


def planned_runs(study: Study) -> list[Run]:
    """All runs but the dense ones of later seeds, whose learning rate the first seed's decide; in order of worth."""
    runs = []
    for seed in study.seeds:
        for task in study.tasks:
            if seed == study.seeds[0]:
                runs += [Run(task, seed, learning_rate=rate) for rate in study.learning_rates]
            for size in study.presets:
                runs += [Run(task, seed, variant, size) for variant in study.variants if not variant.has_size]
            runs += [Run(task, seed, variant) for variant in study.variants if variant.has_size]
    return runs


def work_off(study: Study) -> list[str]:
    """Run what is not there yet, and return a sentence for each run that could not be done."""
    ratios = _require_possible(study)
    rows = study.output / "rows"
    todo = planned_runs(study)
    total = len(todo) + len(study.tasks) * (len(study.seeds) - 1)
    failed: dict[str, str] = {}
    _require_same(study, todo)
    with progress("study", total=total) as advance:
        seen: set[str] = set()
        while True:
            waiting = False
            for run in _with_dense(study, todo):
                if run.name in seen:
                    continue
                if run.name in failed:
                    pass
                elif _row(rows, run) is None:
                    if run.variant and _dense_row(study, run.task, run.seed) is None:
                        waiting = waiting or not _dense_failed(study, run, failed)
                        continue
                    with _claim(study.work, run) as mine:
                        if not mine:
                            waiting = True
                            continue
                        if _row(rows, run) is None:
                            try:
                                _do(study, run, ratios)
                            except (ConfigError, TrainingError) as error:
                                failed[run.name] = f"{run.name}: {error}"
                                log.error("%s", failed[run.name])
                seen.add(run.name)
                advance(run.name)
            if not waiting:
                return list(failed.values())
            time.sleep(_POLL_SECONDS)


def _with_dense(study: Study, runs: Sequence[Run]) -> Iterator[Run]:
    """``runs``, and before the first of each task and later seed its dense one, as soon as its rate is known."""
    known: set[tuple[str, int]] = set()
    for run in runs:
        place = run.task, run.seed
        if run.seed != study.seeds[0] and place not in known:
            known.add(place)
            best = _best_rate(study, run.task)
            if best is not None:
                yield Run(run.task, run.seed, learning_rate=best)
        yield run


def _dense_failed(study: Study, run: Run, failed: Mapping[str, str]) -> bool:
    """Whether the reference of ``run`` will never come, since a dense run it rests on could not be done."""
    return any(
        name.startswith((f"{run.task}-{run.seed}-dense", f"{run.task}-{study.seeds[0]}-dense")) for name in failed
    )


def _require_possible(study: Study) -> dict[tuple[str, str], float]:
    """Refuse what does not fit the model before any work; returns ds's ratio by eq. 11 by task and preset."""
    ratios = {}
    for name in study.tasks:
        task = study.source(name).resolve()
        model = checkpoint.load(study.model, task).model
        for preset in study.presets if any(not variant.has_size for variant in study.variants) else ():
            own = find_method("ds").from_options(MethodOptions(preset=preset))
            ratios[name, preset] = own.describe(own.plan(model), None)["ratio_eq11"]
        for variant in study.variants:
            for size in ("",) if variant.has_size else study.presets:
                options = _options(variant, size, ratios.get((name, size)), 0)
                find_method(variant.method).from_options(options).plan(model)
    return ratios


def _settings(study: Study, run: Run) -> dict[str, Any]:
    """What decides a row's numbers besides its name."""
    settings = {"budget": asdict(study.budget(run.task)), "train": asdict(_train_config(study, run))}
    return {**settings, "reference": {"fake_quantize": True}} if study.fake_quantize else settings


def _require_same(study: Study, runs: Sequence[Run]) -> None:
    """Rows that are there have been made with these settings; those that had no name then were at their defaults."""
    defaults = json.loads(json.dumps({"train": asdict(TrainConfig()), "reference": {"fake_quantize": False}}))
    for run in runs:
        row = _row(study.output / "rows", run)
        if row is None:
            continue
        here, there = (
            {part: {**defaults.get(part, {}), **found.get(part, {})} for part in ("budget", "train", "reference")}
            for found in (json.loads(json.dumps(_settings(study, run))), row["settings"])
        )
        differing = [
            f"{name} {there[part].get(name)} there, {value} here"
            for part, values in here.items()
            for name, value in values.items()
            if there[part].get(name) != value
        ]
        if differing:
            raise ConfigError(
                f"{study.output} holds a study of another configuration: {run.name} has {'; '.join(differing)}; give "
                f"the same options, or another --output"
            )


# --- one run -----------------------------------------------------------------------------------------------------


def _train_config(study: Study, run: Run) -> TrainConfig:
    budget = study.budget(run.task)
    common: dict[str, Any] = {
        "batch_size": budget.batch_size,
        "max_length": study.length(find_task(run.task)),
        "dropout": 0.0,
        "seed": run.seed,
    }
    if run.variant is None:
        return TrainConfig(epochs=budget.dense_epochs, learning_rate=run.learning_rate, **common)
    compressing = {"max_steps": budget.steps, "learning_rate": 1e-4, "hidden_weight": 10.0, "omp_interval": 8}
    return TrainConfig(**{**common, **compressing, **run.variant.train})


def _do(study: Study, run: Run, ratios: Mapping[tuple[str, str], float]) -> None:
    source, config, folder = study.source(run.task), _train_config(study, run), study.work / run.name
    dense = None
    if run.variant is None:
        record = pipeline.finetune(study.model, source, config, folder, fake_quantize=study.fake_quantize, resume=True)
    else:
        dense = _dense_row(study, run.task, run.seed)
        assert dense is not None
        ratio = ratios.get((run.task, run.size))
        method = find_method(run.variant.method).from_options(_options(run.variant, run.size, ratio, run.seed))
        reference = _reference(study, dense)
        schedule = run.variant.schedule
        record = pipeline.compress(str(reference), source, method, config, folder, schedule=schedule, resume=True)
    headline = find_task(run.task).metric_names[0]
    score = record.metrics[headline]
    row = {
        "name": run.name,
        "task": run.task,
        "seed": run.seed,
        "method": run.variant.label if run.variant else "dense",
        "size": run.size,
        "metric": headline,
        "score": score,
        "drop": round(dense["score"] - score, 3) if dense else 0.0,
        "metrics": record.metrics,
        "minutes": record.minutes,
        "stage": record.stage,
        "compression": record.compression,
        **record.extra,
        "settings": _settings(study, run),
        "versions": record.versions,
        "cpu": kernels.cpu_name(),
        "command": _command(study),
    }
    replace_file(study.output / "rows" / f"{run.name}.json", (json.dumps(row, indent=1) + "\n").encode())
    if run.variant is not None:
        shutil.rmtree(folder)  # only its numbers are wanted; the dense ones teach the others


def _command(study: Study) -> str:
    """The command of the study without the folders of this machine."""
    words = {
        "model": Path(study.model).name if Path(study.model).is_dir() else study.model,
        "tasks": ",".join(study.tasks),
        "methods": ",".join(variant.label for variant in study.variants),
        "presets": ",".join(study.presets),
        "seeds": ",".join(map(str, study.seeds)),
        "learning-rates": ",".join(f"{rate:g}" for rate in study.learning_rates),
        "rows": study.rows,
        "batch-size": study.batch_size,
        "dense-epochs": study.dense_epochs,
        "steps": study.steps,
        "max-length": study.max_length or None,
    }
    given = [f"--{name} {value}" for name, value in words.items() if value not in (None, "")]
    given += ["--fake-quantize"] if study.fake_quantize else []
    return " ".join(["dsformer-compress study --data DATA --output STUDY", *given])


def _reference(study: Study, dense: Mapping[str, Any]) -> Path:
    """The dense checkpoint of that row; trained again where only the row has been kept."""
    folder = study.work / str(dense["name"])
    if checkpoint.load_record(folder) is None:
        rate = dense["settings"]["train"]["learning_rate"]
        run = Run(dense["task"], dense["seed"], learning_rate=rate)
        with _claim(study.work, run, wait=True):
            if checkpoint.load_record(folder) is None:
                log.info("%s: its checkpoint is not in %s; training it again", run.name, study.work)
                source, config = study.source(run.task), _train_config(study, run)
                pipeline.finetune(study.model, source, config, folder, fake_quantize=study.fake_quantize, resume=True)
    return folder


def _dense_row(study: Study, task: str, seed: int) -> dict[str, Any] | None:
    """The reference of a task and seed, once the whole grid has been walked."""
    rate = _best_rate(study, task)
    return None if rate is None else _row(study.output / "rows", Run(task, seed, learning_rate=rate))


def _best_rate(study: Study, task: str) -> float | None:
    found = {}
    for rate in study.learning_rates:
        row = _row(study.output / "rows", Run(task, study.seeds[0], learning_rate=rate))
        if row is None:
            return None
        found[rate] = row["score"]
    return max(found, key=lambda rate: found[rate])


def _row(folder: Path, run: Run) -> dict[str, Any] | None:
    path = folder / f"{run.name}.json"
    return read_row(path) if path.is_file() else None


def read_row(path: Path) -> dict[str, Any]:
    """One run's numbers; raises :class:`ConfigError` for a file that is none of ours."""
    try:
        row = json.loads(path.read_text())
        row["score"], row["settings"]["train"]
        return dict(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no row of a study ({error!r}); remove it to run it again") from error


@contextmanager
def _claim(work: Path, run: Run, wait: bool = False) -> Iterator[bool]:
    """Whether ``run`` is this process's to do; others are told no until the block, or this process, ends."""
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / run.name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


# --- figure 1: no data and no training -------------------------------------------------------------------------


def weight_errors(study: Study, iterations: int = 30) -> None:
    """K-SVD's and SVD's error of every matrix at every preset, into ``weights-<preset>.json``."""
    for preset in study.presets:
        path = study.output / f"weights-{preset}.json"
        if not path.is_file():
            with _claim(study.work, Run("weights", 0, learning_rate=float(preset.removesuffix("x")))) as mine:
                if mine and not path.is_file():
                    rows = pipeline.error_table(
                        study.model, study.tasks[0], CompressionConfig(preset), KSVDConfig(iterations)
                    )
                    replace_file(path, (json.dumps(rows, indent=1) + "\n").encode())
