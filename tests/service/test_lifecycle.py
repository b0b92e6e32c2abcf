"""When the service is ready, when it is not, and how it says so."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.errors import BackendFailed
from service.lifecycle import shapes
from service.model import OnnxModel
from service.settings import Settings


def check_refused(response: Any, error_type: str, words: str) -> None:
    assert response.status_code == 503, response.text
    assert response.json()["error_type"] == error_type
    assert words in response.json()["error"]
    assert response.headers["retry-after"] == "1"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def alone(models: Path, make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    """A client of a service of its own, whose patience is short."""
    with make_client(models / "tiny-classify-dense", stall_seconds=0.3, hang_seconds=1.5) as client:
        yield client


def test_the_grid_of_the_warm_up() -> None:
    assert shapes(128, 256) == [
        (1, 8),
        (32, 8),
        (1, 16),
        (16, 16),
        (1, 32),
        (8, 32),
        (1, 64),
        (4, 64),
        (1, 128),
        (2, 128),
    ]
    assert shapes(100, 64)[-1] == (1, 100)


def test_not_ready_before_the_warm_up_ended(alone: TestClient) -> None:
    alone.app.state.service.lifecycle.ready = False
    for response in (alone.get("/readyz"), alone.get("/health"), alone.post("/classify", json={"inputs": "a"})):
        check_refused(response, "not_ready", "warming up")
    assert alone.get("/livez").status_code == 200


def test_a_failed_warm_up_is_neither_ready_nor_alive(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(models=models, threads=1))
    monkeypatch.setattr(OnnxModel, "run", lambda *_: (_ for _ in ()).throw(BackendFailed("broken.")))
    with TestClient(app) as client:
        wait_for(lambda: bool(app.state.service.lifecycle.failure))
        check_refused(client.get("/readyz"), "not_ready", "warm-up failed")
        check_refused(client.get("/livez"), "not_ready", "warm-up failed")


def test_logits_other_than_the_stored_ones_are_never_served(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "mine", "qa", "dsformer")
    stored = json.loads((folder / "golden.json").read_text())
    stored["rows"][1]["end_logits"][2] += 3 * stored["tolerance"]
    (folder / "golden.json").write_text(json.dumps(stored))
    app = create_app(Settings(models=folder, threads=1))
    with TestClient(app) as client:
        wait_for(lambda: bool(app.state.service.lifecycle.failure))
        check_refused(client.get("/readyz"), "not_ready", "The self-test of mine failed")
        check_refused(client.post("/qa", json={"inputs": {"question": "a", "context": "a"}}), "not_ready", "self-test")


def test_the_end_of_the_service_is_seen_at_once_and_requests_are_still_served(alone: TestClient) -> None:
    life = alone.app.state.service.lifecycle
    life.draining = True
    check_refused(alone.get("/readyz"), "draining", "ending")
    served = alone.post("/classify", json={"inputs": "good"})
    assert (served.status_code, served.headers["connection"]) == (200, "close")
    assert alone.get("/livez").status_code == 200
    life.closed = True
    check_refused(alone.post("/classify", json={"inputs": "good"}), "draining", "ending")


def test_a_hanging_inference_is_seen_and_recovered_from(alone: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, run = threading.Event(), OnnxModel.run
    ended: list[float] = []
    alone.app.state.service.end = lambda: ended.append(time.monotonic())
    monkeypatch.setattr(OnnxModel, "run", lambda self, rows: (go_on.wait(20), run(self, rows))[1])
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(alone.post("/classify", json={"inputs": "good"})))
    asking.start()
    began = time.monotonic()
    wait_for(lambda: alone.get("/readyz").status_code == 503)
    assert time.monotonic() - began < 2
    check_refused(alone.get("/readyz"), "not_ready", "far longer")
    go_on.set()
    asking.join(10)
    assert answers[0].status_code == 200
    assert alone.get("/readyz").status_code == 200
    assert not ended


def test_an_inference_that_never_ends_ends_the_service(alone: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    ended = threading.Event()
    alone.app.state.service.end = ended.set
    monkeypatch.setattr(OnnxModel, "run", lambda *_: go_on.wait(20))
    check_refused(alone.post("/classify", json={"inputs": "good"}), "not_ready", "about to end")
    assert ended.is_set()
    check_refused(alone.get("/livez"), "not_ready", "about to end")
    go_on.set()


def test_a_dead_inference_thread_ends_the_service(alone: TestClient) -> None:
    service = alone.app.state.service
    ended = threading.Event()
    service.end = ended.set
    thread = service.engine._thread
    # The exception reaches the thread at its next step, so it gets one.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    began = time.monotonic()
    alone.post("/classify", json={"inputs": "good"})
    wait_for(lambda: alone.get("/readyz").status_code == 503, 2)
    assert time.monotonic() - began < 2
    wait_for(ended.is_set, 2)
    assert not thread.is_alive()
