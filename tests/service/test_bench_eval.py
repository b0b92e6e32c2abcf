"""`dsformer-bench eval`: the same accuracy as offline, what is asked again, what is kept, what is a sentence."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ROOT, Served

from compressor.data import complete_task, load_examples
from compressor.evaluate import evaluate_folder
from compressor.tasks import find_task
from service import bench_eval, bench_main
from service.bench_eval import Answer

WORDS = ("a", "the", "film", "is", "good", "bad", "clara", "lives", "in", "berkeley")


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with Served(models) as service:
        yield service


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """60 texts, some of them longer than the model takes."""
    draw = random.Random(3)
    lines = ["text\tlabel"]
    for _ in range(60):
        text = " ".join(draw.choices(WORDS, k=draw.choice((2, 9, 30, 150))))
        lines.append(f"{text}\t{draw.choice(('NEGATIVE', 'POSITIVE'))}")
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.tsv"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    draw = random.Random(4)
    asked = []
    for number in range(25):
        words = draw.choices(WORDS, k=40)
        context, first = " ".join(words), draw.randrange(38)
        start = len(" ".join(words[:first])) + (first > 0)
        answer = {"answer_start": start, "text": " ".join(words[first : first + 2])}
        question = {"id": str(number), "question": "who lives in berkeley ?", "answers": [answer]}
        asked.append({"context": context, "qas": [question]})
    (tmp_path / "questions.json").write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    return tmp_path / "questions.json"


def evaluate(service: Served, *arguments: object) -> None:
    bench_main.main(["eval", "--url", f"http://127.0.0.1:{service.port}", *map(str, arguments)])


def test_accuracy_is_that_of_offline(served: Served, models: Path, rows: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    evaluate(served, "--task", "classify", "--validation-file", rows, "--json", report)
    told = json.loads(report.read_text())
    task = complete_task(find_task("classify"), rows)
    examples = load_examples(task, "validation", validation_file=rows)
    for variant in ("dense", "dsformer"):
        offline = evaluate_folder(models / f"tiny-classify-{variant}", task, examples, threads=1)
        assert told["metrics"][variant] == pytest.approx(offline)
        assert 20 < offline["accuracy"] < 80  # or there was nothing to compare
    assert told["examples"] == 60
    assert told["agreement"] == {"dense": 100, "dsformer": 100}
    assert told["disagreements"] == []


@pytest.mark.parametrize("task_name", ["squad", "qa"])
def test_answers_are_scored_as_offline(
    served: Served, models: Path, questions: Path, tmp_path: Path, task_name: str
) -> None:
    """`squad` must answer, `qa` may say that there is no answer."""
    report = tmp_path / "report.json"
    evaluate(served, "--task", task_name, "--validation-file", questions, "--json", report)
    told = json.loads(report.read_text())
    task = find_task(task_name)
    examples = load_examples(task, "validation", validation_file=questions)
    for variant in ("dense", "dsformer"):
        offline = evaluate_folder(models / f"tiny-qa-{variant}", task, examples, threads=1)
        assert told["metrics"][variant] == pytest.approx(offline)


def test_regression(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models" / "score", "classify", "dense", ("score",), "regression")
    draw = random.Random(5)
    rows = [f"{' '.join(draw.choices(WORDS, k=9))}\t{draw.random() * 5:.2f}" for _ in range(20)]
    file = tmp_path / "rows.tsv"
    file.write_text("\n".join(["text\tlabel", *rows]) + "\n")
    with Served(folder) as service:
        evaluate(service, "--task", "classify", "--validation-file", file, "--json", tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    task = complete_task(find_task("classify"), file)
    offline = evaluate_folder(folder, task, load_examples(task, "validation", validation_file=file), threads=1)
    assert told["metrics"]["dense"] == pytest.approx(offline, abs=1e-4)


def test_disagreements_come_with_the_widest_gap_first(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "kind": "classify",
        "labels": ["NO", "YES"],
        "inputs": [{"text": text, "text_pair": None} for text in ("zero", "one", "two")],
        "wanted": ["NO", "YES", "NO"],
    }

    def says(label: str, score: float) -> Answer:
        other = {"NO": "YES", "YES": "NO"}[label]
        return Answer([(label, score), (other, 1 - score)], 1.0)

    answers = {
        ("dense", 0): says("NO", 0.6),
        ("nm", 0): says("YES", 0.7),
        ("dense", 1): says("YES", 0.9),
        ("nm", 1): says("YES", 0.6),
        ("dense", 2): says("NO", 0.95),
        ("nm", 2): says("YES", 0.9),
    }
    found = bench_eval.disagreements(["dense", "nm"], asked, answers, {"nm": [False, True, False]})
    assert [(one["example"], one["wanted"]) for one in found] == [(2, "NO"), (0, "NO")]
    assert [one["gap"] for one in found] == pytest.approx([0.85, 0.3])
    assert bench_eval.prediction(answers["nm", 2], asked) == pytest.approx([0.1, 0.9])
    metrics = {"dense": {"accuracy": 100.0}, "nm": {"accuracy": 50.0}}
    told = {"examples": 3, "metrics": metrics, "agreement": {"dense": 100.0, "nm": 100 / 3}, "disagreements": found}
    shown = bench_eval.table(told, ["dense", "nm"], "mine", 1)
    assert "| nm | 50.00 | 33.33 % |" in shown
    assert "2 disagreements" in shown
    assert "- 0.850: two: dense 'NO' (0.950), nm 'YES' (0.900), right is NO" in shown
    assert "zero" not in shown


def test_kept_answers_are_not_asked_again(
    served: Served, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "answers.jsonl"
    arguments = ("--task", "classify", "--validation-file", rows, "--answers", kept)
    evaluate(served, *arguments)
    first, lines = capsys.readouterr().out, kept.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 60
    kept.write_text("".join(lines[:51]) + lines[51][:20])  # as a kill leaves it
    before = served.metric("dsformer_requests_total", task="classify", outcome="ok")
    evaluate(served, *arguments)
    assert served.metric("dsformer_requests_total", task="classify", outcome="ok") - before == 120 - 50
    assert capsys.readouterr().out == first
    evaluate(served, *arguments)  # the line that was cut off has not made the file unreadable
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        evaluate(served, *arguments, "--rows", 5)
    assert "answers to other examples" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_answered(served: Served, tmp_path: Path) -> None:
    draw = random.Random(6)
    rows, kept = tmp_path / "rows.tsv", tmp_path / "answers.jsonl"
    lines = [f"{' '.join(draw.choices(WORDS, k=90))}\tPOSITIVE" for _ in range(20_000)]
    rows.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    command = [sys.executable, "-m", "service.bench_main", "eval", "--task", "classify", "--validation-file", str(rows)]
    command += ["--answers", str(kept), "--url", f"http://127.0.0.1:{served.port}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background of a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not (kept.exists() and kept.read_text().count("\n") > 5):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert f"answers are in {kept}; the same command goes on." in said
    assert "Traceback" not in said
    assert all(json.loads(line) for line in kept.read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "no-such-task"], "Unknown task 'no-such-task'"),
        (["--task", "sst2", "--data", "nowhere"], "needs nowhere/sst2/dev.tsv.gz, which does not exist"),
        (["--task", "mnli", "--validation-file", "ROWS"], "The served model's labels are NEGATIVE, POSITIVE, but mnli"),
        (["--task", "classify", "--validation-file", "BAD"], "the label 'MAYBE' is none of"),
        (["--task", "classify", "--validation-file", "ROWS", "--variants", "svd"], "no variant 'svd'"),
        (["--task", "classify", "--validation-file", "ROWS", "--url", "http://127.0.0.1:1"], "No DSFormer service"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    served: Served, rows: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_text("text\tlabel\ngood\tMAYBE\n")
    with pytest.raises(SystemExit) as stopped:
        evaluate(served, *({"ROWS": rows, "BAD": bad}.get(word, word) for word in arguments))
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err
