"""The HTTP service: routes, and what happens at start and end.

    POST /classify /qa                      the default variant, or parameters.variant
    POST /variants/{variant}/classify|qa    the variant in the path
    GET  /livez /readyz /health /info /metrics /docs

A request's way: edge.py (id, size) -> schemas.py -> classify.py or qa.py (tokenize) -> engine.py -> model.py ->
classify.py or qa.py (decode) -> the answer with its timings. Inference never runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import tokenizers
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException

import kernels
from service import classify, errors, qa, registry
from service.artifact import Task
from service.edge import Observed, TaskRoute, log_failure
from service.engine import Engine, Timings
from service.errors import Invalid, Malformed, MethodNotAllowed, NotFound, NotReady, ServiceError, StartError
from service.metrics import Metrics, version
from service.model import RUNTIME_VERSION, Logits, OnnxModel
from service.registry import Registry
from service.schemas import TAGS, Answer, ClassifyRequest, ErrorBody, LabelScore, QaRequest, Status
from service.settings import Settings
from service.tokenizer import Row

log = logging.getLogger(__name__)

WARM_UP_LENGTHS = (8, 32, 128, 384)
WARM_UP_RUNS = 2
ERRORS = {code: {"model": ErrorBody} for code in (400, 404, 405, 413, 415, 422, 424, 500, 503)}

tasks = APIRouter(route_class=TaskRoute, responses=ERRORS, tags=["tasks"])  # type: ignore[arg-type]
probes = APIRouter(tags=["service"])


NO_ISA = kernels.Isa("", "no model uses the custom op")


@dataclass
class Service:
    """All that the routes share."""

    settings: Settings
    models: Registry
    engine: Engine
    metrics: Metrics
    isa: kernels.Isa
    ready: bool = False
    failure: str = ""
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def check_ready(self) -> None:
        if self.failure:
            raise NotReady(self.failure)
        if not self.ready:
            raise NotReady("The models are still warming up; try again in a moment.")


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# ---------------------------------------------------------------------------------------------------------------- tasks


@tasks.post("/classify", response_model=list[list[LabelScore]], summary="Classify texts")
async def classify_default(request: Request, body: ClassifyRequest) -> Response:
    """One inner list of labels per input, always."""
    return await run_classify(request, body, body.parameters.variant)


@tasks.post("/variants/{variant}/classify", response_model=list[list[LabelScore]], summary="Classify with one variant")
async def classify_variant(variant: str, request: Request, body: ClassifyRequest) -> Response:
    return await run_classify(request, body, one_variant(variant, body.parameters.variant))


@tasks.post("/qa", response_model=Answer | list[Answer] | list[list[Answer]], summary="Answer questions from a context")
async def qa_default(request: Request, body: QaRequest) -> Response:
    """An object for one input; a list of answers where `top_k` is given; a list of those for a list of inputs."""
    return await run_qa(request, body, body.parameters.variant)


@tasks.post(
    "/variants/{variant}/qa",
    response_model=Answer | list[Answer] | list[list[Answer]],
    summary="Answer questions with one variant",
)
async def qa_variant(variant: str, request: Request, body: QaRequest) -> Response:
    return await run_qa(request, body, one_variant(variant, body.parameters.variant))


def one_variant(path: str, parameter: str | None) -> str:
    if parameter not in (None, path):
        raise Invalid("parameters.variant: it differs from the variant in the path; leave one of them out.")
    return path


async def run_classify(request: Request, body: ClassifyRequest, variant: str | None) -> Response:
    service, items, parameters = service_of(request), body.items(), body.parameters
    model = choose(request, "classify", variant, len(items))
    truncation = parameters.truncation or service.settings.truncation
    timings = Timings()
    (rows, cut), timings.tokenize = await service.engine.work(
        lambda: classify.prepare(model.tokenizer, items, truncation, model.max_length)
    )
    outputs = await service.engine.infer(model, rows, timings)
    function = parameters.function_to_apply
    if function == "default":
        function = classify.function_of(model.artifact.config)
    labels = model.artifact.labels
    answers, timings.postprocess = await service.engine.work(
        lambda: [classify.answer(logits, labels, function, parameters.top_k) for (logits,) in outputs]
    )
    return reply(request, model, answers, timings, rows, cut)


async def run_qa(request: Request, body: QaRequest, variant: str | None) -> Response:
    service, items, parameters = service_of(request), body.items(), body.parameters
    model = choose(request, "qa", variant, len(items))
    timings = Timings()
    passages, timings.tokenize = await service.engine.work(
        lambda: qa.prepare(model.tokenizer, items, parameters, model.max_length, service.settings.max_windows)
    )
    rows = [window.row for passage in passages for window in passage.windows]
    outputs = await service.engine.infer(model, rows, timings)
    answers, timings.postprocess = await service.engine.work(lambda: decode(passages, outputs, body))
    for passage in passages:
        service.metrics.windows(len(passage.windows))
    return reply(request, model, answers, timings, rows, sum(passage.question_cut for passage in passages))


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
    service.check_ready()
    if items == 0:
        raise Malformed("inputs: the batch is empty.")
    if items > service.settings.max_batch_items:
        raise Invalid(f"inputs: {items} inputs in one request; at most {service.settings.max_batch_items} are allowed.")
    return model


def reply(
    request: Request, model: OnnxModel, answers: Any, timings: Timings, rows: Sequence[Row], truncated: int
) -> Response:
    """The answer, with its timings in the headers that Text Embeddings Inference uses and in Server-Timing.

    The former are whole milliseconds, as their readers expect; Server-Timing has fractions, and browsers draw it.
    """
    a = model.artifact
    tokens = sum(len(row) for row in rows)
    service_of(request).metrics.answered(a.task, a.variant, timings, tokens, truncated)
    total = time.perf_counter() - request.state.began
    parts = {"tok": timings.tokenize, "queue": timings.queue, "infer": timings.infer, "post": timings.postprocess}
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


# --------------------------------------------------------------------------------------------------------------- probes


@probes.get("/livez", response_model=Status, responses={503: {"model": ErrorBody}}, summary="Does the process work?")
async def livez(request: Request) -> Response:
    """503 only where a restart may help: after a failed warm-up."""
    if service_of(request).failure:
        service_of(request).check_ready()
    return JSONResponse({"status": "ok"})


@probes.get("/readyz", response_model=Status, responses={503: {"model": ErrorBody}}, summary="May requests come?")
@probes.get("/health", response_model=Status, responses={503: {"model": ErrorBody}}, summary="The same as /readyz")
async def readyz(request: Request) -> Response:
    service_of(request).check_ready()
    return JSONResponse({"status": "ready"})


@probes.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service_of(request).metrics.registry), headers={"Content-Type": content_type})


@probes.get("/info", summary="Models, limits and versions")
async def info(request: Request) -> dict[str, Any]:
    service = service_of(request)
    settings = service.settings
    return {
        "version": version(),
        "default_variants": service.models.defaults,
        "models": [describe(model) for model in service.models],
        "truncation": settings.truncation,
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_batch_items": settings.max_batch_items,
            "max_windows": settings.max_windows,
            "max_batch_tokens": settings.max_batch_tokens,
        },
        "runtime": {
            "onnxruntime": RUNTIME_VERSION,
            "tokenizers": tokenizers.__version__,
            "threads": settings.threads,
            "isa": service.isa.name,
            "isa_reason": service.isa.reason,
        },
        "ready": service.ready,
    }


def describe(model: OnnxModel) -> dict[str, Any]:
    a, section = model.artifact, model.artifact.config.dsformer
    shown = {
        "name": a.name,
        "task": a.task,
        "variant": a.variant,
        "base_model": section.base_model,
        "preset": section.preset,
        "gamma": section.gamma,
        "delta": section.delta,
        "block_size": section.block_size,
        "precision": section.precision,
        "sha256": a.sha256,
        "file_bytes": model.file_bytes,
        "load_seconds": round(model.load_seconds, 3),
        "max_length": model.max_length,
    }
    if a.task == "classify":
        shown |= {
            "labels": a.labels,
            "problem_type": a.config.problem_type,
            "function_to_apply": classify.function_of(a.config),
        }
    return shown


# ------------------------------------------------------------------------------------------------------------------ app


def create_app(settings: Settings) -> FastAPI:
    """Open every model, then build the service around them. Raises StartError."""
    models = registry.load(settings)
    isa = chosen_isa(models)
    service = Service(
        settings=settings,
        models=models,
        engine=Engine(settings.threads, settings.max_batch_tokens),
        metrics=Metrics(models, settings.threads, isa.name),
        isa=isa,
    )
    app = FastAPI(
        title="DSFormer",
        version=version(),
        description="Text classification and question answering by dense and by DSFormer-compressed BERT models.",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(tasks)
    app.include_router(probes)
    app.add_middleware(Observed, metrics=service.metrics)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    for path in ("/classify", "/qa", "/variants/{variant}/classify", "/variants/{variant}/qa"):
        service.metrics.expect(path, "POST", (200, *ERRORS))
    log.info(
        "service configured",
        extra=settings.model_dump(mode="json") | {"isa": isa.name or "-", "isa_reason": isa.reason},
    )
    return app


def chosen_isa(models: Registry) -> kernels.Isa:
    if "dsformer" not in models.variants:
        return NO_ISA
    try:
        return kernels.isa()
    except (RuntimeError, ValueError, OSError) as error:
        raise StartError(f"The custom op cannot choose its instruction set: {error}") from error


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Warm up while the probes already answer."""
    service: Service = app.state.service
    service.background.add(asyncio.create_task(warm_up(service)))
    yield
    for task in service.background:
        task.cancel()
    service.engine.close()


async def warm_up(service: Service) -> None:
    """Run every model at a few lengths; only then is the service ready."""
    began = time.perf_counter()
    try:
        for model in service.models:
            for length in sorted({min(length, model.max_length) for length in WARM_UP_LENGTHS}):
                row = Row(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64))
                for _ in range(WARM_UP_RUNS):
                    await service.engine.infer(model, [row], Timings())
            service.metrics.ready(model)
    except Exception as error:
        log_failure(error, "warm-up")
        service.failure = "The warm-up failed; the log of the service holds the reason."
        return
    service.ready = True
    log.info("ready", extra={"warm_up_seconds": round(time.perf_counter() - began, 3)})


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log_failure(error, request.state.request_id)
    return errors.response(error, request.state.request_id)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong verb, a body that the JSON parser gave up on."""
    assert isinstance(error, HTTPException)
    known: dict[int, ServiceError] = {
        400: Malformed("The body is not valid JSON, or is nested too deeply."),
        404: NotFound("There is no such route; GET /docs shows them all."),
        405: MethodNotAllowed(
            f"This route does not take {request.method}; GET /docs shows what it takes.",
            (error.headers or {}).get("Allow", ""),
        ),
    }
    return errors.response(known.get(error.status_code, ServiceError(str(error.detail))), request.state.request_id)


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return errors.response(errors.from_validation(error.errors(), TAGS), request.state.request_id)
