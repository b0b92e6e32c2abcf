"""What surrounds every request: its id, parsing, error bodies, response counters and the access log line.

Requests to a task go straight from here to their route; all others go through FastAPI's own layers, which take longer
than all that is done for a sentence but the inference. While the door of the service is crowded, a request to a task is
refused here, before its body is read: the refused must not cost the others their answers.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import time
import traceback
import typing
import uuid
from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import bodies, errors
from service.admission import WAIT_SECONDS, guess
from service.errors import ClientGone, Invalid, Overloaded, ServiceError
from service.schemas import TAGS
from service.state import Service, service_of

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TIMEOUT_HEADER = "X-Request-Timeout"
# The log says so often how many were refused, and not of each.
REFUSED_SECONDS = 10.0
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OUTCOME_OF_STATUS = {ClientGone.status: "cancelled", 429: "overloaded", 503: "not_ready", 504: "deadline"}


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Observed:
    """Outermost layer: gives each request an id and a clock, and counts and logs its response."""

    def __init__(self, app: ASGIApp, service: Service, routes: Iterable[BaseRoute] = ()) -> None:
        self._app = app
        self._service = service
        self._metrics = service.metrics
        self._lifecycle = service.lifecycle
        self._tasks = TaskTable(route for route in routes if isinstance(route, TaskRoute))
        self._refused, self._refused_logged = 0, -REFUSED_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = request_id_of(Headers(scope=scope).get("x-request-id"))
        id_header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message["headers"])
                headers.append(id_header)
                if self._lifecycle.draining:
                    # So that no request is on its way when the connection closes.
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        state["began"] = began
        handler = self._tasks.handler(scope)
        try:
            if handler is None:
                await self._app(scope, receive, send_with_id)
            else:
                await self._answer(handler, scope, receive, send_with_id)
        except ClientDisconnect:
            status = ClientGone.status
        except Exception as error:
            log_failure(error, request_id)
            if status:
                raise  # the answer has begun; the server can only cut the connection
            failed = ServiceError("The service failed on this request; its log holds the reason under the request_id.")
            await errors.response(failed, request_id)(scope, receive, send_with_id)
        self._observe(scope, status, time.perf_counter() - began)

    async def _answer(self, handler: Handler, scope: Scope, receive: Receive, send: Send) -> None:
        """What a task's route says, or why it does not."""
        state = scope["state"]
        state["task"] = scope["route"].task
        request = Request(scope, receive, send)
        try:
            self._service.keys.check(request.headers.get("authorization"))
            admission = self._service.admission
            if admission.crowded:
                length = request.headers.get("content-length", "")
                refusal = admission.refusal(guess(int(length) if length.isdecimal() else 0))
                if hold := admission.hold_seconds():
                    await asyncio.sleep(hold)
                raise refusal
            response = await handler(request)
        except ServiceError as error:
            response = failure(error, state["request_id"])
        await response(scope, receive, send)

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
        if status == Overloaded.status:
            self._log_refused()
        # Probes and scrapes come every few seconds and say nothing while they succeed.
        quiet = (method in ("GET", "HEAD") and status < 400) or status == Overloaded.status
        level = logging.DEBUG if quiet else logging.INFO
        if not log.isEnabledFor(level):
            return
        log.log(
            level,
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

    def _log_refused(self) -> None:
        """One line for many: under a flood of requests, a line for each would be a flood of its own."""
        self._refused += 1
        now = time.monotonic()
        if now - self._refused_logged >= REFUSED_SECONDS:
            log.warning("the service is full", extra={"refused": self._refused})
            self._refused, self._refused_logged = 0, now


def outcome_of(status: int) -> str:
    if status < 400:
        return "ok"
    return OUTCOME_OF_STATUS.get(status, "invalid" if status < 500 else "error")


def request_id_of(sent: str | None) -> str:
    """The client's own id where it is harmless to repeat, else a fresh one."""
    return sent if sent and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def failure(error: ServiceError, request_id: str) -> Response:
    """The error as the client sees it; the log tells more where the service is to blame."""
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log_failure(error, request_id)
    return errors.response(error, request_id)


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

    def get_route_handler(self) -> Handler:
        async def handle(request: Request) -> Response:
            service_of(request).keys.check(request.headers.get("authorization"))
            return await self.answer(request, await self.receive(request))

        return handle

    async def receive(self, request: Request) -> bytes:
        """The body as it was sent, still compressed."""
        bodies.check_media_type(request)
        return await bodies.read_raw(request, service_of(request).settings.max_body_bytes)

    async def answer(self, request: Request, content: bytes) -> Response:
        plain = bodies.plain(request, content, service_of(request).settings.max_body_bytes)
        try:
            body = self.body_type.model_validate_json(plain)
        except ValidationError as error:
            raise errors.from_validation(error.errors(include_url=False, include_input=False), TAGS) from None
        response: Response = await self.endpoint(request=request, body=body, **request.path_params)
        return response

    @functools.cached_property
    def body_type(self) -> type[BaseModel]:
        found: type[BaseModel] = typing.get_type_hints(self.endpoint)["body"]
        return found


class TaskRoute(BodyRoute):
    """A route whose requests cost inference: they are admitted, or refused, once their body is there.

    `Observed` has checked the key before it looked at the door.
    """

    def get_route_handler(self) -> Handler:
        async def handle(request: Request) -> Response:
            content = await self.receive(request)
            admission = service_of(request).admission
            waits = not admission.has_room(guess(len(content)))
            with await admission.enter(guess(len(content)), patience(request, WAIT_SECONDS)) as ticket:
                if waits and await request.is_disconnected():
                    raise ClientGone("The client has left.")
                request.state.ticket = ticket
                return await self.answer(request, content)

        return handle

    @property
    def task(self) -> str:
        return "qa" if self.path.endswith("/qa") else "classify"


class TaskTable:
    """The routes of the tasks by their path. Of a path's parts, only a variant changes."""

    def __init__(self, routes: Iterable[TaskRoute]) -> None:
        self._fixed: dict[str, tuple[TaskRoute, Handler]] = {}
        self._patterns: list[tuple[TaskRoute, Handler]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((route, route.get_route_handler()))
            else:
                self._fixed[route.path] = route, route.get_route_handler()

    def handler(self, scope: Scope) -> Handler | None:
        """Who answers the request, noted in its scope as the router would; None if it is not for a task."""
        if scope["method"] != "POST":
            return None
        path = scope["path"]
        found, parameters = self._fixed.get(path), {}
        if found is None:
            for route, handler in self._patterns:
                if match := route.path_regex.match(path):
                    found, parameters = (route, handler), match.groupdict()
                    break
            else:
                return None
        scope["route"], scope["path_params"] = found[0], parameters
        return found[1]


def patience(request: Request, longest: float) -> float:
    """Seconds that a request may wait: the setting, or less where its header says so."""
    sent = request.headers.get(TIMEOUT_HEADER)
    if sent is None:
        return longest
    try:
        seconds = float(sent)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise Invalid(f"The header {TIMEOUT_HEADER} is a number of seconds above 0.")
    return min(seconds, longest)
