"""The metrics of comparisons, apart from those of requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.metrics import NO_VARIANT, OUTCOMES
from service.registry import TASKS, Registry

# Steps of 2^(1/8): a comparison's speed-up is a median of pairs, and its spread is small.
RATIOS = tuple(2 ** (k / 8) for k in range(-8, 33))
DIFFERENCES = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BASELINE = "dense"


def baseline_of(variants: list[str]) -> str:
    """The variant that the others are compared with."""
    return BASELINE if BASELINE in variants else variants[0]


class CompareMetrics:
    def __init__(self, registry: CollectorRegistry, models: Registry, inside: Callable[[], float]) -> None:
        which = ["task", "variant"]
        self._requests = Counter(
            "dsformer_compare_requests", "Requests to /compare, by outcome.", ["task", "outcome"], registry=registry
        )
        self._answers = Counter(
            "dsformer_compare_answers",
            "Answers of a variant in comparisons, by whether the baseline gave the same.",
            [*which, "result"],
            registry=registry,
        )
        self._speed_up = Histogram(
            "dsformer_compare_speedup_ratio",
            "The baseline's time over the variant's, the median of one comparison.",
            which,
            buckets=RATIOS,
            registry=registry,
        )
        self._difference = Histogram(
            "dsformer_compare_score_difference",
            "Largest difference of a score from the baseline's in one comparison.",
            which,
            buckets=DIFFERENCES,
            registry=registry,
        )
        Gauge("dsformer_compare_inflight", "Comparisons that wait or run.", registry=registry).set_function(inside)
        for outcome in OUTCOMES:
            for task in (*TASKS, NO_VARIANT):
                self._requests.labels(task, outcome)
        self.describe(models)

    def describe(self, models: Registry) -> None:
        """Let every label set that these models can have exist."""
        for task in TASKS:
            variants = models.of_task(task)
            for variant in variants:
                if variant != baseline_of(variants):
                    self._speed_up.labels(task, variant)
                    self._difference.labels(task, variant)
                    for result in ("agree", "disagree"):
                        self._answers.labels(task, variant, result)

    def request(self, task: str | None, outcome: str) -> None:
        self._requests.labels(task or NO_VARIANT, outcome).inc()

    def compared(self, task: str, variant: str, agrees: bool | None, difference: float | None, speed_up: float) -> None:
        if agrees is not None:
            self._answers.labels(task, variant, "agree" if agrees else "disagree").inc()
        if difference is not None:
            self._difference.labels(task, variant).observe(difference)
        self._speed_up.labels(task, variant).observe(speed_up)
