"""POST /compare: the same input through every variant, behind all other requests and outside their metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from harness import Served, encode
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse

from service import lane
from service.admission import Admission, Ticket
from service.compare import Found, bootstrap, choice_of, differences, speed_up_of
from service.model import OnnxModel

QA = {"question": "Where does Clara live?", "context": "Clara lives in Berkeley. " * 30}
CLASSIFY = {"task": "classify", "inputs": "the film is good"}
KEY = "a-key-of-sixteen-letters"


def scrape(client: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = parse(client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> Iterator[list[str]]:
    """Variants in the order in which they run."""
    real, ran = OnnxModel.run, []

    def run(self: OnnxModel, rows: Any) -> Any:
        time.sleep(seconds)
        ran.append(self.artifact.variant)
        return real(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(OnnxModel, "run", run)
        yield ran


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("classify", "the film is good"),
        ("classify", {"text": "the film", "text_pair": "is bad"}),
        ("qa", QA),
    ],
)
def test_every_variant_gives_the_answer_of_its_own_route(client: TestClient, task: str, inputs: object) -> None:
    response = client.post("/compare", json={"task": task, "inputs": inputs, "parameters": {"repeats": 6}})
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["task"], body["baseline"], body["repeats"], body["agreement"]) == (task, "dense", 6, True)
    assert [each["variant"] for each in body["variants"]] == ["dense", "dsformer"]
    for each in body["variants"]:
        alone = client.post(f"/variants/{each['variant']}/{task}", json={"inputs": inputs})
        expected = alone.json()[0] if task == "classify" else alone.json()
        answer = each["answer"]
        if task == "classify":
            assert [a["label"] for a in answer] == [a["label"] for a in expected]
            assert [a["score"] for a in answer] == pytest.approx([a["score"] for a in expected], abs=1e-5)
        else:
            assert {k: v for k, v in answer.items() if k != "score"} == {
                k: v for k, v in expected.items() if k != "score"
            }
        assert each["tokens"] == int(alone.headers["x-compute-tokens"])
        assert each["windows"] > 1 if task == "qa" else each["windows"] == 1
        assert set(each["stage_seconds"]) == {"tokenize", "queue", "infer", "postprocess"}
        assert len(each["work_seconds"]) == 6
        assert min(each["work_seconds"]) > 0
        assert each["file_bytes"] > 10_000
    dense, dsformer = body["variants"]
    assert dense["speed_up"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert dense["score_difference"] == 0
    assert dsformer["score_difference"] < 1e-3
    ratios = np.array(dense["work_seconds"]) / np.array(dsformer["work_seconds"])
    found = dsformer["speed_up"]
    assert found["median"] == pytest.approx(np.median(ratios))
    assert ratios.min() <= found["low"] <= found["median"] <= found["high"] <= ratios.max()


def test_the_variants_take_turns(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with noted(monkeypatch) as ran:
        client.post("/compare", json={**CLASSIFY, "parameters": {"repeats": 4}})
    a, b = "dense", "dsformer"
    assert ran == [b, a] + [a, b, b, a] * 2


def test_it_leaves_the_metrics_of_requests_alone(client: TestClient) -> None:
    engine = client.app.state.service.engine
    client.post("/classify", json={"inputs": "good"})
    before, speed = scrape(client), engine.tokens_per_second
    assert client.post("/compare", json={**CLASSIFY, "parameters": {"repeats": 2}}).status_code == 200
    assert client.post("/compare", json={"task": "classify"}).status_code == 422
    assert client.post("/compare", json={}).status_code == 422
    after = scrape(client)
    changed = {key for key in after if after[key] != before.get(key)}
    names = {name for name, _ in changed if not name.startswith(("process_", "python_"))}
    assert {name for name in names if not name.startswith("dsformer_compare_")} == {"dsformer_http_responses_total"}
    assert engine.tokens_per_second == speed

    def added(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before[key]

    assert added("dsformer_compare_requests_total", task="classify", outcome="ok") == 1
    assert added("dsformer_compare_requests_total", task="none", outcome="invalid") == 2
    which = {"task": "classify", "variant": "dsformer"}
    assert added("dsformer_compare_answers_total", **which, result="agree") == 1
    assert added("dsformer_compare_speedup_ratio_count", **which) == 1
    assert added("dsformer_compare_score_difference_count", **which) == 1
    assert added("dsformer_compare_inflight") == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], 'expected an object with "task"'),
        ({"inputs": "a"}, 'expected an object with "task"'),
        ({"task": ["qa"], "inputs": "a"}, 'expected an object with "task"'),
        ({"task": "ner", "inputs": "a"}, 'expected an object with "task"'),
        ({"task": "classify"}, "inputs: this field is required"),
        ({"task": "classify", "inputs": ["a"]}, "inputs: expected a text"),
        ({"task": "classify", "inputs": " "}, "inputs: the text is empty"),
        ({"task": "classify", "inputs": "a " * 400}, "tokens and the model takes"),
        ({"task": "qa", "inputs": "a"}, "inputs: expected a JSON object"),
        ({"task": "qa", "inputs": {"question": "a"}}, "inputs.context: this field is required"),
        ({**CLASSIFY, "parameters": {"repeats": 0}}, "parameters.repeats"),
        ({**CLASSIFY, "parameters": {"repeats": 101}}, "parameters.repeats"),
        ({**CLASSIFY, "parameters": {"variant": "dense"}}, "parameters.variant"),
        ({**CLASSIFY, "repeats": 3}, "repeats: there is no such field"),
        ({**CLASSIFY, "inputs": "a" * 2**20 + "a"}, "characters; at most"),
    ],
)
def test_wrong_bodies(client: TestClient, body: object, words: str) -> None:
    response = client.post("/compare", json=body)
    assert response.status_code == 422, response.text
    assert words in response.json()["error"]
    assert "<" not in response.text


def test_it_waits_while_a_request_is_admitted(client: TestClient) -> None:
    began = time.perf_counter()
    with Ticket(client.app.state.service.admission, 1):
        late = client.post("/compare", json=CLASSIFY, headers={"x-request-timeout": "0.3"})
    assert time.perf_counter() - began >= 0.3
    assert (late.status_code, late.json()["error_type"]) == (504, "deadline")
    assert client.post("/compare", json=CLASSIFY).status_code == 200


def test_it_takes_a_small_share_of_the_time_while_there_is_traffic() -> None:
    admission = Admission(100, lambda: 1.0)

    async def come() -> None:
        while True:
            with await admission.enter(1):
                pass
            await asyncio.sleep(0.02)

    async def share(seconds: float, traffic: bool) -> float:
        """Of the time, that steps of 10 ms take."""
        tested, coming = lane.Lane(admission), asyncio.create_task(come())
        if not traffic:
            coming.cancel()
        began, busy = time.perf_counter(), 0.0
        while time.perf_counter() - began < seconds:
            async with tested.gap():
                entered = time.perf_counter()
                await asyncio.sleep(0.01)
                busy += time.perf_counter() - entered
        coming.cancel()
        return busy / (time.perf_counter() - began)

    assert asyncio.run(share(1.0, traffic=True)) < 2 * lane.TRAFFIC_SHARE
    assert asyncio.run(share(0.2, traffic=False)) > 0.5


def test_at_the_deadline_the_complete_rounds_are_the_answer(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noted(monkeypatch, seconds=0.05):
        response = client.post("/compare", json=CLASSIFY, headers={"x-request-timeout": "0.6"})
    body = response.json()
    assert response.status_code == 200
    assert 1 <= body["repeats"] < 20
    assert {len(each["work_seconds"]) for each in body["variants"]} == {body["repeats"]}


def test_few_rounds_have_no_interval(client: TestClient) -> None:
    body = client.post("/compare", json={**CLASSIFY, "parameters": {"repeats": 2}}).json()
    assert [each["speed_up"]["low"] for each in body["variants"]] == [None, None]


def test_a_full_lane(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(client.app.state.service.lane, "inside", lane.MAX_COMPARISONS)
        response = client.post("/compare", json=CLASSIFY)
        assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert client.post("/classify", json={"inputs": "good"}).status_code == 200


def test_the_service_ends_under_a_comparison(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    lifecycle = client.app.state.service.lifecycle
    real = OnnxModel.run
    with monkeypatch.context() as patched:
        patched.setattr(lifecycle, "closed", False)

        def run(self: OnnxModel, rows: Any) -> Any:
            patched.setattr(lifecycle, "closed", True)
            return real(self, rows)

        patched.setattr(OnnxModel, "run", run)
        response = client.post("/compare", json=CLASSIFY)
    assert (response.status_code, response.json()["error_type"]) == (503, "draining")


def test_keys(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models, api_key=KEY) as client:
        assert client.post("/compare", json=CLASSIFY).status_code == 401
        assert client.post("/compare", json=CLASSIFY, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_one_variant_and_none(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models / "tiny-qa-dsformer") as client:
        body = client.post("/compare", json={"task": "qa", "inputs": QA}).json()
        assert (body["baseline"], body["agreement"], len(body["variants"])) == ("dsformer", None, 1)
        assert client.post("/compare", json=CLASSIFY).status_code == 424


def test_disagreement(
    tmp_path: Path, write_folder: Callable[..., Path], make_client: Callable[..., TestClient]
) -> None:
    write_folder(tmp_path / "a", "classify", "dense", ("NEGATIVE", "POSITIVE"))
    write_folder(tmp_path / "b", "classify", "dsformer", ("POSITIVE", "NEGATIVE"))
    with make_client(tmp_path) as client:
        body = client.post("/compare", json=CLASSIFY).json()
        assert body["agreement"] is False
        assert [each["agrees"] for each in body["variants"]] == [True, False]
        labels = frozenset({("task", "classify"), ("variant", "dsformer"), ("result", "disagree")})
        assert scrape(client)["dsformer_compare_answers_total", labels] == 1


def test_a_client_that_leaves_is_counted_and_frees_its_place(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "slow")

    async def leave(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(encode("/compare", {**CLASSIFY, "parameters": {"repeats": 100}}))
        await asyncio.sleep(0.3)
        writer.close()

    with Served(models, module="faulty_service") as service:
        asyncio.run(leave(service.port))
        deadline = time.monotonic() + 5
        while not service.metric("dsformer_compare_requests_total", task="classify", outcome="cancelled"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert service.metric("dsformer_compare_inflight") == 0
        answer = httpx.post(
            f"http://127.0.0.1:{service.port}/compare",
            content=json.dumps({**CLASSIFY, "parameters": {"repeats": 1}}),
            headers={"content-type": "application/json"},
        )
        assert answer.json()["repeats"] == 1


# ---------------------------------------------------------------------------------------------------------- statistics


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=40))
def test_the_interval_holds_the_median(values: list[float]) -> None:
    low, high = bootstrap(np.array(values))
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        low, high = bootstrap(2.0 * rng.lognormal(0, 0.1, 20))
        covered += low <= 2.0 <= high
    # 95 % by name; the percentile bootstrap of a median of 20 is known to be a little off. 3 sigma of 300 is 4 %.
    assert 0.90 <= covered / 300 <= 0.99


def test_a_drift_of_the_machine_is_no_speed_up() -> None:
    drift = np.linspace(1, 3, 20)
    found = speed_up_of(2.0 * drift, 1.0 * drift)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("scores", "function", "choice"),
    [
        ({"a": 0.6, "b": 0.4}, "softmax", "a"),
        ({"a": 0.9, "b": 0.6, "c": 0.1}, "sigmoid", frozenset("ab")),
        ({"a": 0.2}, "sigmoid", frozenset()),
        ({"a": 3.7}, "none", None),
    ],
)
def test_what_is_compared(scores: dict[str, float], function: Any, choice: object) -> None:
    assert choice_of(scores, function) == choice


def test_differences() -> None:
    one, other = Found([], "a", {"a": 0.9, "b": 0.1}), Found([], "b", {"b": 0.6, "a": 0.4})
    assert differences(other, one) == (False, 0.5)
    assert differences(one, one) == (True, 0.0)
    assert differences(Found([], None, {"a": 3.0}), Found([], None, {"z": 1.0})) == (None, None)
