"""Log lines as JSON, and OpenTelemetry traces: what they tell, and that no text of a user is in them."""

from __future__ import annotations

import builtins
import http.server
import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from harness import Served

from service import logs, tracing
from service.app import create_app
from service.errors import StartError
from service.settings import Settings

SECRET = "supercalifragilistic"


def test_json_lines(models: Path, make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    stream, root = io.StringIO(), logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        logs.configure("info", "json")
        with make_client(models / "tiny-classify-dense") as client:
            client.post(f"/classify?q={SECRET}", json={"inputs": SECRET}, headers={"x-request-id": "mine-1"})
            client.post("/classify", json={"inputs": "", SECRET: 1})
    finally:
        root.handlers, root.level = before
    # The client of the test writes lines of its own.
    lines = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["logger"].startswith("service")]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    good, bad = (line for line in lines if line["message"] == "request" and line["route"] == "/classify")
    assert (good["request_id"], good["status"], good["variant"]) == ("mine-1", 200, "dense")
    assert (bad["status"], len(bad["request_id"])) == (422, 32)
    assert SECRET not in json.dumps(lines)


def test_an_extra_never_hides_what_every_line_has() -> None:
    record = logging.LogRecord("a", logging.INFO, "f", 1, "said", (), None)
    record.level, record.odd = "fake", object()
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["level"], line["message"]) == ("INFO", "said")
    assert "object" in line["odd"]


def test_spans_tell_route_and_status_and_no_text(models: Path) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    exporter = memory.InMemorySpanExporter()
    app = create_app(Settings(models=models / "tiny-classify-dense", threads=1))
    close = tracing.instrument(app, exporter)
    with TestClient(app) as client:
        while client.get("/readyz").status_code != 200:
            pass
        parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        answer = client.post(f"/variants/dense/classify?q={SECRET}", json={"inputs": SECRET}, headers=parent)
        assert answer.status_code == 200
        assert client.post("/classify", json={"inputs": ""}).status_code == 422
    close()
    good, bad = exporter.get_finished_spans()  # none of the probes
    assert good.name.endswith("/variants/{variant}/classify")
    assert f"{good.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert 200 in good.attributes.values()
    assert 422 in bad.attributes.values()
    assert SECRET not in good.to_json() + bad.to_json()


def test_the_process_sends_its_spans(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    with Served(models / "tiny-classify-dense", traces=True) as service:
        url = f"http://127.0.0.1:{service.port}/classify"
        assert httpx.post(url, json={"inputs": SECRET}).status_code == 200
    collector.shutdown()
    collector.server_close()
    sent = b"".join(received)
    assert b"/classify" in sent
    assert b"dsformer" in sent
    assert SECRET.encode() not in sent


def test_without_the_library_a_sentence_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object, **named: object) -> object:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StartError, match=r"pip install dsformer\[otel\]"):
        create_app(Settings(models=models / "tiny-classify-dense", threads=1, traces=True))
