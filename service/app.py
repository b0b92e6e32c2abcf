"""The HTTP service, put together: models, engine, routes, errors; and what happens at start and end.

    POST /classify /qa                      the default variant, or parameters.variant
    POST /variants/{variant}/classify|qa    the variant in the path
    POST /predict                           /classify in the words of Text Embeddings Inference
    POST /compare                           every variant on the same input
    GET  /                                  the page for people
    GET  /livez /readyz /health /info /metrics /docs
    GET  /v2...                             health and metadata by the Open Inference Protocol

A request's way: edge.py (id, size) -> admission.py -> schemas.py -> tasks.py -> classify.py or qa.py (tokenize) ->
engine.py (batching.py, model.py) -> classify.py or qa.py (decode) -> the answer with its timings. Inference never runs
on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import kernels
from service import errors, keys, lifecycle, registry, tracing
from service.admission import Admission
from service.compare import comparisons
from service.compare_metrics import CompareMetrics
from service.edge import BodyRoute, Observed, failure, log_failure
from service.engine import Engine
from service.errors import MethodNotAllowed, NotFound, NotReady, ServiceError, StartError
from service.lane import Lane
from service.lifecycle import Lifecycle
from service.metrics import Metrics, version
from service.oip import oip
from service.page import page
from service.probes import probes
from service.registry import Registry
from service.reload import Reloader
from service.settings import Settings
from service.state import Service
from service.tasks import ERRORS, tasks
from service.workers import Workers

log = logging.getLogger(__name__)

NO_ISA = kernels.Isa("", "no model uses the custom op")


def create_app(settings: Settings) -> FastAPI:
    """Open every model, then build the service around them. Raises StartError."""
    models = registry.load(settings)
    isa = chosen_isa(models)
    metrics = Metrics(models, settings.threads, isa.name, settings.max_queue_tokens)
    engine = Engine(settings.max_batch_tokens, metrics.batch, settings.stall_seconds)
    admission = Admission(settings.max_queue_tokens, lambda: engine.tokens_per_second)
    lane = Lane(admission)
    service = Service(
        settings=settings,
        models=models,
        keys=keys.load(settings.api_key, settings.api_key_file),
        workers=Workers(settings.threads),
        admission=admission,
        engine=engine,
        lifecycle=Lifecycle(engine, settings.hang_seconds),
        metrics=metrics,
        lane=lane,
        compare_metrics=CompareMetrics(metrics.registry, models, lambda: lane.inside),
        isa=isa,
    )
    app = FastAPI(
        title="DSFormer",
        version=version(),
        description="Text classification and question answering by dense and by DSFormer-compressed BERT models.",
        lifespan=lifespan,
        docs_url=None,  # page/ has it, from files of its own
        redoc_url=None,
        redirect_slashes=False,
    )
    service.reloader = Reloader(service, lambda models: take_over(service, models))
    app.state.service = service
    app.include_router(tasks)
    app.include_router(comparisons)
    app.include_router(page)
    app.include_router(probes)
    app.include_router(oip)
    app.add_middleware(Observed, service=service, routes=tasks.routes)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    for route in (*tasks.routes, *comparisons.routes):
        assert isinstance(route, BodyRoute)
        service.metrics.expect(route.path, "POST", (200, *ERRORS))
    if settings.traces:
        service.closing.append(tracing.instrument(app))
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


def take_over(service: Service, models: Registry) -> None:
    """All that is told of the models, told of those that have just replaced them."""
    service.isa = chosen_isa(models)
    service.metrics.describe(models, service.settings.threads, service.isa.name)
    service.compare_metrics.describe(models)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Warm up while the probes already answer."""
    service: Service = app.state.service
    background = [
        asyncio.create_task(live(service)),
        asyncio.create_task(service.lifecycle.watch(lambda: service.end())),
    ]
    yield
    for task in background:
        task.cancel()
    service.workers.close()
    service.lane.close()
    service.engine.close()
    for close in service.closing:
        close()


async def live(service: Service) -> None:
    """Get ready, then look out for new models."""
    await get_ready(service)
    if service.lifecycle.ready:
        await service.reloader.watch()


async def get_ready(service: Service) -> None:
    """Warm up and test every model; only then is the service ready."""
    began = time.perf_counter()
    try:
        for model in service.models:
            await lifecycle.warm_up(service.engine, model, service.settings.max_batch_tokens)
            error = await lifecycle.self_test(service.engine, model)
            service.metrics.tested(model, error)
            log.info(
                "model tested",
                extra={
                    "folder": str(model.artifact.path),
                    "max_abs_error": round(error, 6),
                    "allowed": model.artifact.golden.tolerance,
                },
            )
    except Exception as error:
        log_failure(error, "warm-up")
        sentence = error.sentence if isinstance(error, NotReady) else ""
        service.lifecycle.failure = sentence or "The warm-up failed; the log of the service holds the reason."
        log.critical(service.lifecycle.failure)
        return
    service.lifecycle.ready = True
    log.info(
        "ready",
        extra={
            "warm_up_seconds": round(time.perf_counter() - began, 3),
            "tokens_per_second": round(service.engine.tokens_per_second),
        },
    )


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return failure(error, request.state.request_id)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong verb."""
    assert isinstance(error, HTTPException)
    known: dict[int, ServiceError] = {
        404: NotFound("There is no such route; GET /docs shows them all."),
        405: MethodNotAllowed(
            f"This route does not take {request.method}; GET /docs shows what it takes.",
            (error.headers or {}).get("Allow", ""),
        ),
    }
    return errors.response(known.get(error.status_code, ServiceError(str(error.detail))), request.state.request_id)
