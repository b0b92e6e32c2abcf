"""Statistics of many rows at once equal those of one row at a time, by plain autograd in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, make_config, make_tokenizer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from compressor import calibration as calibration_module
from compressor.calibration import Calibration, fisher_rows, input_grams, output_importance
from compressor.config import ConfigError
from compressor.data import ClassifyExample, QAExample, classify_features, collate, qa_features
from compressor.layers import find_stacks, linear_names
from compressor.tasks import find_task
from compressor.train import LABELS, task_loss


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "albert":  # one layer's weights, used three times
        config = AlbertConfig(
            vocab_size=len(WORDS) + 5,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=2,
        )
        model: Any = AlbertForSequenceClassification(config)
    elif name == "qa":
        model = BertForQuestionAnswering(make_config())
    else:
        model = BertForSequenceClassification(make_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().train()  # dropout is on, and must not matter


def make_calibration(name: str, n_rows: int = 9) -> Calibration:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(2, 20))) for _ in range(n_rows)]
    if name == "qa":
        task = find_task("squad")
        examples = [QAExample(str(i), "who won", f"the king {text}", ((4, "king"),)) for i, text in enumerate(texts)]
        features = qa_features(examples, make_tokenizer(), 128, 16, training=True, unanswerable=False)
    else:
        task = replace(find_task("classify"), label_names=("no", "yes"))
        examples = [ClassifyExample(text, None, i % 2) for i, text in enumerate(texts)]
        features = classify_features(examples, make_tokenizer(), 64)
    return Calibration(features, task, 0, batch_size=4)


@pytest.mark.parametrize("name", ["bert", "qa", "albert"])
def test_fisher_rows_are_those_of_single_rows(name: str) -> None:
    model, calibration = make_model(name), make_calibration(name)
    if name == "qa":  # its loss is over all positions of a batch, padding included: only single rows are the same
        calibration = replace(calibration, batch_size=1)
    names = linear_names(model)
    assert len(names) == (6 if name == "albert" else 12)
    found = fisher_rows(model, names, calibration, 100)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    truth = {layer: torch.zeros(len(model.get_submodule(layer).weight), dtype=torch.float64) for layer in names}
    for feature in calibration.features:
        batch = collate([feature], 0)
        inputs = {key: value for key, value in batch.items() if key not in LABELS}
        model.zero_grad()
        task_loss(model(**inputs), batch, calibration.task).backward()
        for layer in names:
            truth[layer] += model.get_submodule(layer).weight.grad.square().sum(dim=1) / len(calibration.features)
    for layer in names:
        assert found[layer].sum() > 0
        torch.testing.assert_close(found[layer], truth[layer], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "qa", "albert"])
def test_importance_is_what_every_hidden_state_says_of_an_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the gradient of each single number of the hidden states, which random projections stand for."""
    monkeypatch.setattr(calibration_module, "_PROBES", 200)
    model, calibration = make_model(name), replace(make_calibration(name, n_rows=2), batch_size=2)
    names = linear_names(model)
    found = output_importance(model, names, calibration, 100)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    (batch,) = calibration.batches(2)
    inputs = {key: value for key, value in batch.items() if key not in LABELS}
    outputs: dict[str, list[torch.Tensor]] = {layer: [] for layer in names}
    for layer in names:
        model.get_submodule(layer).register_forward_hook(lambda _, __, y, layer=layer: outputs[layer].append(y))
    mask = inputs["attention_mask"].unsqueeze(2)
    states = [state * mask for state in model(**inputs, output_hidden_states=True).hidden_states[1:]]
    numbers = torch.cat([(state / state.detach().norm()).flatten() for state in states])
    every = [y for calls in outputs.values() for y in calls]
    squares = [torch.zeros(y.shape[-1], dtype=torch.float64) for y in every]
    numbers = numbers[numbers != 0]
    for each in torch.eye(len(numbers), dtype=torch.float64).split(256):
        gradients = torch.autograd.grad(
            numbers, every, each, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for total, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                total += gradient.square().flatten(0, -2).sum(0)
    for layer in names:
        n_calls = len(outputs[layer])
        truth = 200 * 2 * torch.stack(squares[:n_calls]).sum(0)  # of two rows, and of so many projections
        squares = squares[n_calls:]
        torch.testing.assert_close(found[layer], truth, rtol=0.5, atol=0.05 * float(truth.max()))
        assert float(found[layer].sum()) == pytest.approx(float(truth.sum()), rel=0.1)


@pytest.mark.parametrize("name", ["bert", "qa", "albert"])
def test_grams_are_of_all_tokens_but_padding(name: str) -> None:
    model, calibration = make_model(name), make_calibration(name)
    specs = find_stacks(model)
    found = input_grams(model, specs, calibration, 100)
    assert set(found) == set(linear_names(model))
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in found}
    for layer in found:
        model.get_submodule(layer).register_forward_pre_hook(lambda _, x, layer=layer: seen[layer].append(x[0][0]))
    model.eval()
    with torch.no_grad():
        for feature in calibration.features:
            batch = collate([feature], 0)
            model(**{key: value for key, value in batch.items() if key not in LABELS})
    for layer, gram in found.items():
        x = torch.cat(seen[layer])  # (tokens, N)
        torch.testing.assert_close(gram, x.T @ x, rtol=1e-6, atol=1e-8)


def test_as_many_rows_as_asked_for() -> None:
    calibration = make_calibration("bert")
    drawn = {n: sum(len(batch["input_ids"]) for batch in calibration.batches(n)) for n in (1, 5, 9, 100)}
    assert drawn == {1: 1, 5: 5, 9: 9, 100: 9}
    first = calibration.batches(1)[0]["input_ids"].tolist()
    assert first == calibration.batches(1)[0]["input_ids"].tolist()
    others = [replace(calibration, seed=seed).batches(1)[0]["input_ids"].tolist() for seed in range(1, 9)]
    assert any(other != first for other in others)


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(ConfigError, match="nothing to calibrate on"):
        replace(make_calibration("bert"), features=[]).batches(5)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model, calibration = make_model("bert"), make_calibration("bert")
    model.bert.embeddings.LayerNorm.bias.data[3] = torch.nan
    with pytest.raises(ConfigError, match=r"the inputs of bert.encoder.layer.0.* are not finite"):
        input_grams(model, find_stacks(model), calibration, 5)
    with pytest.raises(ConfigError, match=r"the gradients of bert.encoder.layer.0.* are not finite"):
        fisher_rows(model, linear_names(model), calibration, 5)
    with pytest.raises(ConfigError, match=r"the gradients of bert.encoder.layer.0.* are not finite"):
        output_importance(model, linear_names(model), calibration, 5)
    assert not any(
        each._forward_hooks or each._forward_pre_hooks for each in map(model.get_submodule, linear_names(model))
    )
