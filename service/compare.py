"""POST /compare: one input through every variant of its task, and how they differ in answer and time.

The variants take turns, A B B A, so that a drift of the machine's speed falls on all alike. The first round warms up;
each further round is timed and gives one ratio per variant: the baseline's time over its own, of tokenize + infer +
postprocess. The speed-up is their median, and its interval the percentile bootstrap of that median.

Everything runs in the low-priority lane (lane.py), the windows of a long context one by one. At the deadline the
complete rounds are the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service import classify, qa
from service.compare_metrics import baseline_of
from service.edge import BodyRoute, Handler, outcome_of, patience
from service.engine import Timings
from service.errors import ClientGone, DeadlineExceeded, TaskUnavailable
from service.metrics import STAGES
from service.model import Logits, OnnxModel
from service.schemas import ClassifyComparison, CompareRequest, Comparison, FunctionName, QaComparison, SpeedUp
from service.state import Service, service_of
from service.tasks import ERRORS, check_lengths, disconnected
from service.tokenizer import Row

CONFIDENCE = 0.95
RESAMPLES = 2000
# The bootstrap of fewer values says more about chance than about the models.
FEWEST_FOR_INTERVAL = 5

Body = ClassifyComparison | QaComparison


class CompareRoute(BodyRoute):
    """Not a task's route: the lane admits, and what comes of a request is counted apart."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            state, metrics = request.state, service_of(request).compare_metrics
            state.count = lambda status: metrics.request(getattr(state, "compared_task", None), outcome_of(status))
            return await handle(request)

        return counted


comparisons = APIRouter(route_class=CompareRoute, responses=ERRORS, tags=["tasks"])  # type: ignore[arg-type]


@comparisons.post("/compare", response_model=Comparison, summary="Compare all variants on one input")
async def compare(request: Request, body: CompareRequest) -> Response:
    """Answers, agreement, stage timings and speed-up. Waits while requests to the tasks are in progress."""
    service, asked = service_of(request), body.root
    request.state.compared_task = asked.task
    duel = Duel(service, asked, models_of(service, asked.task))
    service.lifecycle.check_serving()
    check_lengths([asked.item()], service.settings.max_text_chars)
    longest = patience(request, service.settings.max_queue_seconds)
    with service.lane.enter():
        await within(request, duel.run(), longest - (time.perf_counter() - request.state.began))
    if not duel.rounds:
        raise DeadlineExceeded("The deadline came before every variant had run twice; requests to the tasks go first.")
    return JSONResponse(await asyncio.to_thread(duel.report))


def models_of(service: Service, task: str) -> list[OnnxModel]:
    """Every variant of a task, the baseline first."""
    models = [model for model in service.models if model.artifact.task == task]
    if not models:
        raise TaskUnavailable(f"No model for the task {task} is loaded.")
    baseline = baseline_of(sorted(model.artifact.variant for model in models))
    return sorted(models, key=lambda model: (model.artifact.variant != baseline, model.artifact.variant))


async def within(request: Request, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Run until the work ends or the time is over; ClientGone where the client leaves before."""
    running, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({running, watching}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        elif watching.done():
            raise ClientGone("The client has left.")
    finally:
        running.cancel()
        watching.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


@dataclass(frozen=True)
class Found:
    """A variant's answer, and what of it is compared."""

    answer: Any  # in the shape of the task's own route
    choice: object  # equal choices agree; None where nothing is chosen
    scores: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    rows: Sequence[Row]
    truncated: bool
    decode: Callable[[list[list[Logits]]], Found]


class Duel:
    """One comparison: its rounds as they come, then the report."""

    def __init__(self, service: Service, body: Body, models: list[OnnxModel]) -> None:
        self._service = service
        self._body = body
        self._chars = sum(len(text) for _, text in body.item() if text is not None)
        self.models = models
        self.found: dict[OnnxModel, tuple[Prepared, Found]] = {}
        self.rounds: list[dict[OnnxModel, Timings]] = []

    async def run(self) -> None:
        for number in range(1 + self._body.parameters.repeats):
            async with self._service.lane.turn():
                times = {}
                for model in self.models if number % 2 else reversed(self.models):
                    times[model] = await self._run_once(model)
            if number > 0:
                self.rounds.append(times)

    async def _run_once(self, model: OnnxModel) -> Timings:
        service, lane, timings = self._service, self._service.lane, Timings()
        async with lane.gap():
            service.lifecycle.check_serving()
            prepared, timings.tokenize = await lane.workers.run(
                lambda: prepare(service, model, self._body), self._chars
            )
        outputs = []
        for row in prepared.rows:
            async with lane.gap():
                service.lifecycle.check_serving()
                outputs += await service.engine.infer(model, [row], timings, low_priority=True)
        async with lane.gap():
            found, timings.postprocess = await lane.workers.run(lambda: prepared.decode(outputs), self._chars)
        self.found[model] = prepared, found
        return timings

    def report(self) -> dict[str, Any]:
        """The answer's body, a `Comparison`; the metrics of comparisons are counted."""
        variants = [self._report_of(model) for model in self.models]
        agreed = [each["agrees"] for each in variants[1:] if each["agrees"] is not None]
        return {
            "task": self._body.task,
            "baseline": variants[0]["variant"],
            "repeats": len(self.rounds),
            "agreement": all(agreed) if agreed else None,
            "variants": variants,
        }

    def _report_of(self, model: OnnxModel) -> dict[str, Any]:
        artifact, baseline = model.artifact, self.models[0]
        prepared, found = self.found[model]
        agrees, difference = differences(found, self.found[baseline][1])
        times = [each[model] for each in self.rounds]
        speed_up = speed_up_of([work(each[baseline]) for each in self.rounds], [work(each) for each in times])
        if model is not baseline:
            self._service.compare_metrics.compared(artifact.task, artifact.variant, agrees, difference, speed_up.median)
        return {
            "variant": artifact.variant,
            "name": artifact.name,
            "preset": artifact.config.dsformer.preset,
            "precision": artifact.config.dsformer.precision,
            "file_bytes": model.file_bytes,
            "answer": found.answer,
            "agrees": agrees,
            "score_difference": difference,
            "tokens": sum(map(len, prepared.rows)),
            "windows": len(prepared.rows),
            "truncated": prepared.truncated,
            "stage_seconds": {stage: float(np.median([getattr(each, stage) for each in times])) for stage in STAGES},
            "work_seconds": [work(each) for each in times],
            "speed_up": speed_up.model_dump(),
        }


def prepare(service: Service, model: OnnxModel, body: Body) -> Prepared:
    return (
        prepare_classify(service, model, body)
        if isinstance(body, ClassifyComparison)
        else prepare_qa(service, model, body)
    )


def prepare_classify(service: Service, model: OnnxModel, body: ClassifyComparison) -> Prepared:
    parameters, labels = body.parameters, model.artifact.labels
    truncation = parameters.truncation or service.settings.truncation
    rows, cut = classify.prepare(model.tokenizer, [body.item()], truncation, model.max_length)
    function = parameters.function_to_apply
    if function == "default":
        function = classify.function_of(model.artifact.config)

    def decode(outputs: list[list[Logits]]) -> Found:
        ranked = classify.answer(outputs[0][0], labels, function, None)
        scores = {str(each["label"]): float(str(each["score"])) for each in ranked}
        return Found(ranked[: parameters.top_k], choice_of(scores, function), scores)

    return Prepared(rows, cut > 0, decode)


def choice_of(scores: dict[str, float], function: FunctionName) -> object:
    """What a classifier chose; `scores` has its best label first."""
    if function == "sigmoid":
        return frozenset(label for label, score in scores.items() if score > 0.5)
    return None if len(scores) == 1 else next(iter(scores))


def prepare_qa(service: Service, model: OnnxModel, body: QaComparison) -> Prepared:
    parameters = body.parameters
    (passage,) = qa.prepare(model.tokenizer, [body.item()], parameters, model.max_length, service.settings.max_windows)

    def decode(outputs: list[list[Logits]]) -> Found:
        best = qa.answer(passage, [o[0] for o in outputs], [o[1] for o in outputs], parameters)
        first = best[0]
        answer = first if parameters.top_k is None else best
        return Found(answer, first["answer"], {"best": float(str(first["score"]))})

    return Prepared([window.row for window in passage.windows], passage.question_cut, decode)


def differences(found: Found, baseline: Found) -> tuple[bool | None, float | None]:
    """Whether two answers agree, and the largest difference of a score that both give."""
    agrees = None if found.choice is None else found.choice == baseline.choice
    shared = found.scores.keys() & baseline.scores.keys()
    return agrees, max((abs(found.scores[name] - baseline.scores[name]) for name in shared), default=None)


def work(timings: Timings) -> float:
    """Seconds that were the variant's own: waiting is not."""
    return timings.tokenize + timings.infer + timings.postprocess


def speed_up_of(baseline: Sequence[float], own: Sequence[float]) -> SpeedUp:
    """Median of the ratios baseline / own, and the bootstrap interval of that median."""
    ratios = np.array(baseline) / np.array(own)
    low, high = bootstrap(ratios) if len(ratios) >= FEWEST_FOR_INTERVAL else (None, None)
    return SpeedUp(median=float(np.median(ratios)), low=low, high=high)


def bootstrap(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of the median; the same values give the same interval."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
