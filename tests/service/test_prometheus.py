"""/metrics: names, labels, buckets, zeros at the start, and what requests change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

TASKS = ("classify", "qa")
VARIANTS = ("dense", "dsformer")
STAGES = ("tokenize", "queue", "infer", "postprocess")
QA = {"question": "Where does Clara live?", "context": "Clara lives in Berkeley."}


@pytest.fixture
def fresh(models: Path, make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    with make_client(models) as client:
        yield client


class Scrape:
    """One reading of /metrics."""

    def __init__(self, client: TestClient) -> None:
        families = parse(client.get("/metrics").text)
        self._values = {(s.name, frozenset(s.labels.items())): float(s.value) for f in families for s in f.samples}

    def __call__(self, name: str, **labels: str) -> float:
        return self._values[name, frozenset(labels.items())]


def test_everything_exists_at_zero_before_the_first_request(fresh: TestClient) -> None:
    sample = Scrape(fresh)
    for task in TASKS:
        for variant in VARIANTS:
            which = {"task": task, "variant": variant}
            for outcome in ("ok", "invalid", "overloaded", "deadline", "cancelled", "not_ready", "error"):
                assert sample("dsformer_requests_total", outcome=outcome, **which) == 0
            assert sample("dsformer_request_duration_seconds_count", **which) == 0
            for stage in STAGES:
                assert sample("dsformer_stage_duration_seconds_count", stage=stage, **which) == 0
            assert sample("dsformer_model_ready", **which) == 1
            assert 0 <= sample("dsformer_selftest_max_abs_error", **which) < 1e-3
            assert sample("dsformer_queue_items", **which) == sample("dsformer_queue_tokens", **which) == 0
            for kind in ("real", "padding"):
                assert sample("dsformer_tokens_total", kind=kind, **which) >= 0
            assert sample("dsformer_model_file_bytes", **which) > 10_000
            assert sample("dsformer_model_load_seconds", **which) > 0
        assert sample("dsformer_input_tokens_count", task=task) == 0
        assert sample("dsformer_truncated_inputs_total", task=task) == 0
    assert sample("dsformer_qa_windows_count", task="qa") == 0
    assert sample("process_resident_memory_bytes") > 1e6
    labels = {"route": "/classify", "method": "POST", "code": "413"}
    assert sample("dsformer_http_responses_total", **labels) == 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_request_is_counted_once_where_it_belongs(fresh: TestClient, task: str, variant: str) -> None:
    inputs = "the film is good" if task == "classify" else QA
    response = fresh.post(f"/variants/{variant}/{task}", json={"inputs": inputs})
    assert response.status_code == 200
    sample = Scrape(fresh)
    for t in TASKS:
        for v in VARIANTS:
            expected = float((t, v) == (task, variant))
            which = {"task": t, "variant": v}
            assert sample("dsformer_requests_total", outcome="ok", **which) == expected
            assert sample("dsformer_request_duration_seconds_count", **which) == expected
            for stage in STAGES:
                assert sample("dsformer_stage_duration_seconds_count", stage=stage, **which) == expected
    which = {"task": task, "variant": variant}
    stages = sum(sample("dsformer_stage_duration_seconds_sum", stage=s, **which) for s in STAGES)
    assert 0 < stages <= sample("dsformer_request_duration_seconds_sum", **which)
    tokens = int(response.headers["x-compute-tokens"])
    assert sample("dsformer_input_tokens_sum", task=task) == tokens
    route = {"route": f"/variants/{{variant}}/{task}", "method": "POST", "code": "200"}
    assert sample("dsformer_http_responses_total", **route) == 1


def test_refused_requests(fresh: TestClient) -> None:
    fresh.post("/classify", json={"inputs": ""})
    fresh.post("/classify", json={"inputs": "a " * 400})
    fresh.post("/variants/int4/classify", json={"inputs": "a"})
    fresh.post("/classify", content=b"{}")
    count = {"task": "classify", "outcome": "invalid"}
    sample = Scrape(fresh)
    assert sample("dsformer_requests_total", variant="none", **count) == 3
    assert sample("dsformer_requests_total", variant="dsformer", **count) == 1
    assert sample("dsformer_request_duration_seconds_count", task="classify", variant="dsformer") == 0
    for code, times in (("422", 2), ("415", 1)):
        labels = {"route": "/classify", "method": "POST", "code": code}
        assert sample("dsformer_http_responses_total", **labels) == times


def test_made_up_paths_and_verbs_add_no_labels(fresh: TestClient) -> None:
    for i in range(5):
        fresh.get(f"/made/up/{i}")
        fresh.request(f"VERB{i}", "/livez")
        fresh.post(f"/variants/v{i}/qa", json={"inputs": QA})
    text = fresh.get("/metrics").text
    assert "made" not in text
    assert "VERB" not in text
    assert "v1" not in {s.labels.get("variant") for f in parse(text) for s in f.samples}
    sample = Scrape(fresh)
    assert sample("dsformer_http_responses_total", route="unmatched", method="GET", code="404") == 5


def test_truncation_is_counted(fresh: TestClient) -> None:
    body = {"inputs": ["a " * 400, "a", "a " * 300], "parameters": {"truncation": "left"}}
    fresh.post("/classify", json=body)
    sample = Scrape(fresh)
    assert sample("dsformer_truncated_inputs_total", task="classify") == 2


def test_buckets_show_ratios(fresh: TestClient) -> None:
    (family,) = [f for f in parse(fresh.get("/metrics").text) if f.name == "dsformer_request_duration_seconds"]
    edges = [
        float(s.labels["le"])
        for s in family.samples
        if s.name.endswith("_bucket") and (s.labels["task"], s.labels["variant"]) == ("qa", "dense")
    ][:-1]
    assert edges[0] == pytest.approx(0.0005)
    assert edges[-1] >= 8
    assert all(b / a == pytest.approx(2**0.25, rel=1e-6) for a, b in itertools.pairwise(edges))


def test_both_formats(fresh: TestClient) -> None:
    plain = fresh.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert not [f.name for f in parse(plain.text) if f.name.endswith("_created")]
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    openmetrics = fresh.get("/metrics", headers=accept)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert {f.name for f in parse_openmetrics(openmetrics.text)} >= {"dsformer_requests", "dsformer_model_ready"}


def test_model_info(fresh: TestClient) -> None:
    (family,) = [f for f in parse(fresh.get("/metrics").text) if f.name == "dsformer_model_info"]
    (labels,) = [s.labels for s in family.samples if (s.labels["task"], s.labels["variant"]) == ("qa", "dsformer")]
    assert (labels["preset"], labels["folder"], labels["threads"]) == ("2.8x", "tiny-qa-dsformer", "1")
    assert labels["isa"] == fresh.get("/info").json()["runtime"]["isa"]
