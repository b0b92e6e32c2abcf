"""Folders with random weights are ordinary folders: same operators as a trained model's, and they run."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from compressor.config import CompressionConfig, ConfigError
from compressor.session import open_session
from compressor.synthetic import write_folders


def test_both_folders_run_and_differ_only_in_their_layers(tmp_path: Path) -> None:
    sizes = write_folders("bert-mini", CompressionConfig("3.57x", block_size=16), tmp_path, seed=3)
    counts = {}
    for variant in ("dense", "dsformer"):
        graph = onnx.load(tmp_path / variant / "model.onnx").graph
        counts[variant] = Counter(node.op_type for node in graph.node)
        session = open_session(tmp_path / variant / "model.onnx", 1)
        feed = {node.name: np.ones((2, 7), np.int64) for node in session.get_inputs()}
        assert session.run(None, feed)[0].shape == (2, 2)
        config = json.loads((tmp_path / variant / "config.json").read_text())
        assert config["dsformer"]["variant"] == variant
    assert counts["dsformer"]["DSLinear"] == 4 * 4
    assert counts["dense"]["MultiHeadAttention"] == counts["dsformer"]["Attention"] > 0
    assert counts["dense"]["SkipLayerNormalization"] == 2 * counts["dense"]["MultiHeadAttention"]
    assert sizes["dsformer"]["compression_ratio"] == pytest.approx(3.57, rel=0.1)
    assert sizes["dsformer"]["file_bytes"] < sizes["dense"]["file_bytes"]


def test_codes_keep_to_the_banks_of_wide_layers(tmp_path: Path) -> None:
    found = {}
    for limited in (True, False):
        write_folders("bert-mini", CompressionConfig("2x", 0.375, 0.25, 32, limited), tmp_path / str(limited))
        graph = onnx.load(tmp_path / str(limited) / "dsformer" / "model.onnx").graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        name = next(name for name in tensors if name.endswith("intermediate.dense.indices"))
        indices = onnx.numpy_helper.to_array(tensors[name])
        assert indices.shape[2] == 8
        found[limited] = np.stack([(indices // 128 == bank).sum(axis=2) for bank in range(3)]).max()
        assert (np.diff(np.sort(indices, axis=2).astype(int), axis=2) > 0).all()
    assert found[True] == 4 < found[False]


def test_an_unknown_shape_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the shapes are bert-base"):
        write_folders("bert-giant", CompressionConfig(), tmp_path)
