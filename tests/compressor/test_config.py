"""Presets reproduce the paper's ratios; settings that do not fit are refused in a sentence."""

from dataclasses import asdict
from typing import Any

import pytest

from compressor.__main__ import _method
from compressor.config import CompressionConfig, ConfigError, MethodOptions, TrainConfig, compression_ratio

# A command's options, when none of these is given.
NOT_SAID = {
    **asdict(MethodOptions(preset="2.8x")),
    **dict.fromkeys(("data_aware", "sequential", "weigh_outputs", "calibration_rows")),
}
NOT_SAID["schedule"] = None

BERT_BASE = (("qkv", 2304, 768), ("attention_output", 768, 768), ("ffn1", 3072, 768), ("ffn2", 768, 3072))


@pytest.mark.parametrize(
    ("preset", "ratio", "atoms", "nonzeros"),
    [
        ("2x", 2.000, [320, 128, 416, 128], 18),
        ("2.8x", 2.799, [288, 96, 384, 96], 12),
        ("3.57x", 3.573, [288, 96, 384, 96], 8),
    ],
)
def test_presets_give_the_papers_ratios(preset: str, ratio: float, atoms: list[int], nonzeros: int) -> None:
    config = CompressionConfig(preset, block_size=64)
    plans = [config.plan(role, role, m, n) for role, m, n in BERT_BASE]
    assert [plan.n_atoms for plan in plans] == atoms
    assert {plan.n_nonzero for plan in plans} == {nonzeros}
    assert compression_ratio(plans) == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize(
    ("config", "shape", "sentence"),
    [
        (CompressionConfig(block_size=64), (384, 384), "more atoms than the block size 64"),
        (CompressionConfig(block_size=48), (768, 800), "not divisible by the block size 48"),
        (CompressionConfig(gamma=0.25, delta=0.01, block_size=32), (384, 384), "no nonzero in a block"),
        (CompressionConfig(gamma=0.1, delta=1.0, block_size=32), (380, 320), None),
    ],
)
def test_settings_that_do_not_fit_a_layer(
    config: CompressionConfig, shape: tuple[int, int], sentence: str | None
) -> None:
    if sentence is None:
        assert config.plan("layer", "qkv", *shape).n_nonzero == 32
        return
    with pytest.raises(ConfigError, match=sentence):
        config.plan("layer", "qkv", *shape)


@pytest.mark.parametrize("changes", [{"preset": "9x"}, {"gamma": 0.0}, {"delta": 1.5}, {"block_size": -1}])
def test_impossible_compression(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CompressionConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"dropout": 1.0},
        {"distill_weight": 2.0},
        {"omp_interval": 0},
        {"pull": -1.0},
        {"pull": float("nan")},
        {"closed_form_share": 1.5},
        {"support_hysteresis": 1.0},
        {"frozen_share": -0.1},
        {"dictionary_max_grad_norm": 0.0},
        {"attention_weight": float("inf")},
    ],
)
def test_impossible_training(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ({"method": "ds", "task": "sst2"}, 1024),
        ({"method": "drone", "task": "classify"}, 1024),
        ({"method": "ds", "task": "squad"}, 256),
        ({"method": "ds", "task": "sst2", "calibration_rows": 7}, 7),
    ],
)
def test_more_short_texts_are_looked_at_than_windows(asked: dict[str, Any], rows: int) -> None:
    method = _method({**NOT_SAID, **asked})
    assert (method.ksvd if asked["method"] == "ds" else method).calibration_rows == rows


def test_sizes_are_chosen_on_as_many() -> None:
    method = _method(
        {**NOT_SAID, "method": "ds", "task": "sst2", "preset": None, "ratio": 2.8, "data_aware": False},
    )
    assert method.compression.budget.calibration_rows == 1024


def test_what_looks_at_no_data_is_not_told_to() -> None:
    assert _method({**NOT_SAID, "method": "svd", "task": "sst2"}).name == "svd"
