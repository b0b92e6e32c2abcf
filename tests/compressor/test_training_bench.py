"""The benchmark of training steps runs and averages right; its times are never tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

TESTS = Path(__file__).parents[1]
BENCH = TESTS / "bench" / "training.py"


def test_it_times_every_schedule(tmp_path: Path) -> None:
    model = tmp_path / "model"
    BertForSequenceClassification(make_config(hidden_size=48, num_attention_heads=12)).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    options = ["--rounds", "2", "--threads", "1", "--batch-size", "2", "--length", "8"]
    command = [sys.executable, str(BENCH), "--model", str(model), *options, "--json", str(tmp_path / "b.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    assert list(figures["steps"]) == [
        "plain fine-tuning",
        *(f"STF, OMP every {interval}" for interval in (1, 5, 8, 20, 50)),
        "FT-F-FT",
    ]
    for name, figure in {**figures["steps"], **figures["parts"]}.items():
        assert figure["ms"] > 0
        assert f"| {name} | " in done.stdout


def test_intervals_are_averages_of_the_two_kinds_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import training

    taken = {"plain": [1.0], "coded": [3.0], "kept": [2.0], "frozen": [1.5]}
    rows = training.steps_by_schedule(taken)
    assert rows["STF, OMP every 1"] == [3.0]
    assert rows["STF, OMP every 5"] == [pytest.approx((3 + 4 * 2) / 5)]
    assert rows["FT-F-FT"] == [1.5]
