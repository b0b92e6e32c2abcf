"""The errors, and what a client sees of each.

    StartError                     the service does not start: a sentence on stderr and exit code 1
    ServiceError                   an answer other than 200
    ├── Malformed            400   not JSON, empty body, empty batch, broken compression
    ├── Unauthorized         401   no API key, or an unknown one
    ├── NotFound             404   no such route or variant
    ├── MethodNotAllowed     405
    ├── PayloadTooLarge      413   body over max_body_bytes, compressed or not
    ├── UnsupportedMedia     415   not application/json, or an unknown Content-Encoding
    ├── Invalid              422   wrong or unknown fields, empty texts, too many inputs
    │   └── TooLong          422   longer than the model or max_text_chars takes, or more windows than allowed
    ├── TaskUnavailable      424   the variant exists but has no model for this task
    ├── Overloaded           429   more tokens wait than max_queue_tokens
    ├── ClientGone           499   never seen by anybody: the client has left
    ├── BackendFailed        500   the model failed or gave NaN
    ├── NotReady             503   before the warm-up ended, after it or the self-test failed, or when inference hangs
    │   └── Draining         503   after SIGTERM
    └── DeadlineExceeded     504   waited longer than max_queue_seconds, or the X-Request-Timeout of the request

Every error leaves as {"error", "error_type", "request_id", "detail"}; `error` is a sentence, `detail` a list of
{"field", "message"} (empty where one sentence says it all). The values of a request are never repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi.responses import Response

MAX_DETAILS = 20
MAX_FIELD_CHARS = 120


class StartError(Exception):
    """The service cannot start; the message is a sentence that says what to mend."""


class ServiceError(Exception):
    """An answer other than 200. Subclasses set `status` and `error_type`."""

    status = 500
    error_type = "internal"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, sentence: str, detail: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.detail = list(detail)


class Malformed(ServiceError):
    status, error_type = 400, "malformed"


class Unauthorized(ServiceError):
    status, error_type = 401, "unauthorized"
    headers = MappingProxyType({"WWW-Authenticate": "Bearer"})


class NotFound(ServiceError):
    status, error_type = 404, "not_found"


class MethodNotAllowed(ServiceError):
    status, error_type = 405, "method"

    def __init__(self, sentence: str, allow: str) -> None:
        super().__init__(sentence)
        self.headers = {"Allow": allow} if allow else {}


class PayloadTooLarge(ServiceError):
    status, error_type = 413, "payload_too_large"


class UnsupportedMedia(ServiceError):
    status, error_type = 415, "media_type"


class Invalid(ServiceError):
    status, error_type = 422, "validation"


class TooLong(Invalid):
    error_type = "too_long"


class TaskUnavailable(ServiceError):
    status, error_type = 424, "task_unavailable"


class Overloaded(ServiceError):
    status, error_type = 429, "overloaded"

    def __init__(self, sentence: str, retry_after: int) -> None:
        super().__init__(sentence)
        self.headers = {"Retry-After": str(retry_after)}


class ClientGone(ServiceError):
    # No status is sent to a client that has gone; this number, nginx's, stands for it in the metrics and the log.
    status, error_type = 499, "cancelled"


class BackendFailed(ServiceError):
    status, error_type = 500, "backend"


class NotReady(ServiceError):
    status, error_type = 503, "not_ready"
    headers = MappingProxyType({"Retry-After": "1"})


class Draining(NotReady):
    error_type = "draining"


class DeadlineExceeded(ServiceError):
    status, error_type = 504, "deadline"


def response(error: ServiceError, request_id: str) -> Response:
    """The error as the client sees it."""
    body = {
        "error": error.sentence,
        "error_type": error.error_type,
        "request_id": request_id,
        "detail": error.detail,
    }
    # ASCII escapes carry even a lone surrogate in a field's name, which UTF-8 cannot.
    return Response(
        json.dumps(body, ensure_ascii=True), error.status, dict(error.headers), media_type="application/json"
    )


def from_validation(problems: Sequence[Mapping[str, Any]], tags: frozenset[str]) -> ServiceError:
    """What pydantic found wrong with a body, in sentences.

    tags : names of union members in the error's location, which are no fields of the request
    """
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = str(first["ctx"]["error"])
        if reason.startswith("recursion"):
            return Malformed("The body is not valid JSON, or is nested too deeply.")
        return Malformed(f"The body is not valid JSON: {reason}.")
    detail = [{"field": field(p["loc"], tags), "message": message(p)} for p in problems[:MAX_DETAILS]]
    where = detail[0]["field"] or "The body"
    more = f" ({len(problems) - 1} more in detail.)" if len(problems) > 1 else ""
    return Invalid(f"{where}: {detail[0]['message']}.{more}", detail)


def message(problem: Mapping[str, Any]) -> str:
    """One problem, without the value that caused it."""
    known = {
        "missing": "this field is required",
        "extra_forbidden": "there is no such field",
        "model_type": "expected a JSON object",
    }
    text = known.get(problem["type"], str(problem["msg"]))
    return text[:1].lower() + text[1:]


def field(location: Sequence[str | int], tags: frozenset[str]) -> str:
    """('inputs', 0, 'text') → 'inputs[0].text'."""
    path = ""
    for part in location:
        if part in tags:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:MAX_FIELD_CHARS]
