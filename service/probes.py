"""The routes that tell how the service is: probes, metrics, what is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import tokenizers
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import choose_encoder

from service import classify
from service.metrics import version
from service.model import RUNTIME_VERSION, OnnxModel
from service.schemas import ErrorBody, Status
from service.state import service_of

probes = APIRouter(tags=["service"])


@probes.get("/livez", response_model=Status, responses={503: {"model": ErrorBody}}, summary="Does the process work?")
async def livez(request: Request) -> Response:
    """503 only where a restart may help: after a failed warm-up or self-test, or when inference has ended."""
    service_of(request).lifecycle.check_alive()
    return JSONResponse({"status": "ok"})


@probes.get("/readyz", response_model=Status, responses={503: {"model": ErrorBody}}, summary="May requests come?")
@probes.get("/health", response_model=Status, responses={503: {"model": ErrorBody}}, summary="The same as /readyz")
async def readyz(request: Request) -> Response:
    service_of(request).lifecycle.check_ready()
    return JSONResponse({"status": "ready"})


@probes.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
async def metrics(
    request: Request,
    name: Annotated[list[str] | None, Query(alias="name[]", description="Only series of these names.")] = None,
) -> Response:
    service_of(request).observe_queue()
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    registry = service_of(request).metrics.registry
    # The type stubs know no smaller registry.
    chosen: Any = registry if name is None else registry.restricted_registry(name)
    return Response(encode(chosen), headers={"Content-Type": content_type})


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
            "max_text_chars": settings.max_text_chars,
            "max_batch_items": settings.max_batch_items,
            "max_windows": settings.max_windows,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_queue_tokens": settings.max_queue_tokens,
            "max_queue_seconds": settings.max_queue_seconds,
        },
        "runtime": {
            "onnxruntime": RUNTIME_VERSION,
            "tokenizers": tokenizers.__version__,
            "threads": settings.threads,
            "isa": service.isa.name,
            "isa_reason": service.isa.reason,
        },
        "ready": service.lifecycle.ready,
        "last_reload": service.reloader.info(),
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
