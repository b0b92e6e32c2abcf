"""The routes that answer: classification and question answering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service import classify, qa
from service.artifact import Task
from service.edge import TaskRoute, patience
from service.engine import Timings
from service.errors import Invalid, Malformed, TooLong
from service.metrics import Answered
from service.model import Logits, OnnxModel
from service.schemas import (
    Answer,
    ClassifyRequest,
    ErrorBody,
    LabelScore,
    PredictRequest,
    QaRequest,
    Question,
    TextPair,
)
from service.settings import Variant
from service.state import service_of
from service.tokenizer import Row
from service.workers import timed

ERRORS = {code: {"model": ErrorBody} for code in (400, 401, 404, 405, 413, 415, 422, 424, 429, 500, 503, 504)}

tasks = APIRouter(route_class=TaskRoute, responses=ERRORS, tags=["tasks"])  # type: ignore[arg-type]


@tasks.post("/classify", response_model=list[list[LabelScore]], summary="Classify texts")
async def classify_default(request: Request, body: ClassifyRequest) -> Response:
    """One inner list of labels per input, always."""
    return await run_classify(request, body, body.parameters.variant)


@tasks.post("/variants/{variant}/classify", response_model=list[list[LabelScore]], summary="Classify with one variant")
async def classify_variant(variant: Variant, request: Request, body: ClassifyRequest) -> Response:
    return await run_classify(request, body, one_variant(variant, body.parameters.variant))


@tasks.post("/predict", response_model=list[LabelScore] | list[list[LabelScore]], summary="Classify, as in TEI")
async def predict(request: Request, body: PredictRequest) -> Response:
    """For clients of Text Embeddings Inference: a flat list for one input, a list of lists for a batch."""
    try:
        wanted = body.classify()
    except ValueError as error:
        raise Invalid(f"{error}.") from None
    return await run_classify(request, wanted, None, flat=not body.many)


@tasks.post("/qa", response_model=Answer | list[Answer] | list[list[Answer]], summary="Answer questions from a context")
async def qa_default(request: Request, body: QaRequest) -> Response:
    """An object for one input; a list of answers where `top_k` is given; a list of those for a list of inputs."""
    return await run_qa(request, body, body.parameters.variant)


@tasks.post(
    "/variants/{variant}/qa",
    response_model=Answer | list[Answer] | list[list[Answer]],
    summary="Answer questions with one variant",
)
async def qa_variant(variant: Variant, request: Request, body: QaRequest) -> Response:
    return await run_qa(request, body, one_variant(variant, body.parameters.variant))


def one_variant(path: str, parameter: str | None) -> str:
    if parameter not in (None, path):
        raise Invalid("parameters.variant: it differs from the variant in the path; leave one of them out.")
    return path


async def run_classify(request: Request, body: ClassifyRequest, variant: str | None, flat: bool = False) -> Response:
    service, items, parameters = service_of(request), body.items(), body.parameters
    model = choose(request, "classify", variant, len(items))
    truncation = parameters.truncation or service.settings.truncation
    timings = Timings()
    check_lengths(items, service.settings.max_text_chars)
    chars = sum(len(item.text) + len(item.text_pair or "") for item in items)
    (rows, cut), timings.tokenize = await service.workers.run(
        lambda: classify.prepare(model.tokenizer, items, truncation, model.max_length),
        chars,
        request.is_disconnected,
    )
    outputs = await infer(request, model, rows, timings)
    function = parameters.function_to_apply
    if function == "default":
        function = classify.function_of(model.artifact.config)
    labels = model.artifact.labels
    answers, timings.postprocess = timed(
        lambda: [classify.answer(logits, labels, function, parameters.top_k) for (logits,) in outputs]
    )
    return reply(request, model, answers[0] if flat else answers, timings, rows, cut)


async def run_qa(request: Request, body: QaRequest, variant: str | None) -> Response:
    service, items, parameters = service_of(request), body.items(), body.parameters
    model = choose(request, "qa", variant, len(items))
    check_lengths(items, service.settings.max_text_chars)
    timings = Timings()
    chars = sum(len(item.question) + len(item.context) for item in items)
    passages, timings.tokenize = await service.workers.run(
        lambda: qa.prepare(model.tokenizer, items, parameters, model.max_length, service.settings.max_windows),
        chars,
        request.is_disconnected,
    )
    rows = [window.row for passage in passages for window in passage.windows]
    outputs = await infer(request, model, rows, timings)
    answers, timings.postprocess = await service.workers.run(lambda: decode(passages, outputs, body), chars)
    cut = sum(passage.question_cut for passage in passages)
    return reply(request, model, answers, timings, rows, cut, [len(passage.windows) for passage in passages])


def check_lengths(items: Sequence[TextPair | Question], most: int) -> None:
    for i, item in enumerate(items):
        for name, text in item:
            if text is not None and len(text) > most:
                raise TooLong(f"inputs[{i}].{name} has {len(text)} characters; at most {most} are allowed.")


async def infer(request: Request, model: OnnxModel, rows: Sequence[Row], timings: Timings) -> list[list[Logits]]:
    """Through the engine, unless the deadline passes or the client leaves before."""
    service = service_of(request)
    request.state.ticket.settle(sum(map(len, rows)))
    seconds = patience(request, service.settings.max_queue_seconds) - (time.perf_counter() - request.state.began)
    return await service.engine.infer(model, rows, timings, seconds, lambda: disconnected(request))


async def disconnected(request: Request) -> None:
    """Return when the client has left. The body has been read, so there is no other message to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def decode(passages: Sequence[qa.Passage], outputs: Sequence[Sequence[Logits]], body: QaRequest) -> Any:
    """The answers in the shape that the request asks for."""
    remaining = iter(outputs)
    answers: list[Any] = []
    for passage in passages:
        windows = [next(remaining) for _ in passage.windows]
        best = qa.answer(passage, [w[0] for w in windows], [w[1] for w in windows], body.parameters)
        answers.append(best[0] if body.parameters.top_k is None else best)
    return answers if isinstance(body.inputs, list) else answers[0]


def choose(request: Request, task: Task, variant: str | None, items: int) -> OnnxModel:
    """The model that will answer, once the request may be answered at all."""
    service = service_of(request)
    model = service.models.get(task, variant)
    request.state.variant = model.artifact.variant
    service.lifecycle.check_serving()
    if items == 0:
        raise Malformed("inputs: the batch is empty.")
    if items > service.settings.max_batch_items:
        raise Invalid(f"inputs: {items} inputs in one request; at most {service.settings.max_batch_items} are allowed.")
    return model


def reply(
    request: Request,
    model: OnnxModel,
    answers: Any,
    timings: Timings,
    rows: Sequence[Row],
    truncated: int,
    windows: Sequence[int] = (),
) -> Response:
    """The answer, with its timings in the headers that Text Embeddings Inference uses and in Server-Timing.

    The former are whole milliseconds, as their readers expect; Server-Timing has fractions, and browsers draw it.
    """
    a = model.artifact
    tokens = sum(len(row) for row in rows)
    # Counted by edge.py once the answer is on its way.
    request.state.answered = Answered(a.task, a.variant, timings, tokens, truncated, windows)
    total = time.perf_counter() - request.state.began
    stages = {"tok": timings.tokenize, "queue": timings.queue, "infer": timings.infer, "post": timings.postprocess}
    parts = {**stages, "total": total}
    headers = {
        "X-Model-Variant": a.variant,
        "X-Model-Revision": a.sha256[:12],
        "X-Truncated": str(truncated),
        "X-Compute-Tokens": str(tokens),
        "X-Total-Time": milliseconds(total),
        "X-Tokenization-Time": milliseconds(timings.tokenize),
        "X-Queue-Time": milliseconds(timings.queue),
        "X-Inference-Time": milliseconds(timings.infer),
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in parts.items()),
    }
    return JSONResponse(answers, headers=headers)


def milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
