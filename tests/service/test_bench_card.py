"""`dsformer-bench card`: what stands in it comes from the folders and from the measurements; never a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from service import bench_card, bench_main, plots
from service.bench import Footprint, Measurement
from service.bench_card import Card, Side


@pytest.fixture
def pair(models: Path, tmp_path: Path) -> list[str]:
    """A dense and a compressed folder with the compressor's cards in them."""
    cards = {
        "dense": {"task": "mine", "metrics": {"accuracy": 90.25}, "sizes": {"compression_ratio": 1.0}},
        "dsformer": {
            "task": "mine",
            "metrics": {"accuracy": 89.79},
            "sizes": {
                "compression_ratio": 2.845,
                "factorized_bytes": 5_391_360,
                "factorized_float32_bytes": 42_467_328,
            },
        },
    }
    folders = []
    for variant, card in cards.items():
        folder = Path(shutil.copytree(models / f"tiny-classify-{variant}", tmp_path / variant))
        (folder / "card.json").write_text(json.dumps(card))
        folders.append(str(folder))
    return folders


SMALL = ["--batches", "1,3", "--lengths", "9,17", "--rounds", "2", "--loads", "1", "--threads", "1"]


def test_a_card_of_two_folders(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "card"
    bench_main.main(["card", *pair, *SMALL, "--output", str(output)])
    told = json.loads((output / "card.json").read_text())
    text = (output / "card.md").read_text()
    assert capsys.readouterr().out == text
    assert (output / "card.png").read_bytes().startswith(b"\x89PNG")
    assert "| mine | dense | dsformer |" in text
    assert "| accuracy | 90.25 | 89.79 |" in text
    assert "| compression by eq. 11 | 1 | 2.85 |" in text
    assert "| factorized matrices, float32 against as stored | 42.5 MB | 5.4 MB |" in text
    assert told["compressed"]["file_bytes"] == (Path(pair[1]) / "model.onnx").stat().st_size
    assert told["dense"]["footprint"]["peak_megabytes"] > 20
    assert [(row["name"], row["batch"], row["tokens"]) for row in told["measurements"]] == [
        (name, batch, tokens) for batch in (1, 3) for tokens in (9, 17) for name in ("dense", "dsformer")
    ]
    assert sorted(shape for shapes in told["verdicts"].values() for shape in shapes) == ["1x17", "1x9", "3x17", "3x9"]
    assert told["machine"]["threads"] == 1


def test_folders_without_the_compressors_card_have_one_too(models: Path, tmp_path: Path) -> None:
    folders = [str(models / f"tiny-qa-{variant}") for variant in ("dense", "dsformer")]
    bench_main.main(["card", *folders, *SMALL, "--output", str(tmp_path)])
    text = (tmp_path / "card.md").read_text()
    assert "| qa | tiny-qa-dense | tiny-qa-dsformer |" in text
    assert "| factorized matrices, float32 against as stored |  |  |" in text


def made_up(speedups: dict[tuple[int, int], tuple[float, float, float]]) -> Card:
    """A card of these speed-ups (lower quartile, median, upper quartile); a run of the dense one takes 12 ms."""
    rows = []
    for (batch, tokens), (low, middle, high) in speedups.items():
        rows.append(Measurement("a", batch, tokens, 12.0, (12.0, 12.0), 1.0, (1.0, 1.0)))
        rows.append(Measurement("b", batch, tokens, 12 / middle, (12 / high, 12 / low), middle, (low, high)))
    side = Side("a", {"f1": 80.0}, 1.0, 40_000_000, 45_000_000, Footprint("a", 0.4, 200.0, None))
    other = replace(side, name="b", metrics={"f1": 79.0}, compression_ratio=2.8, footprint=Footprint("b", 0.3, 150, 0))
    facts = {"cpu": "x", "threads": 2, "isa": "avx2", "onnxruntime": "1"}
    return Card("squad", side, other, rows, facts)


def test_the_map_tells_where_compression_loses(tmp_path: Path) -> None:
    card = made_up({(1, 16): (0.7, 0.8, 0.9), (1, 64): (0.95, 1.02, 1.1), (8, 16): (1.5, 1.6, 1.7), (8, 64): (2, 3, 4)})
    assert card.verdicts == {"faster": ["8x16", "8x64"], "level": ["1x64"], "slower": ["1x16"]}
    text = bench_card.markdown(card)
    assert (
        "b is faster at 2 of 4 shapes; level at 1 (1x64) and slower at 1 (1x16). Its speed-up is 0.80 to 3.00." in text
    )
    assert "| 1 text | 0.80 (0.70 to 0.90) | 1.02 (0.95 to 1.10) |" in text
    assert "| 8 texts | 12.0 / 7.5 | 12.0 / 4.0 |" in text
    # 8 texts of 64 tokens in 12 ms, and in 4 ms.
    assert "| most tokens a second | 42,667 | 128,000 |" in text
    plots.card(card, tmp_path / "card.png")
    assert (tmp_path / "card.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["A"], 1, "A card is of two folders, the dense and the compressed one; got 1."),
        (["A", "Q"], 1, "one task, not of classify and qa"),
        (["A", "B", "--lengths", "9,4000"], 1, "--lengths has 4000 tokens, more than the models take, which is 128"),
        (["A", "B", "--batches", "1,x"], 2, "expected numbers from 1 to 4096 such as 1,4,16, got '1,x'"),
        ([], 2, "FOLDERS"),
    ],
)
def test_what_has_no_card_is_a_sentence(
    models: Path, tmp_path: Path, words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"A": "tiny-classify-dense", "B": "tiny-classify-dsformer", "Q": "tiny-qa-dense"}
    arguments = [str(models / names[word]) if word in names else word for word in words]
    with pytest.raises(SystemExit) as stopped:
        bench_main.main(["card", *arguments, "--output", str(tmp_path)])
    assert stopped.value.code == status
    assert said in capsys.readouterr().err
