"""Two processes train as one does with the whole batch: the same bits in both of them, and one writes the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_in_processes
from launch import launch
from tiny import stored_factors

from compressor import processes
from compressor.processes import share_out

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, sentiment_tsv: Path) -> tuple[Path, str]:
    """The folder that two processes left behind, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(str(HERE / "train_in_processes.py"), str(sentiment_tsv), str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.parametrize("case", train_in_processes.CASES)
def test_two_processes_end_with_the_same_bits(two: tuple[Path, str], case: str) -> None:
    first, second = (torch.load(two[0] / f"{rank}-of-2.pt")[case] for rank in (0, 1))
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", [case for case in train_in_processes.CASES if case != "dropout"])
def test_they_do_what_one_does_with_the_whole_batch(
    two: tuple[Path, str], case: str, sentiment_tsv: Path, tmp_path: Path
) -> None:
    """Supports to the last, and weights to rounding: dropout is the only thing that is drawn by each on its own."""
    together: dict[str, Any] = torch.load(two[0] / "0-of-2.pt")[case]
    alone = train_in_processes.trained(case, sentiment_tsv, tmp_path)
    for name, tensor in alone.items():
        if name.endswith("indices"):
            assert torch.equal(tensor, together[name]), name
        else:
            torch.testing.assert_close(tensor, together[name], rtol=1e-3, atol=2e-4, msg=name)


def test_only_the_first_shows_progress_and_all_hear_of_its_failure(two: tuple[Path, str]) -> None:
    folder, said = two
    assert said.count("training stf: 12 of 12") == 1
    errors = [(folder / f"{rank}.error").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "missing" in errors[0]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux")
def test_no_thread_of_the_group_is_left_after_parting() -> None:
    """One that runs when the interpreter ends may abort the process, after all of its work is done."""
    done = launch(str(HERE / "part_in_processes.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python") >= 2
    assert "gloo" not in done.stdout


def test_compress_in_two_processes(tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path) -> None:
    """The command itself: factorized and measured once, one folder, one answer on standard output."""
    sizes = ["--gamma", "0.4", "--delta", "0.375", "--block-size", "8", "--iterations", "2"]
    data = ["--task", "classify", "--train-file", str(sentiment_tsv)]
    output = tmp_path / "small"
    stf = ["--steps", "6", "--omp-interval", "2", "--frozen-share", "0.5"]
    start = ["-m", "compressor", "compress", "--model", str(tiny_bert), "--output", str(output)]
    done = launch(*start, *data, *sizes, *stf)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    record = json.loads((output / "training.json").read_text())
    assert answer == {**record["metrics"], "agreement": record["extra"]["agreement"]}
    assert record["train"]["frozen_share"] == 0.5
    assert len(record["extra"]["support_flips"]) == 4
    assert done.stderr.count("K-SVD: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert len(stored_factors(output)) > 0


@pytest.mark.parametrize(
    ("costs", "count", "expected"),
    [
        ([3, 1, 2], 1, [0, 0, 0]),
        ([3, 1, 2], 2, [0, 1, 1]),
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([5, 4], 3, [0, 1]),
        ([], 2, []),
    ],
)
def test_work_is_shared_out_by_its_cost(
    costs: list[float], count: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    assert share_out(costs) == expected
