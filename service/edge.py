"""What surrounds every request: its id, parsing, error bodies, response counters and the access log line."""

from __future__ import annotations

import logging
import re
import time
import traceback
import typing
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import bodies, errors
from service.errors import ClientGone, ServiceError
from service.schemas import TAGS
from service.state import Service, service_of

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OUTCOME_OF_STATUS = {ClientGone.status: "cancelled", 429: "overloaded", 503: "not_ready", 504: "deadline"}


class Observed:
    """Outermost layer: gives each request an id and a clock, and counts and logs its response."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._lifecycle = service.lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = request_id_of(Headers(scope=scope).get("x-request-id"))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if self._lifecycle.draining:
                    headers["Connection"] = "close"  # so that no request is on its way when the connection closes
            await send(message)

        state["began"] = began
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = ClientGone.status
        except Exception as error:
            log_failure(error, request_id)
            if status:
                raise  # the answer has begun; the server can only cut the connection
            failed = ServiceError("The service failed on this request; its log holds the reason under the request_id.")
            await errors.response(failed, request_id)(scope, receive, send_with_id)
        self._observe(scope, status, time.perf_counter() - began)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.response(route, method, status)
        task = state.get("task")
        if task is not None:
            if "answered" in state:
                self._metrics.answered(state["answered"])
            self._metrics.request(task, state.get("variant"), outcome_of(status), seconds)
        if "count" in state:  # a route that keeps counts of its own
            state["count"](status)
        # Probes and scrapes come every few seconds and say nothing while they succeed.
        quiet = method in ("GET", "HEAD") and status < 400
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={
                "request_id": state["request_id"],
                "route": route,
                "method": method,
                "status": status,
                "variant": state.get("variant", "-"),
                "milliseconds": round(seconds * 1000, 2),
            },
        )


def outcome_of(status: int) -> str:
    if status < 400:
        return "ok"
    return OUTCOME_OF_STATUS.get(status, "invalid" if status < 500 else "error")


def request_id_of(sent: str | None) -> str:
    """The client's own id where it is harmless to repeat, else a fresh one."""
    return sent if sent and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def log_failure(error: BaseException, request_id: str) -> None:
    """Where a request failed and with what kind of error; the message is left out, for it may repeat user text."""
    frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    log.error(
        "request failed",
        extra={"request_id": request_id, "kind": type(error).__name__, "frames": " < ".join(reversed(frames))},
    )


class BodyRoute(APIRoute):
    """A route with a JSON body: key, media type and size are checked first, then pydantic parses and checks in one go.

    FastAPI reads the endpoint's signature for the OpenAPI document; its own way of parsing, through Python objects and
    dependencies, takes longer than the tokenizer.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint
        body_type: type[BaseModel] = typing.get_type_hints(endpoint)["body"]

        async def handle(request: Request) -> Response:
            self.begin(request)
            service = service_of(request)
            service.keys.check(request.headers.get("authorization"))
            bodies.check_media_type(request)
            content = await bodies.read(request, service.settings.max_body_bytes)
            try:
                body = body_type.model_validate_json(content)
            except ValidationError as error:
                raise errors.from_validation(error.errors(include_url=False, include_input=False), TAGS) from None
            response: Response = await endpoint(request=request, body=body, **request.path_params)
            return response

        return handle

    def begin(self, request: Request) -> None:
        """Say how the request is counted."""


class TaskRoute(BodyRoute):
    """A route to a task, the last part of its path."""

    def begin(self, request: Request) -> None:
        request.state.task = self.path.rsplit("/", 1)[-1]
