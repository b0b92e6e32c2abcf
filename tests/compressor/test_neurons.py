"""An order of neurons is an order, changes nothing that the model computes, and finds blocks that were hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_config
from transformers import BertForSequenceClassification

from compressor import checkpoint, pipeline
from compressor.config import CompressionConfig, KSVDConfig, LayerPlan, MethodOptions, TrainConfig
from compressor.ksvd import factorize, relative_error
from compressor.methods import find_method
from compressor.neurons import block_order, order_neurons
from compressor.stf import plan_model


def hidden_blocks(n_blocks: int, block_size: int, rows: int = 64) -> tuple[torch.Tensor, np.ndarray]:
    """Columns of which ``block_size`` at a time span two dimensions, shuffled; and the block of each."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(rows, 2, generator=generator) @ torch.randn(2, block_size, generator=generator)
        for _ in range(n_blocks)
    ]
    order = torch.randperm(n_blocks * block_size, generator=generator)
    return torch.cat(parts, dim=1)[:, order], (order // block_size).numpy()


@pytest.mark.parametrize(("n_blocks", "block_size"), [(1, 8), (2, 8), (6, 8), (5, 16), (3, 1)])
def test_hidden_blocks_are_found(n_blocks: int, block_size: int) -> None:
    weight, home = hidden_blocks(n_blocks, block_size)
    order = block_order(weight, block_size)
    assert sorted(order.tolist()) == list(range(n_blocks * block_size))
    found = [set(home[order[start : start + block_size]].tolist()) for start in range(0, len(order), block_size)]
    assert all(len(block) == 1 for block in found)


def test_the_factorization_gains() -> None:
    weight, _ = hidden_blocks(6, 16)
    weight = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    plan = LayerPlan(*weight.shape, block_size=16, n_atoms=24, n_nonzero=2)
    ordered = weight[:, block_order(weight, 16)]
    before, after = (relative_error(each, factorize(each, plan, KSVDConfig(5)).dense()) for each in (weight, ordered))
    assert after < 0.8 * before


def test_what_the_model_computes_stays() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(make_config(hidden_size=64, num_attention_heads=16)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.bias)
    ids = torch.randint(5, 40, (3, 11))
    weight = model.bert.encoder.layer[0].output.dense.weight.clone()
    with torch.no_grad():
        before = model(ids).logits
        order_neurons(model, plan_model(model, CompressionConfig("2.8x")))
        after = model(ids).logits
    assert torch.allclose(before, after, atol=1e-6)
    assert not torch.equal(weight, model.bert.encoder.layer[0].output.dense.weight), "nothing was renumbered"


def test_columns_of_zeros_have_a_place() -> None:
    weight = torch.zeros(4, 8)
    weight[:, 3] = 1
    assert sorted(block_order(weight, 4).tolist()) == list(range(8))


def test_the_compressed_model_is_of_the_renumbered_one(tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path) -> None:
    """Factorized almost exactly (S near B), the checkpoint still computes what the dense model did."""
    data = pipeline.Data("classify", train_file=sentiment_tsv)
    options = MethodOptions(gamma=0.4, delta=1.0, order_neurons=True, iterations=2, limit_banks=False)
    method = find_method("ds").from_options(options)
    config = TrainConfig(max_steps=1, batch_size=8)
    record = pipeline.compress(str(tiny_bert), data, method, config, tmp_path / "out", schedule="ft-f")
    assert record.compression is not None
    assert record.compression["order_neurons"] is True
    task = data.resolve()
    dense, found = (checkpoint.load(str(folder), task).model.eval() for folder in (tiny_bert, tmp_path / "out"))
    ids = torch.randint(5, 40, (3, 11))
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, found(ids).logits, atol=1e-3)
    before, after = (model.bert.encoder.layer[0].output.dense.weight for model in (dense, found))
    assert not torch.allclose(before, after, atol=1e-2), "the neurons kept their order"
