"""The layer benchmark runs and counts right; its times are never tested."""

import os
import subprocess
import sys
from pathlib import Path

from cases import Case

TESTS = Path(__file__).parents[1]


def test_it_times_every_contender() -> None:
    command = [sys.executable, str(TESTS / "bench" / "layers.py")]
    command += ["--tokens", "9", "--threads", "1", "--seconds", "0.01", "--match", "minilm-output"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [line.split("|") for line in done.stdout.splitlines() if "minilm-output" in line]
    assert [row[3].strip() for row in rows] == ["dense", "float32", "int16", "int8"]
    assert all(float(row[4]) > 0 and float(row[6]) > 0 for row in rows)


def test_operations_are_counted_as_the_paper_does(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS / "bench"))
    import layers

    case = Case("", n_blocks=12, width=64, n_atoms=96, rows=768, n_nonzero=8)
    real, dense = layers.operations(case, 10)
    assert dense == 2 * 10 * 768 * 768
    assert dense / real == 4  # γ = δ = 1/8
