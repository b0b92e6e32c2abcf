"""The whole path of a user: their own labels in a file → one command → a folder → the service → an answer."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_folder, stored_factors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compressor  # noqa: F401 - Transformers knows compressed checkpoints by it

COMPRESS = [sys.executable, "-m", "compressor"]
# One thread: models this small are slower on two.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_reviews(path: Path) -> Path:
    """200 rows whose label the words decide."""
    random = np.random.default_rng(0)
    rows = ["text\tlabel"]
    for positive in random.integers(2, size=200).astype(bool):
        adjective = random.choice(["good", "great", "fine"] if positive else ["bad", "awful", "dull"])
        noun = random.choice(["film", "movie", "plot", "story", "actor"])
        rows.append(f"the {noun} was very {adjective} .\t{'happy' if positive else 'angry'}")
    path.write_text("\n".join(rows) + "\n")
    return path


def run_options(base: Path, reviews: Path, work: Path, output: Path) -> list[str]:
    options = {
        "model": base,
        "task": "classify",
        "train-file": reviews,
        "gamma": 0.4,
        "delta": 0.375,
        "iterations": 3,
        "epochs": 12,
        "learning-rate": 3e-3,
        "compress-epochs": 4,
        "compress-learning-rate": 1e-3,
        "batch-size": 16,
        "work": work,
        "dense-output": output / "reviews-dense",
        "output": output / "reviews-dsformer",
    }
    return [*COMPRESS, "run", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both model folders, made by ``dsformer-compress run`` that was killed once on the way."""
    root = tmp_path_factory.mktemp("user")
    base = save_folder(root / "base", "classify")
    command = run_options(base, write_reviews(root / "reviews.tsv"), root / "work", root / "models")
    killed = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((root / "work").glob("dense-*/training.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fine-tuning" not in done.stderr, "the finished stage was run again"
    return root / "models"


def test_card_holds_what_was_measured(models: Path) -> None:
    card = json.loads((models / "reviews-dsformer" / "card.json").read_text())
    assert card["dense"]["metrics"]["accuracy"] >= 95
    assert card["metrics"]["accuracy"] >= 90
    assert card["seed"] == 0
    assert card["compression"]["ratio_eq11"] > 1
    config = json.loads((models / "reviews-dsformer" / "config.json").read_text())
    assert config["id2label"] == {"0": "angry", "1": "happy"}
    assert config["dsformer"]["variant"] == "dsformer"
    assert config["dsformer"]["block_size"] == 8


def further(models: Path, **changes: str) -> list[str]:
    """The command that trains the compressed checkpoint on, with its dense one as the teacher."""
    work = models.parent / "work"
    stages = {stage: next(work.glob(f"{stage}-*/training.json")).parent for stage in ("dense", "compressed")}
    options = {
        "model": str(stages["compressed"]),
        "teacher": str(stages["dense"]),
        "task": "classify",
        "train-file": str(models.parent / "reviews.tsv"),
        "gamma": "0.4",
        "delta": "0.375",
        "steps": "5",
        "batch-size": "16",
        "output": str(models.parent / "further"),
        **changes,
    }
    return [*COMPRESS, "compress", *(part for name, value in options.items() if value for part in (f"--{name}", value))]


def test_a_compressed_checkpoint_is_trained_on(models: Path) -> None:
    done = subprocess.run(further(models), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "K-SVD" not in done.stderr
    record = json.loads((models.parent / "further" / "training.json").read_text())
    earlier = json.loads(next((models.parent / "work").glob("compressed-*/training.json")).read_text())
    assert record["extra"]["steps"] == earlier["extra"]["steps"] + 5
    assert record["minutes"] >= earlier["minutes"]
    assert record["metrics"]["accuracy"] >= 90
    assert record["compression"] == earlier["compression"]
    assert earlier["compression"]["ksvd"]["calibration_rows"] == 1024  # ds is data-aware if nothing else is said
    assert earlier["compression"]["ksvd"]["sequential"] is False  # as it is trained
    before = next((models.parent / "work").glob("compressed-*"))
    old, new = (stored_factors(path) for path in (before, models.parent / "further"))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    assert any(not np.array_equal(old[name], new[name]) for name in old if name.endswith("values"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": ""}, "cannot be its own teacher"),
        ({"gamma": "0.5"}, "but the preset wants"),
    ],
)
def test_what_cannot_be_trained_on_is_a_sentence(models: Path, changes: dict[str, str], sentence: str) -> None:
    done = subprocess.run(further(models, **changes), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    """The real service, in its own process, on a free port."""
    command = [sys.executable, "-m", "service", "--models", str(models), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        found = wait_for_address(process)
        wait_until_ready(found)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "http://127.0.0.1:" in line:
            port = line.split("http://127.0.0.1:")[1].split()[0].strip('",)')
            return f"http://127.0.0.1:{port}"
    raise AssertionError("the service did not come up:\n" + "".join(seen))


def wait_until_ready(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(address + "/readyz", timeout=10):
                return
        except urllib.error.HTTPError:  # still warming up
            assert time.monotonic() < deadline
            time.sleep(0.05)


def post(address: str, route: str, body: Any) -> Any:
    request = urllib.request.Request(address + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("variant", ["dense", "dsformer"])
def test_http_answer_equals_pytorch(models: Path, address: str, variant: str) -> None:
    texts = ["the film was very good .", "the plot was very awful .", "queen and king ."]
    stage = "dense" if variant == "dense" else "compressed"
    checkpoint = next((models.parent / "work").glob(f"{stage}-*/training.json")).parent
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(1)
    answers = post(address, f"/variants/{variant}/classify", {"inputs": texts})
    assert len(answers) == len(texts)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx({"angry": row[0], "happy": row[1]}, abs=5e-3)
    assert answers[0][0]["label"] == "happy"
    assert answers[1][0]["label"] == "angry"


def test_metrics_tell_the_variants_apart(address: str) -> None:
    for variant in ("dense", "dsformer"):
        post(address, "/classify", {"inputs": "a fine story .", "parameters": {"variant": variant}})
    with urllib.request.urlopen(address + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    for variant in ("dense", "dsformer"):
        start = f'dsformer_request_duration_seconds_count{{task="classify",variant="{variant}"}}'
        count = next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))
        assert count >= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--gamma": "0.1"}, "more atoms than the block size"),
        ({"--task": "sentiment"}, "Unknown task"),
        ({"--train-file": "missing.tsv"}, "missing.tsv"),
        ({"--model": "empty"}, "no model folder"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    base = save_folder(tmp_path / "base", "classify")
    (tmp_path / "empty").mkdir()
    command = run_options(base, write_reviews(tmp_path / "reviews.tsv"), tmp_path / "work", tmp_path / "models")
    for option, value in change.items():
        command[command.index(option) + 1] = value
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()


def test_row_without_its_label_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["good film", "happy"], ["bad film", ""]])
    base = save_folder(tmp_path / "base", "classify")
    command = run_options(base, path, tmp_path / "work", tmp_path / "models")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "reviews.csv" in done.stderr.replace("\n", "")
    assert "3" in done.stderr
