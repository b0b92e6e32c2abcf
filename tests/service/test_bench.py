"""The benchmark times what the service runs; its arithmetic and its words are tested, never the times."""

import json
from pathlib import Path

import pytest

from service import artifact, bench
from service.model import OnnxModel


def test_each_folder_is_timed_at_each_shape(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(models / f"tiny-classify-{variant}") for variant in ("dense", "dsformer")]
    report = tmp_path / "report.json"
    options = ["--shapes", "1x9,3x17", "--rounds", "4", "--warm-up", "1", "--threads", "1", "--json", str(report)]
    bench.main([*folders, *options])
    told = json.loads(report.read_text())
    rows = told["measurements"]
    wanted = [(folder, *shape) for shape in ((1, 9), (3, 17)) for folder in folders]
    assert [(row["folder"], row["batch"], row["tokens"]) for row in rows] == wanted
    for row in rows:
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
        assert row["speedup_quartiles"][0] <= row["speedup"] <= row["speedup_quartiles"][1]
    assert [row["speedup"] for row in rows if row["folder"] == folders[0]] == [1.0, 1.0]
    assert told["machine"]["threads"] == 1
    assert {"cpu", "isa", "onnxruntime", "load_before"} <= told["machine"].keys()
    printed = capsys.readouterr().out
    assert printed.count("| 1x9 |") == 2
    assert "tiny-classify-dsformer" in printed


def test_folders_take_turns_and_ratios_are_of_one_round(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each run takes as long as told: machine noise that doubles a round leaves the ratio alone."""
    pair = [OnnxModel(artifact.read(models / f"tiny-classify-{name}"), 1) for name in ("dense", "dsformer")]
    now, runs = 0.0, []

    def slow(name: str, seconds: float):
        def run(rows: object) -> None:
            nonlocal now
            noise = 1 + len(runs) // 2  # grows from round to round
            runs.append(name)
            now += seconds * noise

        return run

    monkeypatch.setattr(pair[0], "run", slow("a", 3.0))
    monkeypatch.setattr(pair[1], "run", slow("b", 2.0))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    first, second = bench.measure(pair, [(1, 8)], rounds=4, warm_up=0)
    assert "".join(runs) == "abbaabba"
    assert first.milliseconds == 3000 * 2.5
    assert second.speedup == pytest.approx(1.5)
    assert second.speedup_quartiles == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 1, "There is nothing to time"),
        (["--shapes", "12"], 2, "expected batch x tokens such as 1x32,8x128"),
        (["--shapes", "0x8"], 2, "expected batch x tokens"),
        (["--rounds", "0"], 2, "--rounds"),
        (["nowhere"], 1, "nowhere"),
        (["--unknown"], 2, "unknown"),
        (["--synthetic", "no-such-shape"], 1, "unknown shape 'no-such-shape'"),
    ],
)
def test_what_cannot_be_timed_is_a_sentence(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == status
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_more_tokens_than_the_model_takes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([str(models / "tiny-qa-dense"), "--shapes", "1x129", "--rounds", "1"])
    assert "more tokens than the models take, which is 128" in capsys.readouterr().err


def test_options_are_flags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "THREADS", "JSON", "SHAPES"):
        monkeypatch.setenv(name, "0")
    options = bench.read_options(bench.Options, ["--warm-up", "5"])
    assert (options.rounds, options.warm_up, options.json_file) == (20, 5, None)


def test_a_wrong_option_is_named_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--warm-up", "-1"])
    assert capsys.readouterr().err.startswith("--warm-up: ")
