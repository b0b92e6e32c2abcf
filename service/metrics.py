"""Every Prometheus metric, once: name, unit, labels, buckets. Those of comparisons are in compare_metrics.py.

No label holds anything a user wrote. Every label set that can occur exists from the start at 0, so that rates and
alerts work before the first error.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from service.engine import Batch, Timings
from service.model import RUNTIME_VERSION, OnnxModel
from service.registry import TASKS, Registry

# 0.5 ms to 8 s in steps of 2^(1/4). Coarser steps cannot show the speed-up of one model over another: read from the
# default buckets, the ratio of two medians is wrong by 15 to 25 % on average; from these by 0.2 to 2 %.
FINE = tuple(0.0005 * 2 ** (k / 4) for k in range(57))
TOKENS = tuple(float(2**k) for k in range(2, 21))
WINDOWS = tuple(float(2**k) for k in range(0, 11))

STAGES = ("tokenize", "queue", "infer", "postprocess")
OUTCOMES = ("ok", "invalid", "overloaded", "deadline", "cancelled", "not_ready", "error")
RELOADS = ("loaded", "unchanged", "folder_refused", "self_test_failed", "error")
PADDING = ("real", "padding")
# The variant of a request that was refused before it was known which one it asks for.
NO_VARIANT = "none"


def version() -> str:
    try:
        return metadata.version("dsformer")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that was never installed


@dataclass(frozen=True)
class Answered:
    """What a successful request leaves to be counted."""

    task: str
    variant: str
    timings: Timings
    tokens: int
    truncated: int  # inputs that were cut
    windows: Sequence[int]  # of each context


class Metrics:
    def __init__(self, models: Registry, threads: int, isa: str, max_queue_tokens: int) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        which = ["task", "variant"]
        self._requests = Counter(
            "dsformer_requests", "Requests to a task, by outcome.", [*which, "outcome"], registry=registry
        )
        self._responses = Counter(
            "dsformer_http_responses", "HTTP responses.", ["route", "method", "code"], registry=registry
        )
        self._duration = Histogram(
            "dsformer_request_duration_seconds",
            "From the arrival of a request to the end of its answer; successful requests only.",
            which,
            buckets=FINE,
            registry=registry,
        )
        self._stages = Histogram(
            "dsformer_stage_duration_seconds",
            "Part of a request's time that each stage took; successful requests only.",
            [*which, "stage"],
            buckets=FINE,
            registry=registry,
        )
        self._tokens = Histogram(
            "dsformer_input_tokens",
            "Tokens of one request, special tokens included, padding not.",
            ["task"],
            buckets=TOKENS,
            registry=registry,
        )
        self._windows = Histogram(
            "dsformer_qa_windows",
            "Windows that one context was cut into.",
            ["task"],
            buckets=WINDOWS,
            registry=registry,
        )
        self._truncated = Counter(
            "dsformer_truncated_inputs", "Inputs of which a part was cut off.", ["task"], registry=registry
        )
        self._ready = Gauge("dsformer_model_ready", "1 once the model is warmed up.", which, registry=registry)
        self._selftest = Gauge(
            "dsformer_selftest_max_abs_error",
            "Largest difference of a logit from golden.json at the start; NaN before.",
            which,
            registry=registry,
        )
        self._batches = Histogram(
            "dsformer_batch_infer_duration_seconds", "One run of a model.", which, buckets=FINE, registry=registry
        )
        self._batch_items = Histogram(
            "dsformer_batch_items", "Rows in one run of a model.", which, buckets=WINDOWS, registry=registry
        )
        self._batch_tokens = Histogram(
            "dsformer_batch_tokens", "Tokens in one run, padding included.", which, buckets=TOKENS, registry=registry
        )
        self._run_tokens = Counter(
            "dsformer_tokens", "Tokens that ran; padding is waste.", [*which, "kind"], registry=registry
        )
        self._queue_items = Gauge("dsformer_queue_items", "Rows that wait for a run.", which, registry=registry)
        self._queue_tokens = Gauge("dsformer_queue_tokens", "Tokens that wait for a run.", which, registry=registry)
        self._inflight = Gauge("dsformer_inflight_requests", "Admitted and not answered.", registry=registry)
        self._admitted = Gauge("dsformer_admitted_tokens", "Tokens of the requests in flight.", registry=registry)
        Gauge(
            "dsformer_queue_limit_tokens", "Most tokens of the requests in flight; above it 429.", registry=registry
        ).set(max_queue_tokens)
        self._info = Gauge(
            "dsformer_model_info",
            "1; the labels say which model answers.",
            [*which, "folder", "preset", "precision", "base_model", "sha256", "runtime", "threads", "isa"],
            registry=registry,
        )
        self._size = Gauge("dsformer_model_file_bytes", "Size of model.onnx.", which, registry=registry)
        self._load = Gauge("dsformer_model_load_seconds", "Time to open the model.", which, registry=registry)
        Gauge("dsformer_build_info", "1; versions of the service.", ["version", "python"], registry=registry).labels(
            version(), platform.python_version()
        ).set(1)
        self._reloads = Counter(
            "dsformer_reloads", "Reloads of the model folders, by what came of them.", ["result"], registry=registry
        )
        for result in RELOADS:
            self._reloads.labels(result)
        self._described: set[tuple[str, str]] = set()
        self.describe(models, threads, isa)
        for task in TASKS:
            for outcome in ("invalid", "overloaded", "cancelled"):
                self._requests.labels(task, NO_VARIANT, outcome)
            self._tokens.labels(task)
            self._truncated.labels(task)
        self._windows.labels("qa")

    def answered(self, done: Answered) -> None:
        for stage in STAGES:
            self._child(self._stages, done.task, done.variant, stage).observe(getattr(done.timings, stage))
        self._child(self._tokens, done.task).observe(done.tokens)
        if done.truncated:
            self._truncated.labels(done.task).inc(done.truncated)
        for count in done.windows:
            self._child(self._windows, "qa").observe(count)

    def request(self, task: str, variant: str | None, outcome: str, seconds: float) -> None:
        self._child(self._requests, task, variant or NO_VARIANT, outcome).inc()
        if outcome == "ok" and variant is not None:
            self._child(self._duration, task, variant).observe(seconds)

    def response(self, route: str, method: str, code: int) -> None:
        self._child(self._responses, route, method, str(code)).inc()

    def reloaded(self, result: str) -> None:
        self._reloads.labels(result).inc()

    def tested(self, model: OnnxModel, selftest_error: float) -> None:
        """The model is warm and has passed its self-test."""
        which = model.artifact.task, model.artifact.variant
        self._ready.labels(*which).set(1)
        self._selftest.labels(*which).set(selftest_error)

    def batch(self, batch: Batch) -> None:
        which = batch.model.artifact.task, batch.model.artifact.variant
        self._child(self._batches, *which).observe(batch.seconds)
        self._child(self._batch_items, *which).observe(len(batch.items))
        self._child(self._batch_tokens, *which).observe(batch.padded_tokens)
        self._child(self._run_tokens, *which, "real").inc(batch.tokens)
        self._child(self._run_tokens, *which, "padding").inc(batch.padded_tokens - batch.tokens)

    def load(self, requests: int, tokens: int) -> None:
        self._inflight.set(requests)
        self._admitted.set(tokens)

    def queue(self, model: OnnxModel, items: int, tokens: int) -> None:
        which = model.artifact.task, model.artifact.variant
        self._queue_items.labels(*which).set(items)
        self._queue_tokens.labels(*which).set(tokens)

    def expect(self, route: str, method: str, codes: tuple[int, ...]) -> None:
        """Let the response counters of a route exist at 0."""
        for code in codes:
            self._responses.labels(route, method, str(code))

    def _child(self, metric: Any, *labels: str) -> Any:
        """metric.labels(*labels), which takes longer than all else that is done to a metric."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return found

    def _init(self, task: str, variant: str) -> None:
        for outcome in OUTCOMES:
            self._requests.labels(task, variant, outcome)
        for stage in STAGES:
            self._stages.labels(task, variant, stage)
        self._duration.labels(task, variant)
        self._ready.labels(task, variant)
        self._selftest.labels(task, variant).set(float("nan"))
        for histogram in (self._batches, self._batch_items, self._batch_tokens):
            histogram.labels(task, variant)
        for kind in PADDING:
            self._run_tokens.labels(task, variant, kind)
        self._queue_items.labels(task, variant)
        self._queue_tokens.labels(task, variant)

    def describe(self, models: Registry, threads: int, isa: str) -> None:
        """What is loaded, as constants. Models that have gone leave no sample behind."""
        for gauge in (self._info, self._size, self._load):
            gauge.clear()
        for task, variant in self._described - {(m.artifact.task, m.artifact.variant) for m in models}:
            for gauge in (self._ready, self._selftest, self._queue_items, self._queue_tokens):
                gauge.remove(task, variant)
        for model in models:
            a, section = model.artifact, model.artifact.config.dsformer
            if (a.task, a.variant) not in self._described:
                self._init(a.task, a.variant)
            self._info.labels(
                a.task,
                a.variant,
                a.name,
                section.preset or "",
                section.precision or "",
                section.base_model or "",
                a.sha256[:12],
                f"onnxruntime {RUNTIME_VERSION}",
                str(threads),
                isa if a.variant == "dsformer" else "",
            ).set(1)
            self._size.labels(a.task, a.variant).set(model.file_bytes)
            self._load.labels(a.task, a.variant).set(model.load_seconds)
        self._described = {(m.artifact.task, m.artifact.variant) for m in models}
