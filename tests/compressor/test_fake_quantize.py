"""On the grid everything is a multiple of its scale; afterwards the model is ordinary, and its weights stay there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_config
from torch import nn
from transformers import BertForSequenceClassification

from compressor import checkpoint, pipeline
from compressor.config import TrainConfig
from compressor.fake_quantize import InputGrid, on_grid


def is_on_grid(weight: torch.Tensor) -> bool:
    steps = weight.double() / (weight.abs().amax().double() / 127)
    return bool((steps - steps.round()).abs().max() < 1e-3)


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    kinds = (nn.Linear, nn.Embedding)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def test_rounding_is_the_nearest_of_255_values_and_gradients_pass() -> None:
    grid = InputGrid()
    x = torch.tensor([-2.54, -0.031, 0.0, 0.029, 1.0, 2.54], requires_grad=True)
    y = grid(x)
    step = 2.54 / 127
    expected = torch.round(x.detach() / step) * step
    assert torch.allclose(y, expected, atol=1e-6)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(6))


def test_inputs_scale_is_a_moving_average_that_measuring_leaves_alone() -> None:
    grid = InputGrid()
    grid(torch.tensor([1.0]))
    assert float(grid.largest) == 1.0, "the first batch"
    grid(torch.tensor([2.0]))
    assert float(grid.largest) == pytest.approx(1.1)
    grid.eval()
    assert float(grid(torch.tensor([5.0]))) == pytest.approx(1.1), "what is beyond is cut off"
    assert float(grid.largest) == pytest.approx(1.1)


def test_a_model_is_ordinary_again_with_its_weights_on_the_grid() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(make_config()).eval()
    names = set(model.state_dict())
    ids = torch.randint(5, 40, (2, 9))
    before = model(ids).logits
    assert not any(is_on_grid(weight) for weight in matrices(model).values())
    with on_grid(model):
        model.train()
        model(ids)
        model.eval()
        inside = model(ids).logits
    assert set(model.state_dict()) == names
    assert all(is_on_grid(weight) for weight in matrices(model).values())
    assert not torch.equal(before, inside)
    assert torch.allclose(before, inside, atol=0.1), "8 bits are near"


def test_a_killed_fine_tuning_on_the_grid_goes_on_alike(tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path) -> None:
    data = pipeline.Data("classify", train_file=sentiment_tsv)
    config = TrainConfig(max_steps=6, batch_size=8, learning_rate=1e-3, checkpoint_seconds=1e-9)
    whole = pipeline.finetune(str(tiny_bert), data, config, tmp_path / "whole", fake_quantize=True)

    class Killed(Exception):
        pass

    count = 0

    def stop(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.train._Loop.save", _then(stop))
        with pytest.raises(Killed):
            pipeline.finetune(str(tiny_bert), data, config, tmp_path / "killed", fake_quantize=True)
    resumed = pipeline.finetune(str(tiny_bert), data, config, tmp_path / "killed", fake_quantize=True, resume=True)
    assert resumed.metrics == whole.metrics
    assert resumed.extra["metrics_on_grid"] == whole.extra["metrics_on_grid"]
    task = data.resolve()
    first, second = (checkpoint.load(str(tmp_path / name), task).model for name in ("whole", "killed"))
    for name, weight in matrices(first).items():
        assert torch.equal(weight, matrices(second)[name])
        assert is_on_grid(weight), name


def _then(after: object) -> object:
    from compressor.train import _Loop

    save = _Loop.save

    def both(self: object, path: Path) -> None:
        save(self, path)  # type: ignore[arg-type]
        after()  # type: ignore[operator]

    return both
