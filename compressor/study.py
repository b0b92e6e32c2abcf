"""A study: many runs of many methods, one JSON file a run, which ``results.py`` makes its tables and plots of.

It is named by its runs: the dense reference of each task and seed, then every method at every size from that same
reference, all trained and distilled alike. ``worker.py`` does them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compressor import pipeline
from compressor.config import CLASSIFY_LENGTH, PRESETS, QA_LENGTH, ConfigError, MethodOptions, Schedule, TrainConfig
from compressor.export import Storage
from compressor.methods import find_method, find_schedule
from compressor.tasks import Task


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
    find_schedule(find_method(method).from_options(options_of(variant, None, 2.0, 0)), variant.schedule)
    return variant


_HOMES: dict[str, type] = {"options": MethodOptions, "train": TrainConfig}


def _typed(label: str, home: type, words: Mapping[str, str]) -> dict[str, Any]:
    try:
        whole: Any = TypeAdapter(home).validate_python(dict(words))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{label!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {name: getattr(whole, name) for name in words}


def options_of(variant: Variant, preset: str | None, ratio: float | None, seed: int) -> MethodOptions:
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
    all the tasks' budgets. ``fake_quantize``: the dense references are fine-tuned on an 8-bit grid. ``finetuned``:
    ``model`` is the dense reference itself, of its one task and of every seed. ``storage``: compressed models are also
    exported so, and measured once more as what they then are.
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
    finetuned: bool = False
    storage: Storage | None = None

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
        if self.finetuned and (len(self.tasks) > 1 or self.fake_quantize):
            what = "--fake-quantize fine-tunes it" if self.fake_quantize else f"--tasks names {len(self.tasks)}"
            raise ConfigError(
                f"a --finetuned model is of one task and stays as it is, but {what}; leave one of them out"
            )

    def budget(self, task: str) -> Budget:
        own = {name: getattr(self, name) for name in ("rows", "batch_size", "dense_epochs", "steps")}
        return replace(BUDGETS[task], **{name: value for name, value in own.items() if value is not None})

    def source(self, task: str) -> pipeline.Data:
        return pipeline.Data(task, self.data, rows=self.budget(task).rows)

    def length(self, task: Task) -> int:
        return self.max_length or (QA_LENGTH if task.kind == "qa" else CLASSIFY_LENGTH)


@dataclass(frozen=True)
class Run:
    """One row: of a dense reference (``variant`` None) with its learning rate (0: as it came), or of a variant at a
    size."""

    task: str
    seed: int
    variant: Variant | None = None
    size: str = ""
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        rate = f"{self.learning_rate:g}" if self.learning_rate else ""
        words = [self.variant.label, self.size] if self.variant else ["dense", rate]
        return re.sub(r"[^\w.=+-]+", "_", "-".join([self.task, str(self.seed), *filter(None, words)]))


# --- what is to be run -----------------------------------------------------------------------------------------


def planned_runs(study: Study) -> list[Run]:
    """All runs but the dense ones of later seeds, whose learning rate the first seed's decide; in order of worth."""
    runs = []
    rates = (0.0,) if study.finetuned else study.learning_rates
    for seed in study.seeds:
        for task in study.tasks:
            if seed == study.seeds[0]:
                runs += [Run(task, seed, learning_rate=rate) for rate in rates]
            for size in study.presets:
                runs += [Run(task, seed, variant, size) for variant in study.variants if not variant.has_size]
            runs += [Run(task, seed, variant) for variant in study.variants if variant.has_size]
    return runs


# --- rows ---------------------------------------------------------------------------------------------------------


def row_of(study: Study, run: Run) -> dict[str, Any] | None:
    """What ``run`` measured, once it is done."""
    path = study.output / "rows" / f"{run.name}.json"
    return read_row(path) if path.is_file() else None


def read_row(path: Path) -> dict[str, Any]:
    """One run's numbers; raises :class:`ConfigError` for a file that is none of ours."""
    try:
        row = json.loads(path.read_text())
        row["score"], row["settings"]["train"]
        return dict(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no row of a study ({error!r}); remove it to run it again") from error
