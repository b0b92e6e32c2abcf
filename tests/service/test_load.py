"""Quick versions of the tests in tests/load, on tiny models."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import endings
import pytest
from harness import Served, ask


def test_sigterm_under_load_loses_no_request(models: Path) -> None:
    endings.check(models / "tiny-classify-dsformer", 2)


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
