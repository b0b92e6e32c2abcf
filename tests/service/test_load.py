"""Quick versions of the tests in tests/load, on tiny models."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import blocking
import comparisons
import concurrency
import corruption
import departures
import endings
import fuzz
import overload
import pytest
import soak
from harness import ROOT, Served, ask
from uvicorn.main import STARTUP_FAILURE


def test_sigterm_under_load_loses_no_request(models: Path) -> None:
    endings.check(models / "tiny-classify-dsformer", 2)


def test_sigterm_in_a_long_batch_of_the_warm_up() -> None:
    """Inference is in native code then, and must not be torn down under its feet."""
    service = Served(ROOT / "deploy" / "models" / "sst2-dense", max_batch_tokens=65536).start(until="/livez")
    began = time.monotonic()
    while service.metric("process_cpu_seconds_total") < 3 and time.monotonic() - began < 30:
        time.sleep(0.1)
    assert service.get("/readyz")[0] == 503
    assert service.end() == 0, service.log


def test_a_port_in_use_is_seen_in_a_long_batch_of_the_warm_up() -> None:
    """The same, where the service ends because it cannot listen."""
    service = Served(ROOT / "deploy" / "models" / "sst2-dense", max_batch_tokens=65536)
    with socket.create_server(("127.0.0.1", service.port)), pytest.raises(AssertionError, match="already in use"):
        service.start(until="/livez")
    assert service.process.returncode == STARTUP_FAILURE


@pytest.mark.slow
def test_sigterm_under_load_twenty_times(models: Path) -> None:
    endings.check(models / "tiny-classify-dsformer", 20)


@pytest.mark.parametrize("fault", ["hangs", "ends"])
def test_a_process_whose_inference_hangs_or_ends_is_unready_and_then_gone(
    models: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULT_TOKENS", "77")
    folder = models / "tiny-classify-dense"
    service = Served(folder, module="faulty_service", stall_seconds=0.5, hang_seconds=3).start()
    try:
        began = time.monotonic()
        asking = threading.Thread(
            target=asyncio.run, args=(ask(service.port, "/classify", {"inputs": "film " * 75}),), daemon=True
        )
        asking.start()
        while service.get("/readyz")[0] == 200:
            assert time.monotonic() - began < 2
            time.sleep(0.02)
        assert service.process.wait(20) == 4
        asking.join(5)
    finally:
        service.process.kill()
        service.process.communicate()


def test_comparisons_beside_requests(models: Path) -> None:
    comparisons.check(models, 2, 0.5, 0.02)


def test_many_requests_at_once_get_their_own_answers(models: Path) -> None:
    concurrency.check(models, 300)


@pytest.mark.slow
def test_ten_thousand_requests_at_once_get_their_own_answers(models: Path) -> None:
    concurrency.check(models, 10_000)


@pytest.mark.parametrize("limit", [1, 8])
def test_overload_is_refused_politely(models: Path, limit: int) -> None:
    overload.check(models / "tiny-classify-dsformer", limit, clients=60, seconds=0.5, settle=0.5)


def test_who_comes_back_at_once_is_refused_as_well(models: Path) -> None:
    overload.check(models / "tiny-classify-dsformer", 1, clients=60, seconds=0.5, polite=False, settle=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 4, 8])
def test_five_hundred_clients_are_refused_politely(models: Path, limit: int) -> None:
    overload.check(models / "tiny-classify-dsformer", limit, clients=500, seconds=3, rounds=3)


def test_who_leaves_costs_nothing_more(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "slow")
    departures.check(models / "tiny-classify-dsformer", 50, module="faulty_service")


def test_a_damaged_folder_is_refused_or_harmless(models: Path) -> None:
    corruption.check(models / "tiny-qa-dsformer", 60)


@pytest.mark.slow
def test_five_hundred_damaged_folders(models: Path) -> None:
    corruption.check(models / "tiny-qa-dsformer", 500)


def test_broken_bytes_get_documented_answers(models: Path) -> None:
    fuzz.check_raw(models, 300, seed=1)


@pytest.mark.slow
def test_twenty_thousand_broken_requests(models: Path) -> None:
    fuzz.check_raw(models, 20_000)


@pytest.mark.slow
def test_schemathesis_finds_nothing(models: Path) -> None:
    pytest.importorskip("schemathesis")
    fuzz.check_schema(models, 100)


@pytest.mark.slow
def test_a_megabyte_of_text_blocks_nobody(models: Path) -> None:
    assert blocking.check(models, 5)[1] < 50


def test_random_lengths_for_a_while_give_no_error(models: Path) -> None:
    soak.check(models, 0.05)


@pytest.mark.slow
def test_memory_stays(models: Path) -> None:
    assert soak.check(models, 30) < 1
