"""A client of the service for `dsformer-bench`: one connection that is kept, and blocking calls, for use in threads.

`http.client` of the standard library: what it adds to a request, some 0.2 ms, is the same for every variant.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service.errors import StartError

NO_ANSWER = 0  # the status of a request that nobody answered
TIMEOUT_SECONDS = 120.0
SERVICE_MILLISECONDS = re.compile(r"total;dur=([\d.]+)")


@dataclass(frozen=True)
class Reply:
    """status: NO_ANSWER where the connection failed. seconds: from the first byte sent to the last one read.

    service_seconds: from the request's arrival to its answer, as the service says in Server-Timing (None: it does not).
    """

    status: int
    seconds: float
    content: bytes = b""
    service_seconds: float | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def reason(self) -> str:
        """The service's own sentence of an error."""
        try:
            return str(self.json()["error"])
        except (ValueError, KeyError, TypeError):
            return f"status {self.status}" if self.status else "no answer"


class Client:
    """Not for two threads at once."""

    def __init__(self, url: str, key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartError(f"--url expects an address such as http://127.0.0.1:8000, got {url!r}.")
        try:
            port = parts.port
        except ValueError as error:
            raise StartError(f"--url expects an address such as http://127.0.0.1:8000, got {url!r}: {error}.") from None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, port, timeout=timeout)
        self._base = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> Reply:
        return self._ask("GET", path, None)

    def post(self, path: str, content: bytes) -> Reply:
        return self._ask("POST", path, content)

    def _ask(self, method: str, path: str, content: bytes | None) -> Reply:
        began = time.perf_counter()
        kept = self._connection.sock is not None
        for again in (kept, False):
            try:
                self._connection.request(method, self._base + path, content, self._headers)
                response = self._connection.getresponse()
                answer = response.read()
                seconds = time.perf_counter() - began
                own = SERVICE_MILLISECONDS.search(response.getheader("Server-Timing", ""))
                return Reply(response.status, seconds, answer, float(own[1]) / 1000 if own else None)
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # A kept connection may have been closed by the other side meanwhile: once more, over a fresh one.
                if not (again and isinstance(error, ConnectionResetError | BrokenPipeError)):
                    break
        return Reply(NO_ANSWER, time.perf_counter() - began)

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Server:
    """What /info says: the models by (task, variant), dense before the others, and the runtime."""

    models: dict[tuple[str, str], dict[str, Any]]
    runtime: dict[str, Any]
    version: str

    def variants(self, task: str) -> list[str]:
        return [variant for kind, variant in self.models if kind == task]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.models))


def look(client: Client, url: str) -> Server:
    """Which models the service at the url has. Raises StartError where there is none, or it is not ready."""
    reply = client.get("/info")
    if not reply.ok:
        raise StartError(
            f"No DSFormer service answers at {url} ({reply.reason}): start one with dsformer-serve, or give its --url."
        )
    try:
        told = reply.json()
        models = sorted(told["models"], key=lambda model: (model["task"], model["variant"] != "dense"))
        server = Server({(m["task"], m["variant"]): m for m in models}, told["runtime"], told["version"])
    except (ValueError, KeyError, TypeError):
        raise StartError(f"What answers at {url} is no DSFormer service: its /info is something else.") from None
    ready = client.get("/readyz")
    if not ready.ok:
        raise StartError(f"The service at {url} is not ready: {ready.reason}")
    return server


def choose_variants(server: Server, task: str, wanted: str) -> list[str]:
    """The wanted variants of a task (comma-separated; "" for all), in the order asked for."""
    has = server.variants(task)
    chosen = list(dict.fromkeys(filter(None, (part.strip() for part in wanted.split(","))))) or has
    for variant in chosen:
        if variant not in has:
            raise StartError(f"The service has no variant {variant!r} for {task}; it has {', '.join(has) or 'none'}.")
    return chosen


def read_key(file: Path | None) -> str | None:
    """The first key of an --api-key-file."""
    if file is None:
        return None
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None:
        raise StartError(f"{file} holds no API key.")
    return key
