"""New models take over without a restart, or the old ones stay; no request is lost either way."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from harness import Served, ask

from service.admission import Ticket
from service.model import OnnxModel
from service.reload import fingerprint

OLD, NEW = ("BAD", "GOOD"), ("BAD", "GOOD", "MIXED")
Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_folder: Write) -> Path:
    return write_folder(tmp_path / "models" / "mine", "classify", "dsformer", OLD)


@pytest.fixture
def served(folder: Path, make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    with make_client(folder.parent, reload_seconds=0) as client:
        yield client


def replace(folder: Path, write_folder: Write, labels: tuple[str, ...], variant: str = "dsformer") -> None:
    """Another model in the place of the folder, as a careful person does it: written aside, then renamed."""
    aside = write_folder(folder.parent.parent / f"aside-{time.monotonic_ns()}", "classify", variant, labels)
    shutil.move(folder, aside.with_suffix(".old"))
    shutil.move(aside, folder)


def reload(client: TestClient) -> str:
    return str(client.portal.call(client.app.state.service.reloader.reload).result)


def labels_of(client: TestClient) -> set[str]:
    answer = client.post("/classify", json={"inputs": "the film is good"})
    assert answer.status_code == 200, answer.text
    return {each["label"] for each in answer.json()[0]}


def count(client: TestClient, result: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(x for x in lines if x.startswith(f'dsformer_reloads_total{{result="{result}"}}')).split()[-1])


def test_a_new_model_takes_over(served: TestClient, folder: Path, write_folder: Write) -> None:
    old = weakref.ref(next(iter(served.app.state.service.models)))
    assert labels_of(served) == set(OLD)
    assert reload(served) == "unchanged"
    assert old() is next(iter(served.app.state.service.models))
    replace(folder, write_folder, NEW)
    assert reload(served) == "loaded"
    assert labels_of(served) == set(NEW)
    assert (count(served, "loaded"), count(served, "unchanged")) == (1, 1)
    (model,) = served.get("/info").json()["models"]
    infos = [x for x in served.get("/metrics").text.splitlines() if x.startswith("dsformer_model_info{")]
    assert len(infos) == 1
    assert model["sha256"][:12] in infos[0]
    gc.collect()
    assert old() is None  # and with it its session and its memory


def test_a_variant_may_come_and_go(served: TestClient, folder: Path, write_folder: Write) -> None:
    write_folder(folder.parent / "other", "classify", "dense", OLD)
    assert reload(served) == "loaded"
    assert served.post("/variants/dense/classify", json={"inputs": "good"}).status_code == 200
    assert 'dsformer_model_ready{task="classify",variant="dense"} 1.0' in served.get("/metrics").text
    shutil.rmtree(folder.parent / "other")
    assert reload(served) == "loaded"
    assert served.post("/variants/dense/classify", json={"inputs": "good"}).status_code == 404
    assert 'dsformer_model_ready{task="classify",variant="dense"}' not in served.get("/metrics").text


def test_comparisons_have_the_new_models(served: TestClient, folder: Path, write_folder: Write) -> None:
    def compared() -> list[tuple[str, set[str]]]:
        answer = served.post("/compare", json={"task": "classify", "inputs": "good", "parameters": {"repeats": 1}})
        assert answer.status_code == 200, answer.text
        return [(each["variant"], {a["label"] for a in each["answer"]}) for each in answer.json()["variants"]]

    assert compared() == [("dsformer", set(OLD))]
    old = weakref.ref(next(iter(served.app.state.service.models)))
    write_folder(folder.parent / "other", "classify", "dense", NEW)
    replace(folder, write_folder, NEW)
    assert reload(served) == "loaded"
    agreed = 'dsformer_compare_answers_total{result="agree",task="classify",variant="dsformer"}'
    assert f"{agreed} 0.0" in served.get("/metrics").text
    assert compared() == [("dense", set(NEW)), ("dsformer", set(NEW))]
    assert agreed in served.get("/metrics").text
    gc.collect()
    assert old() is None


def test_a_comparison_keeps_its_models_to_its_end(
    served: TestClient, folder: Path, write_folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, admission = OnnxModel.run, served.app.state.service.admission
    tickets: list[Ticket] = []
    begun = threading.Event()

    def run(self: OnnxModel, rows: Any) -> Any:
        if not tickets:
            tickets.append(Ticket(admission, 1))  # the comparison waits from here on
            begun.set()
        return real(self, rows)

    monkeypatch.setattr(OnnxModel, "run", run)
    with ThreadPoolExecutor(1) as pool:
        comparing = pool.submit(served.post, "/compare", json={"task": "classify", "inputs": "good"})
        assert begun.wait(20)
        replace(folder, write_folder, NEW)
        assert reload(served) == "loaded"
        assert labels_of(served) == set(NEW)
        assert not comparing.done()
        served.portal.call(tickets[0].leave)
        answer = comparing.result()
    assert answer.status_code == 200, answer.text
    assert {each["label"] for each in answer.json()["variants"][0]["answer"]} == set(OLD)


@pytest.mark.parametrize("harm", ["cut", "missing", "twin", "logits"])
def test_a_broken_folder_leaves_the_old_model(
    served: TestClient, folder: Path, write_folder: Write, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    replace(folder, write_folder, NEW)
    if harm == "cut":
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    elif harm == "missing":
        (folder / "tokenizer.json").unlink()
    elif harm == "twin":
        write_folder(folder.parent / "twin", "classify", "dsformer", OLD)
    else:
        stored = json.loads((folder / "golden.json").read_text())
        stored["rows"][0]["logits"][0] += 3 * stored["tolerance"]
        (folder / "golden.json").write_text(json.dumps(stored))
    result = "self_test_failed" if harm == "logits" else "folder_refused"
    assert reload(served) == result
    assert labels_of(served) == set(OLD)
    assert count(served, result) == 1
    last = served.get("/info").json()["last_reload"]
    assert last["result"] == result
    assert "mine" in last["sentence"]
    (record,) = [r for r in caplog.records if r.message == "reload"]
    assert (record.levelname, record.why) == ("ERROR", last["sentence"])
    assert served.get("/readyz").status_code == 200


def test_a_changed_folder_is_noticed(folder: Path, write_folder: Write, make_client: Callable[..., TestClient]) -> None:
    before = fingerprint(folder.parent)
    assert before == fingerprint(folder.parent) != ()
    with make_client(folder.parent, reload_seconds=0.05) as client:
        replace(folder, write_folder, NEW)
        assert fingerprint(folder.parent) != before
        deadline = time.monotonic() + 20
        while labels_of(client) != set(NEW):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_no_request_is_lost_while_models_change(served: TestClient, folder: Path, write_folder: Write) -> None:
    stop = threading.Event()
    seen: list[tuple[int, Any]] = []

    def press() -> None:
        while not stop.is_set():
            answer = served.post("/classify", json={"inputs": ["the film is good"] * 3})
            seen.append((answer.status_code, answer.json()))

    threads = [threading.Thread(target=press) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for labels in (NEW, OLD, NEW):
            replace(folder, write_folder, labels)
            assert reload(served) == "loaded"
            assert labels_of(served) == set(labels)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert {status for status, _ in seen} == {200}
    kinds = {tuple(sorted(each["label"] for each in one)) for _, answer in seen for one in answer}
    assert kinds == {tuple(sorted(OLD)), tuple(sorted(NEW))}
    # All texts of a request by the same model.
    assert all(len({len(one) for one in answer}) == 1 for _, answer in seen)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_sighup_reloads_the_process(folder: Path, write_folder: Write) -> None:
    with Served(folder.parent, reload_seconds=0) as service:
        replace(folder, write_folder, NEW)
        os.kill(service.process.pid, signal.SIGHUP)
        deadline = time.monotonic() + 20
        while service.metric("dsformer_reloads_total", result="loaded") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = asyncio.run(ask(service.port, "/classify", {"inputs": "good"}))
        assert {each["label"] for each in answer.body[0]} == set(NEW)
