"""Layers that share their weights: the same model where nothing is shared, an ordinary ALBERT where it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel, RobertaConfig
from transformers import RobertaModel as Roberta
from typer.testing import CliRunner

from compressor.__main__ import app
from compressor.config import ConfigError
from compressor.layers import find_stacks
from compressor.share import share_folder, share_layers

TEXTS = ["the film was very good .", "a dull plot ."]


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    model = BertModel(make_config(num_hidden_layers=4))
    for parameter in model.parameters():  # biases and layer norms too, so that none can take another's place
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def hidden(model: Any) -> torch.Tensor:
    batch = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        result = model(**batch)
    return torch.cat([result.last_hidden_state.flatten(), result.pooler_output.flatten()])


def test_with_as_many_groups_as_layers_it_is_the_same_model(bert: Any) -> None:
    torch.testing.assert_close(hidden(share_layers(bert, 4)), hidden(bert), atol=1e-5, rtol=0)


def test_a_group_is_its_first_layer_over_again(bert: Any) -> None:
    repeated = copy.deepcopy(bert)
    for i in (1, 3):
        repeated.encoder.layer[i] = repeated.encoder.layer[i - 1]
    assert not torch.allclose(hidden(repeated), hidden(bert), atol=1e-2)
    torch.testing.assert_close(hidden(share_layers(bert, 2)), hidden(repeated), atol=1e-5, rtol=0)


def test_the_folder_is_an_ordinary_one(folder: Path, bert: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["share", "--model", str(folder), "--output", str(tmp_path / "shared")])
    assert done.exit_code == 0, done.output
    sizes = json.loads(done.stdout)
    layer = sum(parameter.numel() for parameter in bert.encoder.layer[0].parameters())
    assert sizes["parameters"] == sizes["parameters_before"] - 3 * layer + 32 * 33
    model = AutoModel.from_pretrained(tmp_path / "shared")
    torch.testing.assert_close(hidden(model), hidden(share_layers(bert)), atol=1e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shared", use_fast=True)
    assert tokenizer(TEXTS)["input_ids"] == make_tokenizer()(TEXTS)["input_ids"]
    assert tokenizer.is_fast
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shared", num_labels=3)
    assert len(find_stacks(headed)) == 4  # of one layer


def test_what_cannot_be_shared_is_said(bert: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 layers do not make 3 equal groups"):
        share_layers(bert, 3)
    with pytest.raises(ConfigError, match="4 layers do not make 0 equal groups"):
        share_layers(bert, 0)
    with pytest.raises(ConfigError, match="this is a RobertaModel"):
        share_layers(Roberta(RobertaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)))
    with pytest.raises(ConfigError, match="cannot load the model"):
        share_folder(str(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
