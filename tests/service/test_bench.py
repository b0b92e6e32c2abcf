"""The benchmark times what the service runs; its arithmetic and its words are tested, never the times."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import kernels
from service import alone, artifact, bench, peers
from service.errors import StartError
from service.model import OnnxModel
from service.settings import read_options


def test_each_folder_is_timed_at_each_shape(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(models / f"tiny-classify-{variant}") for variant in ("dense", "dsformer")]
    report = tmp_path / "report.json"
    options = ["--shapes", "1x9,3x17", "--rounds", "4", "--warm-up", "1", "--threads", "1", "--json", str(report)]
    plot = tmp_path / "plot.svg"
    bench.main([*folders, *options, "--loads", "1", "--plot", str(plot)])
    told = json.loads(report.read_text())
    dense, compressed = told["folders"]
    assert dense["difference"] is None
    assert 0 < compressed["difference"] < bench.LARGEST_DIFFERENCE or kernels.isa().name == "scalar"
    for one in told["folders"]:
        assert 0 < one["load_seconds"] < 60
        assert 20 < one["peak_megabytes"] < 4000  # a Python with NumPy and ONNX Runtime in it
    assert "<svg" in plot.read_text()
    rows = told["measurements"]
    names = ["tiny-classify-dense", "tiny-classify-dsformer"]
    wanted = [(name, *shape) for shape in ((1, 9), (3, 17)) for name in names]
    assert [(row["name"], row["batch"], row["tokens"]) for row in rows] == wanted
    for row in rows:
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
        assert row["speedup_quartiles"][0] <= row["speedup"] <= row["speedup_quartiles"][1]
    assert [row["speedup"] for row in rows if row["name"] == names[0]] == [1.0, 1.0]
    assert told["machine"]["threads"] == 1
    assert {"cpu", "isa", "onnxruntime", "load_before"} <= told["machine"].keys()
    printed = capsys.readouterr().out
    assert printed.count("| 1x9 |") == 2
    assert "tiny-classify-dsformer" in printed


def test_answers_that_are_not_the_scalar_tiers_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models / "tiny-classify-dsformer"
    model = OnnxModel(artifact.read(folder), 1)
    outputs = {None: [1.0, 2.0], "scalar": [1.0, 2.5]}

    def start(folder: Path, threads: int, batch: int, tokens: int, isa: str | None = None) -> alone.Alone:
        return alone.Alone(0.1, 100.0, outputs[isa])

    monkeypatch.setattr(bench.alone, "start", start)
    with pytest.raises(StartError, match=r"differ from the scalar tier's by 0\.2 of the largest"):
        bench.footprints([model], ["tiny"], 1, (1, 9), 1)


def test_the_memory_of_who_asks_is_not_counted(models: Path) -> None:
    folder = models / "tiny-classify-dense"
    before = alone.start(folder, 1, 1, 9).peak_megabytes
    held = np.ones(500_000_000 // 8)
    assert alone.start(folder, 1, 1, 9).peak_megabytes < before + 100
    assert held.nbytes == 500_000_000


def test_a_folder_that_cannot_be_run_alone_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"could not be run alone: .*nowhere"):
        alone.start(tmp_path / "nowhere", 1, 1, 9)


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.main(["nowhere", "--plot", "plot.svg"])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_contenders_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each run takes as long as told: machine noise that doubles a round leaves the ratio alone."""
    now, runs = 0.0, []

    def slow(name: str, seconds: float) -> bench.Contender:
        def run(rows: object) -> None:
            nonlocal now
            noise = 1 + len(runs) // 4  # grows from round to round
            runs.append(name)
            now += seconds * noise

        return bench.Contender(name, "dense", None, run)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    first, second = bench.measure([slow("a", 3.0), slow("b", 2.0)], [(1, 8)], vocabulary=9, rounds=4, warm_up=0)
    assert "".join(runs) == "aabbbbaa" * 2
    assert first.milliseconds == 3000 * 2.5
    assert second.speedup == pytest.approx(1.5)
    assert second.speedup_quartiles == pytest.approx((1.5, 1.5))


def test_two_folders_of_one_name_are_told_apart(models: Path, tmp_path: Path) -> None:
    source = models / "tiny-qa-dense"
    for parent in ("a", "b"):
        shutil.copytree(source, tmp_path / parent / "model")
    both = [OnnxModel(artifact.read(tmp_path / parent / "model"), 1) for parent in ("a", "b")]
    assert [one.name for one in bench.of_folders(both)] == [str(tmp_path / p / "model") for p in ("a", "b")]


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_a_peer_answers_as_the_dense_model_does(name: str, models: Path, tmp_path: Path) -> None:
    missing = peers.missing_packages(name)
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    model = OnnxModel(artifact.read(models / "tiny-classify-dense"), 1)
    rows = bench.random_rows(3, 20, 1 + model.tokenizer.max_id)
    peer = peers.make(name, model, 1, [rows], tmp_path)
    if name.startswith("torch-"):  # a process of its own, with other weights: that it runs is all there is to see
        peer.run(model.feed(rows))
        peer.run(model.feed(rows[:2]))
        return
    (found,), (wanted,) = peer.run(model.feed(rows)), model.run(rows)
    assert np.abs(found - wanted).max() < (1e-4 if name == "openvino-f32" else 0.1) * max(1, np.abs(wanted).max())


def test_deepsparse_runs_in_the_interpreter_that_has_it(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(models / "tiny-classify-dense")
    with pytest.raises(SystemExit):
        bench.main([dense, "--deepsparse", str(tmp_path / "nowhere"), "--loads", "0", "--shapes", "1x9"])
    assert "expects a Python interpreter with DeepSparse in it" in capsys.readouterr().err
    python = os.environ.get("DEEPSPARSE_PYTHON")
    if not python:
        pytest.skip("DEEPSPARSE_PYTHON names no interpreter with DeepSparse")
    bench.main([dense, "--deepsparse", python, "--loads", "0", "--shapes", "1x9,2x8", "--rounds", "2"])
    printed = capsys.readouterr().out
    assert "| 1x9 | deepsparse |" in printed
    assert "| 2x8 | deepsparse |" in printed


def test_a_program_that_ends_is_a_sentence(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "tiny-classify-dense", tmp_path / "folder")
    model = OnnxModel(artifact.read(folder), 1)
    (folder / "config.json").write_text("{}")
    with pytest.raises(StartError, match=r"The peer torch-f32 cannot run .*it ended with status 1: \w+"):
        peers.make("torch-f32", model, 1, [], tmp_path)


def test_installed_peers_are_timed_too(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not peers.choose("installed"):
        pytest.skip("no peer is installed")
    folders = [str(models / f"tiny-qa-{variant}") for variant in ("dense", "dsformer")]
    bench.main([*folders, "--peers", "installed", "--shapes", "1x9", "--rounds", "1", "--warm-up", "0", "--loads", "0"])
    printed = capsys.readouterr().out
    assert all(f"| 1x9 | {name} |" in printed for name in peers.choose("installed"))


def test_peers_need_a_dense_folder_and_their_packages(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main([str(models / "tiny-qa-dsformer"), "--peers", "ort-int8", "--shapes", "1x9"])
    assert "none of the folders holds one" in capsys.readouterr().err
    monkeypatch.setitem(peers.PACKAGES, "ort-int8", ("no_such_package",))
    assert "ort-int8" not in peers.choose("installed")
    with pytest.raises(SystemExit):
        bench.main([str(models / "tiny-qa-dense"), "--peers", "ort-int8", "--shapes", "1x9"])
    assert "The peer ort-int8 needs no_such_package: pip install no_such_package." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 1, "There is nothing to time"),
        (["--shapes", "12"], 2, "expected batch x tokens such as 1x32,8x128"),
        (["--shapes", "0x8"], 2, "expected batch x tokens"),
        (["--rounds", "0"], 2, "--rounds"),
        (["nowhere"], 1, "nowhere"),
        (["--unknown"], 2, "unknown"),
        (["--peers", "pytorch"], 2, "but one of them is 'pytorch'"),
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
    options = read_options(bench.Options, ["--warm-up", "5"])
    assert (options.rounds, options.warm_up, options.json_file) == (20, 5, None)


def test_a_wrong_option_is_named_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--warm-up", "-1"])
    assert capsys.readouterr().err.startswith("--warm-up: ")
