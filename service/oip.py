"""Health and metadata in the words of the Open Inference Protocol, for what watches servers by it.

There is no /v2/models/{name}/infer: texts are asked at /classify and /qa. A model's name is that of its folder.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.errors import NotFound
from service.metrics import version
from service.model import OnnxModel
from service.schemas import ErrorBody
from service.state import service_of

NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": ErrorBody}}
NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody}}

oip = APIRouter(prefix="/v2", tags=["open inference protocol"])


@oip.get("/health/live", responses=NOT_READY, summary="The same as /livez")
async def live(request: Request) -> dict[str, bool]:
    service_of(request).lifecycle.check_alive()
    return {"live": True}


@oip.get("/health/ready", responses=NOT_READY, summary="The same as /readyz")
async def ready(request: Request) -> dict[str, bool]:
    service_of(request).lifecycle.check_ready()
    return {"ready": True}


@oip.get("", summary="Name and version of the server")
async def server() -> dict[str, Any]:
    return {"name": "dsformer", "version": version(), "extensions": []}


@oip.get("/models/{name}/ready", responses=NOT_READY | NO_MODEL, summary="Is this model loaded and ready?")
async def model_ready(name: str, request: Request) -> dict[str, Any]:
    find(request, name)
    service_of(request).lifecycle.check_ready()
    return {"name": name, "ready": True}


@oip.get("/models/{name}", responses=NO_MODEL, summary="Inputs and outputs of a model's graph")
async def model_metadata(name: str, request: Request) -> dict[str, Any]:
    model = find(request, name)
    width = len(model.artifact.labels) if model.artifact.task == "classify" else -1
    return {
        "name": name,
        "versions": [model.artifact.sha256[:12]],
        "platform": "onnx_onnxruntime",
        "inputs": [{"name": each, "datatype": "INT64", "shape": [-1, -1]} for each in model.inputs],
        "outputs": [{"name": each, "datatype": "FP32", "shape": [-1, width]} for each in model.outputs],
    }


def find(request: Request, name: str) -> OnnxModel:
    for model in service_of(request).models:
        if model.artifact.name == name:
            return model
    raise NotFound("There is no such model; GET /info names those that are loaded.")
