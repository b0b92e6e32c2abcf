"""The family besides BERT: factorize → train → export → ONNX equals PyTorch → an answer from the service's code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from compressor import checkpoint as checkpoints
from compressor import pipeline
from compressor.config import MethodOptions, TrainConfig
from compressor.methods import find_method
from compressor.share import share_folder
from service.artifact import read
from service.model import OnnxModel

CONFIG = TrainConfig(max_steps=2, batch_size=16, learning_rate=1e-3, max_length=32, hidden_weight=1.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "ds": {"gamma": 0.4, "delta": 0.375, "iterations": 2},
    "svd": {"preset": "2x"},
    "nm": {},
}
TEXTS = ["the film was very good .", "a dull plot .", "queen and king in paris ."]
SIZES = {
    name: getattr(make_config(), name)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Data:
    path = tmp_path_factory.mktemp("data") / "reviews.tsv"
    words = {"happy": ("good", "great", "fine"), "angry": ("bad", "awful", "dull")}
    nouns = ("film", "plot", "story", "actor")
    reviews = [
        f"the {noun} was {word} .\t{label}" for noun in nouns for label, of_it in words.items() for word in of_it
    ]
    path.write_text("\n".join(["text\tlabel", *reviews]) + "\n")
    return pipeline.Data("classify", train_file=path)


def make_folder(name: str, folder: Path) -> Path:
    """A random model whose answers depend on the words, with the inputs that its tokenizer makes."""
    torch.manual_seed(0)
    model: Any
    match name:
        case "roberta":
            config = RobertaConfig(**SIZES, max_position_embeddings=65, pad_token_id=0, type_vocab_size=1)
            model = RobertaForSequenceClassification(config)
        case "distilbert":
            vocabulary = SIZES["vocab_size"]
            model = DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
            )
        case "electra":
            model = ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16))
        case "albert":
            model = AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=16))
        case "shared-bert":
            model = BertForSequenceClassification(make_config(num_hidden_layers=4))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = make_tokenizer()
    if name in ("roberta", "distilbert"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    if name == "shared-bert":
        share_folder(str(folder / name), folder / "shared", groups=2)
        return folder / "shared"
    return folder / name


@pytest.mark.parametrize(
    ("name", "method"),
    [*itertools.product(("roberta", "distilbert", "electra", "albert"), ("ds", "svd", "nm")), ("shared-bert", "ds")],
)
def test_the_whole_way(name: str, method: str, data: pipeline.Data, tmp_path: Path) -> None:
    trained, served = tmp_path / "trained", tmp_path / "served"
    source = str(make_folder(name, tmp_path))
    chosen = find_method(method).from_options(MethodOptions(**OPTIONS[method]))
    record = pipeline.compress(source, data, chosen, CONFIG, trained, measure=False)
    loaded = checkpoints.load(str(trained), data.resolve())
    n_matrices = {"albert": 6}.get(name, 12)  # shared layers are stored, and counted, once
    assert sum(len(factor.members) for factor in loaded.factors) == n_matrices
    card = pipeline.export_checkpoint(trained, data, served, storage="float32", measure=True)
    assert card["sizes"]["compression_ratio"] == pytest.approx(record.compression["ratio_eq11"], abs=1e-3)
    assert card["sizes"]["factorized_float32_bytes"] == n_matrices / 6 * 4 * (4 * 32 * 32 + 2 * 32 * 64)

    config = json.loads((served / "config.json").read_text())
    assert config["dsformer"]["variant"] == {"ds": "dsformer"}.get(method, method)
    model = OnnxModel(read(served), threads=1)
    (found,) = model.run([model.tokenizer.single.join(tokens.ids) for tokens in model.tokenizer.encode(TEXTS)])
    tokenizer = AutoTokenizer.from_pretrained(trained)
    plain = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    with torch.no_grad():
        expected = plain(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    assert np.ptp(expected, axis=0).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=2e-4)
