"""Factors kept for another run: the killed one that goes on, or the next of a study."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from compressor import pipeline
from compressor.config import MethodOptions, TrainConfig
from compressor.dense_sparse import DenseSparse
from compressor.methods import METHODS, Method

SIZES = {"ds": {"gamma": 0.4, "delta": 0.375, "block_size": 8, "iterations": 2, "data_aware": True}, "nm": {}}
CONFIG = TrainConfig(max_steps=4, batch_size=8, learning_rate=1e-3)


def method_of(name: str, **options: object) -> Method:
    known = SIZES.get(name, {"ratio": 2.0})
    return METHODS[name].from_options(MethodOptions(**{**known, **options}))


def compress(model: Path, rows: Path, output: Path, method: Method, **options: object) -> pipeline.Record:
    data = pipeline.Data("classify", train_file=rows)
    return pipeline.compress(str(model), data, method, CONFIG, output, **options)  # type: ignore[arg-type]


def parts(record: pipeline.Record) -> tuple[object, ...]:
    return record.metrics, record.compression, record.extra


@pytest.mark.parametrize("name", METHODS)
def test_runs_that_share_a_start_are_as_those_alone(
    name: str, tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, starts = method_of(name), tmp_path / "starts"
    alone = compress(tiny_bert, sentiment_tsv, tmp_path / "alone", method)
    first = compress(tiny_bert, sentiment_tsv, tmp_path / "first", method, starts=starts, schedule="ft-f")
    assert len(list(starts.iterdir())) == 1
    monkeypatch.setattr(METHODS[name], "factorize", None)  # from here on nothing can be factorized
    again = compress(tiny_bert, sentiment_tsv, tmp_path / "again", method, starts=starts)
    assert parts(again) == parts(alone)
    assert first.compression == alone.compression
    assert not list(tmp_path.glob("*.starts")), "a run that has ended leaves none of its own"


def test_a_killed_run_goes_on_from_its_factors(
    tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of("ds")
    whole = compress(tiny_bert, sentiment_tsv, tmp_path / "whole", method)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_bert, sentiment_tsv, tmp_path / "out", method)
    (start,) = (tmp_path / "out.starts").iterdir()
    monkeypatch.setattr(DenseSparse, "factorize", None)
    assert parts(compress(tiny_bert, sentiment_tsv, tmp_path / "out", method, resume=True)) == parts(whole)
    assert not start.exists()


def test_a_broken_file_is_made_anew(
    tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, starts = method_of("ds"), tmp_path / "starts"
    whole = compress(tiny_bert, sentiment_tsv, tmp_path / "whole", method, starts=starts)
    (start,) = starts.iterdir()
    sound = load_file(start)
    start.write_bytes(start.read_bytes()[:-100])
    assert parts(compress(tiny_bert, sentiment_tsv, tmp_path / "again", method, starts=starts)) == parts(whole)
    assert "is broken" in caplog.text
    for name, array in load_file(start).items():
        np.testing.assert_array_equal(array, sound[name], err_msg=name)


def test_what_decides_the_factors_names_them(tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    for i, options in enumerate([{}, {"seed": 1}, {"calibration_rows": 16}, {"data_aware": False}, {"iterations": 3}]):
        compress(tiny_bert, sentiment_tsv, tmp_path / str(i), method_of("ds", **options), starts=starts, measure=False)
    assert len(list(starts.iterdir())) == 5
    few = pipeline.Data("classify", train_file=sentiment_tsv, rows=40)
    pipeline.compress(str(tiny_bert), few, method_of("ds"), CONFIG, tmp_path / "few", starts=starts, measure=False)
    assert len(list(starts.iterdir())) == 6, "other rows"
