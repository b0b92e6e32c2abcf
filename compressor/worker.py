"""A study's runs, done: by one process, by several that train one model together, by several workers beside each other.

Runs that have their row are not run again, so a killed study goes on where it was and may be widened later. Workers on
one folder claim a run by a lock, which their death releases. The checkpoints of dense references are kept, since they
teach the others, and so are the factors to start from (starts.py); of a compressed model only its numbers are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import kernels
from compressor import checkpoint, pipeline, processes
from compressor.config import OMP_INTERVAL, CompressionConfig, ConfigError, KSVDConfig, MethodOptions, TrainConfig
from compressor.export import ExportError, Storage
from compressor.files import replace_file
from compressor.layers import find_stacks, stacked_weight
from compressor.methods import find_method
from compressor.progress import progress
from compressor.study import Run, Study, options_of, planned_runs, row_of
from compressor.tasks import find_task
from compressor.train import TrainingError

log = logging.getLogger(__name__)

_POLL_SECONDS = 5.0


def work_off(study: Study) -> list[str]:
    """Run what is not there yet, and return a sentence for each run that could not be done."""
    base = _require_possible(study)
    processes.from_first(lambda: _require_same(study, base, planned_runs(study)))
    queue = Queue(study)
    with progress("study" if processes.is_first() else None, total=queue.total) as advance:
        while run := processes.from_first(lambda: queue.take(advance)):
            failure = None
            try:
                _do(study, base, run)
            except (ConfigError, TrainingError, ExportError) as error:
                failure = f"{run.name}: {error}"
                log.error("%s", failure)
            queue.give_back(run, failure)
    return processes.from_first(lambda: list(queue.failed.values()))


class Queue:
    """The runs that are left to one worker. Of processes that train together only the first takes from it."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._planned = planned_runs(study)
        self._over: set[str] = set()
        self._lock: TextIO | None = None
        self.failed: dict[str, str] = {}
        self.total = len(self._planned) + (0 if study.finetuned else len(study.tasks) * (len(study.seeds) - 1))

    def take(self, advance: Callable[[str], None] = lambda name: None) -> Run | None:
        """The next run, claimed; waits while others do what is needed for the rest. None when nothing is left.

        ``advance`` is called with the name of each run that is over.
        """
        while True:
            waits = False
            for run in self._in_order():
                if run.name in self._over:
                    continue
                if run.name in self.failed or self._is_there(run):
                    self._over.add(run.name)
                    advance(run.name)
                elif run.variant and self._reference(run) is None:
                    waits = waits or not self._is_hopeless(run)
                elif self._claim(run):
                    if not self._is_there(run):  # another worker has just ended it
                        return run
                    self._release()
                else:
                    waits = True
            if not waits:
                return None
            time.sleep(_POLL_SECONDS)

    def give_back(self, run: Run, failure: str | None) -> None:
        """The run is over, or could not be done for the reason given."""
        if failure:
            self.failed[run.name] = failure
        self._release()

    def _in_order(self) -> Iterator[Run]:
        """All runs; before the first of each task and later seed its dense one, as soon as its rate is known."""
        known: set[tuple[str, int]] = set()
        for run in self._planned:
            place = run.task, run.seed
            if run.seed != self._study.seeds[0] and place not in known:
                known.add(place)
                if dense := dense_run(self._study, *place):
                    yield dense
            yield run

    def _is_there(self, run: Run) -> bool:
        """It has its row; and its checkpoint, where it is a reference that others still need."""
        if row_of(self._study, run) is None:
            return False
        return run.variant is not None or not self._is_needed(run) or _has_checkpoint(self._study, run)

    def _is_needed(self, dense: Run) -> bool:
        left = [run for run in self._planned if run.variant and (run.task, run.seed) == (dense.task, dense.seed)]
        return dense == dense_run(self._study, dense.task, dense.seed) and any(
            row_of(self._study, run) is None and run.name not in self.failed for run in left
        )

    def _reference(self, run: Run) -> Run | None:
        """The dense run that ``run`` starts from, if its checkpoint is there."""
        dense = dense_run(self._study, run.task, run.seed)
        return dense if dense and row_of(self._study, dense) and _has_checkpoint(self._study, dense) else None

    def _is_hopeless(self, run: Run) -> bool:
        """The reference of ``run`` will never come, since a dense run it rests on could not be done."""
        starts = tuple(f"{run.task}-{seed}-dense" for seed in (run.seed, self._study.seeds[0]))
        return any(name.startswith(starts) for name in self.failed)

    def _claim(self, run: Run) -> bool:
        locks = self._study.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        file = (locks / run.name).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._lock = file
        return True

    def _release(self) -> None:
        if self._lock:
            self._lock.close()
        self._lock = None


def dense_run(study: Study, task: str, seed: int) -> Run | None:
    """The reference of a task and seed, once the whole grid has been walked with the first seed."""
    if study.finetuned:
        return Run(task, study.seeds[0])
    scores = {}
    for rate in study.learning_rates:
        row = row_of(study, Run(task, study.seeds[0], learning_rate=rate))
        if row is None:
            return None
        scores[rate] = row["score"]
    return Run(task, seed, learning_rate=max(scores, key=lambda rate: scores[rate]))


def _has_checkpoint(study: Study, dense: Run) -> bool:
    return study.finetuned or checkpoint.load_record(study.work / dense.name) is not None


@dataclass(frozen=True)
class _Base:
    """What a study's model is: a digest of the weights to compress, the bytes of all its weights as float32, and ds's
    ratio by eq. 11 by task and preset."""

    weights: str
    float32_bytes: int
    ratios: Mapping[tuple[str, str], float]


def _require_possible(study: Study) -> _Base:
    """Refuse what does not fit the model before any work; returns what is known of it then."""
    ratios = {}
    for name in study.tasks:
        task = study.source(name).resolve()
        loaded = checkpoint.load(study.model, task)
        if loaded.factors:
            raise ConfigError(f"{study.model} is compressed by {loaded.method} already; a study wants the dense model")
        model = loaded.model
        for preset in study.presets if any(not variant.has_size for variant in study.variants) else ():
            own = find_method("ds").from_options(MethodOptions(preset=preset))
            ratios[name, preset] = own.describe(own.plan(model), None)["ratio_eq11"]
        for variant in study.variants:
            for size in ("",) if variant.has_size else study.presets:
                options = options_of(variant, size, ratios.get((name, size)), 0)
                find_method(variant.method).from_options(options).plan(model)
    found = hashlib.sha256()
    for spec in find_stacks(model):
        found.update(stacked_weight(model, spec.names).detach().cpu().numpy().tobytes())
    return _Base(found.hexdigest()[:16], sum(4 * parameter.numel() for parameter in model.parameters()), ratios)


def _settings(study: Study, base: _Base, run: Run) -> dict[str, Any]:
    """What decides a row's numbers besides its name; of ``reference``, the dense run it starts from, what is known."""
    reference: dict[str, Any] = {
        "weights": base.weights,
        "fake_quantize": study.fake_quantize,
        "finetuned": study.finetuned,
    }
    if run.variant and not study.finetuned and (dense := dense_run(study, run.task, run.seed)):
        reference["learning_rate"] = dense.learning_rate
    # A model that was fine-tuned before is only measured.
    train = {} if study.finetuned and run.variant is None else asdict(_train_config(study, run))
    return {"budget": asdict(study.budget(run.task)), "train": train, "reference": reference}


def _require_same(study: Study, base: _Base, runs: Sequence[Run]) -> None:
    """Rows that are there have been made with these settings; those that had no name then were at their defaults."""
    defaults = json.loads(json.dumps({"train": asdict(TrainConfig())}))
    for run in runs:
        row = row_of(study, run)
        if row is None:
            continue
        here, there = (
            {part: {**defaults.get(part, {}), **found.get(part, {})} for part in ("budget", "train", "reference")}
            for found in (json.loads(json.dumps(_settings(study, base, run))), row["settings"])
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
        common |= {"learning_rate": run.learning_rate} if run.learning_rate else {}
        return TrainConfig(epochs=budget.dense_epochs, **common)
    compressing = {
        "max_steps": budget.steps,
        "learning_rate": 6e-4,
        "hidden_weight": 10.0,
        "omp_interval": OMP_INTERVAL,
    }
    return TrainConfig(**{**common, **compressing, **run.variant.train})


def _do(study: Study, base: _Base, run: Run) -> None:
    source, config, folder = study.source(run.task), _train_config(study, run), study.work / run.name
    dense_score = None
    if run.variant is None and study.finetuned:
        record = pipeline.measure(study.model, source)
    elif run.variant is None:
        record = pipeline.finetune(study.model, source, config, folder, fake_quantize=study.fake_quantize, resume=True)
    else:
        dense = dense_run(study, run.task, run.seed)
        assert dense is not None
        dense_row = row_of(study, dense)
        assert dense_row is not None
        dense_score = dense_row["score"]
        ratio = base.ratios.get((run.task, run.size))
        method = find_method(run.variant.method).from_options(options_of(run.variant, run.size, ratio, run.seed))
        reference = study.model if study.finetuned else str(study.work / dense.name)
        schedule = run.variant.schedule
        record = pipeline.compress(
            reference, source, method, config, folder, schedule=schedule, resume=True, starts=study.work / "starts"
        )
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
        "drop": 0.0 if dense_score is None else round(dense_score - score, 3),
        "metrics": record.metrics,
        "minutes": record.minutes,
        "stage": record.stage,
        "base_model": pipeline.model_name(study.model),
        "compression": record.compression,
        **record.extra,
        "settings": _settings(study, base, run),
        "versions": record.versions,
        "cpu": kernels.cpu_name(),
        "command": _command(study),
    }
    if processes.is_first():
        if run.variant and study.storage:
            row["stored"] = {study.storage: _stored(study, base, run, study.storage)}
        replace_file(study.output / "rows" / f"{run.name}.json", (json.dumps(row, indent=1) + "\n").encode())
        if run.variant is not None:
            shutil.rmtree(folder)


def _stored(study: Study, base: _Base, run: Run, storage: Storage) -> dict[str, Any]:
    """The run's model as a model folder: its score through ONNX Runtime, and its bytes beside the dense one's."""
    with tempfile.TemporaryDirectory(dir=study.work) as folder:
        source, output = study.source(run.task), Path(folder) / "model"
        card = pipeline.export_checkpoint(study.work / run.name, source, output, storage=storage)
    return {
        "score": card["metrics"][find_task(run.task).metric_names[0]],
        "file_bytes": card["sizes"]["file_bytes"],
        "float32_bytes": base.float32_bytes,
    }


def _command(study: Study) -> str:
    """The command of the study without the folders of this machine."""
    words = {
        "model": pipeline.model_name(study.model),
        "tasks": ",".join(study.tasks),
        "methods": ",".join(variant.label for variant in study.variants),
        "presets": ",".join(study.presets),
        "seeds": ",".join(map(str, study.seeds)),
        "learning-rates": "" if study.finetuned else ",".join(f"{rate:g}" for rate in study.learning_rates),
        "rows": study.rows,
        "batch-size": study.batch_size,
        "dense-epochs": study.dense_epochs,
        "steps": study.steps,
        "max-length": study.max_length or None,
        "storage": study.storage,
    }
    flags = {"--fake-quantize": study.fake_quantize, "--finetuned": study.finetuned}
    given = [f"--{name} {value}" for name, value in words.items() if value not in (None, "")]
    given += [flag for flag, on in flags.items() if on]
    return " ".join(["dsformer-compress study --data DATA --output STUDY", *given])


# --- figure 1: no data and no training -------------------------------------------------------------------------


def weight_errors(study: Study, iterations: int = 30) -> None:
    """K-SVD's and SVD's error of every matrix at every preset, into ``weights-<preset>.json``."""
    for preset in study.presets:
        path = study.output / f"weights-{preset}.json"
        if not path.is_file():
            rows = pipeline.error_table(study.model, study.tasks[0], CompressionConfig(preset), KSVDConfig(iterations))
            replace_file(path, (json.dumps(rows, indent=1) + "\n").encode())
