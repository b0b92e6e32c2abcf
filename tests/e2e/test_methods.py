"""Every compression method: factorize → train → export → ONNX equals PyTorch → an answer from the service's code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file
from tiny import save_folder, stored_factors
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compressor import checkpoint as checkpoints
from compressor import graph as graph_module
from compressor import pipeline
from compressor.calibration import Calibration, fisher_rows, input_grams
from compressor.config import ConfigError, MethodOptions, TrainConfig
from compressor.layers import compressed_layers, find_stacks, linear_names, materialize
from compressor.lowrank import SVD
from compressor.methods import METHODS, dense_weights, find_method, find_schedule, relative_errors
from compressor.train import TrainingError, _Loop
from service.artifact import read
from service.model import OnnxModel

CONFIG = TrainConfig(max_steps=3, batch_size=16, learning_rate=1e-3, dropout=0.1, max_length=32, hidden_weight=1.0)
OPTIONS = {
    "ds": {"gamma": 0.4, "delta": 0.375, "iterations": 2, "data_aware": True, "calibration_rows": 20},
    "svd": {"preset": "2x"},
    "fwsvd": {"ratio": 2.5, "calibration_rows": 20},
    "drone": {"preset": "2x", "calibration_rows": 20, "sequential": True},
    "nm": {},
}
# (method, schedule): every way to train each of them.
WAYS = [(name, schedule) for name, method in METHODS.items() for schedule in method.schedules]
TEXTS = ["the film was very good .", "a dull plot .", "queen and king in paris ."]


def make_method(name: str, **changes: Any) -> Any:
    return find_method(name).from_options(MethodOptions(**{**OPTIONS[name], **changes}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Data:
    random = np.random.default_rng(0)
    rows = ["text\tlabel"]
    for positive in random.integers(2, size=60).astype(bool):
        adjective = random.choice(["good", "great", "fine"] if positive else ["bad", "awful", "dull"])
        rows.append(
            f"the {random.choice(['film', 'plot', 'story'])} was {adjective} .\t{'happy' if positive else 'angry'}"
        )
    path = tmp_path_factory.mktemp("data") / "reviews.tsv"
    path.write_text("\n".join(rows) + "\n")
    return pipeline.Data("classify", train_file=path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, data: pipeline.Data) -> str:
    """A tiny model, fine-tuned until its answers depend on the words."""
    base = save_folder(tmp_path_factory.mktemp("base"), "classify")
    output = tmp_path_factory.mktemp("dense") / "dense"
    config = TrainConfig(max_steps=80, batch_size=16, learning_rate=3e-3, max_length=32)
    pipeline.finetune(str(base), data, config, output, measure=False)
    return str(output)


@pytest.mark.parametrize(("name", "schedule"), WAYS, ids=lambda value: value)
def test_the_whole_way(name: str, schedule: Any, data: pipeline.Data, dense: str, tmp_path: Path) -> None:
    trained, served = tmp_path / "trained", tmp_path / "served"
    record = pipeline.compress(dense, data, make_method(name), CONFIG, trained, schedule=schedule, measure=False)
    assert record.stage == schedule
    assert record.compression["method"] == name
    loaded = checkpoints.load(str(trained), data.resolve())
    assert loaded.method == name
    assert record.compression["ratio_eq11"] == pytest.approx(pipeline_ratio(loaded), abs=1e-3)

    # Exported as float32: ONNX is PyTorch's model up to the order of sums, in standard operators.
    card = pipeline.export_checkpoint(trained, data, served, storage="float32", measure=True)
    assert card["sizes"]["compression_ratio"] == pytest.approx(pipeline_ratio(loaded), abs=1e-3)
    graph = onnx.load(served / "model.onnx").graph
    own = Counter(node.op_type for node in graph.node if node.domain == "dsformer")
    assert bool(own) == (name == "ds")
    assert 0 <= card["metrics"]["accuracy"] <= 100

    config = json.loads((served / "config.json").read_text())
    assert config["dsformer"]["variant"] == {"ds": "dsformer"}.get(name, name)
    answers(served, trained, tolerance=1e-4)


def pipeline_ratio(loaded: checkpoints.Checkpoint) -> float:
    return 32 * sum(factor.n_weights for factor in loaded.factors) / sum(factor.bits for factor in loaded.factors)


def answers(served: Path, trained: Path, tolerance: float, *, int8_embeddings: bool = False) -> None:
    """The service's own model code gives the logits of the checkpoint, as Transformers loads it.

    ``int8_embeddings``: of the checkpoint with its large tables rounded so. How far rounding moves a logit is the
    model's affair, and depends on what training made of it; that nothing else moves it is the export's.
    """
    model = OnnxModel(read(served), threads=1)
    rows = [model.tokenizer.single.join(tokens.ids) for tokens in model.tokenizer.encode(TEXTS)]
    (found,) = model.run(rows)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    plain = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    with torch.no_grad():
        for table in (each.weight for each in plain.modules() if int8_embeddings and isinstance(each, nn.Embedding)):
            if table.numel() >= graph_module._LARGE:
                scale = table.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
                table.copy_((table / scale).round() * scale)
        expected = plain(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()
    assert np.ptp(expected, axis=0).max() > 3 * tolerance
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["svd", "nm"])
def test_sizes_are_of_what_is_stored(
    name: str, storage: Any, data: pipeline.Data, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eq. 11 counts the checkpoint's factors to the bit; the card's bytes are those of the graph's weights."""
    monkeypatch.setattr("compressor.graph._LARGE", 300)  # so that float16 matters to matrices as small as these
    trained, served = tmp_path / "trained", tmp_path / "served"
    pipeline.compress(dense, data, make_method(name), CONFIG, trained, measure=False)
    factors = checkpoints.load(str(trained), data.resolve()).factors
    counted = [tensor.nbytes for part, tensor in stored_factors(trained).items() if not part.endswith(".group")]
    assert 8 * sum(counted) == sum(factor.bits for factor in factors)

    card = pipeline.export_checkpoint(trained, data, served, storage=storage, measure=False)
    graph = onnx.load(served / "model.onnx").graph
    held = {tensor.name.removesuffix(".float16"): numpy_helper.to_array(tensor) for tensor in graph.initializer}
    wanted = {part for factor in factors for part in matrices_of(graph, factor.members[0])}
    assert len(wanted) == (24 if name == "svd" else 12)
    assert card["sizes"]["factorized_bytes"] == sum(held[part].nbytes for part in wanted)
    halves = {part for part in wanted if held[part].dtype == np.float16}
    assert len(halves) == (0 if storage == "float32" else 8 if name == "svd" else 12)  # 16 of svd's are too small
    precision = json.loads((served / "config.json").read_text())["dsformer"]["precision"]
    assert precision == ("float32" if storage == "float32" else "float16")
    tolerance = 1e-4 if storage == "float32" else 5e-3
    answers(served, trained, tolerance, int8_embeddings=storage == "int8")


def matrices_of(graph: Any, layer: str) -> list[str]:
    """Names of the weights that the MatMuls of one layer read."""
    path = f"/model/{layer.replace('.', '/')}".replace("/layer/", "/layer.")
    mine = [node for node in graph.node if node.name in (f"{path}/MatMul", f"{layer}.first", f"{layer}.second")]
    return [node.input[1] for node in mine]


@pytest.mark.parametrize(("name", "schedule"), [("fwsvd", None), ("drone", None), ("nm", "ft-f-ft"), ("nm", "sr-ste")])
def test_a_killed_run_goes_on_to_the_numbers_of_an_unbroken_one(
    name: str, schedule: Any, data: pipeline.Data, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, max_steps=6)
    pipeline.compress(dense, data, make_method(name), config, tmp_path / "whole", schedule=schedule, measure=False)

    advance = _Loop.advance

    def killed(loop: _Loop) -> float:
        if loop.step == 4:
            raise KeyboardInterrupt
        return advance(loop)

    often = replace(config, checkpoint_seconds=1e-9)
    output = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(dense, data, make_method(name), often, output, schedule=schedule, measure=False)
    assert not output.exists()
    with pytest.raises(TrainingError, match="belongs to another configuration"):
        pipeline.compress(dense, data, make_method("svd"), config, output, resume=True, measure=False)
    pipeline.compress(dense, data, make_method(name), config, output, schedule=schedule, resume=True, measure=False)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output))
    assert set(whole) == set(resumed)
    for part, tensor in whole.items():
        np.testing.assert_array_equal(resumed[part], tensor, err_msg=part)


@pytest.mark.parametrize("name", ["svd", "nm"])
def test_a_compressed_checkpoint_is_trained_on(name: str, data: pipeline.Data, dense: str, tmp_path: Path) -> None:
    first = pipeline.compress(dense, data, make_method(name), CONFIG, tmp_path / "first", measure=False)
    options = {"teacher": dense, "measure": False}
    second = pipeline.compress(str(tmp_path / "first"), data, make_method(name), CONFIG, tmp_path / "second", **options)
    assert second.extra["steps"] == 2 * first.extra["steps"]
    assert second.compression["relative_error"] == first.compression["relative_error"]
    old, new = (stored_factors(tmp_path / which) for which in ("first", "second"))
    assert any(not np.array_equal(old[part], new[part]) for part in old)
    if name == "nm":  # ASP's mask stays, even where it was not set in this run
        assert all(np.array_equal(old[part], new[part]) for part in old if part.endswith("packed_indices"))
    with pytest.raises(ConfigError, match=f"is compressed by {name} already; say --method {name}"):
        pipeline.compress(str(tmp_path / "first"), data, make_method("ds"), CONFIG, tmp_path / "third", **options)
    with pytest.raises(ConfigError, match="cannot be its own teacher"):
        pipeline.compress(str(tmp_path / "first"), data, make_method(name), CONFIG, tmp_path / "third")


def test_sizes_of_single_matrices(data: pipeline.Data, dense: str, tmp_path: Path, monkeypatch: Any) -> None:
    """ds with a ratio: compressed after a kill, trained on, exported, and served."""
    method = find_method("ds").from_options(
        MethodOptions(ratio=2.1, block_size=4, iterations=2, calibration_rows=20, limit_banks=False)
    )
    first, often = tmp_path / "first", replace(CONFIG, checkpoint_seconds=1e-9)
    advance = _Loop.advance

    def killed(loop: _Loop) -> float:
        if loop.step == 2:
            raise KeyboardInterrupt
        return advance(loop)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(dense, data, method, often, first, measure=False)
    with monkeypatch.context() as patch:
        patch.setattr("compressor.allocation.short_factorizations", None)  # the sizes are known by now
        record = pipeline.compress(dense, data, method, often, first, resume=True, measure=False)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    told = record.compression
    assert told["preset"] == "allocated"
    assert told["ratio_target"] == 2.1 <= told["ratio_eq11"] < 2.3
    factors = {each.members[0]: each for each in checkpoints.load(str(first), data.resolve()).factors}
    assert {name: (size["K"], size["S"]) for name, size in told["sizes"].items()} == {
        name: (each.dictionary.shape[1], each.values.shape[2]) for name, each in factors.items()
    }
    assert len({tuple(size.values()) for size in told["sizes"].values()}) > 2

    options = {"teacher": dense, "measure": False}
    second = pipeline.compress(str(first), data, method, CONFIG, tmp_path / "second", **options)
    assert second.compression == told
    assert second.extra["steps"] == 2 * record.extra["steps"]
    other = find_method("ds").from_options(MethodOptions(ratio=2.42, block_size=4))
    with pytest.raises(ConfigError, match=r"is compressed by 2\.\d\dx, but --ratio asks for 2.42x"):
        pipeline.compress(str(first), data, other, CONFIG, tmp_path / "third", **options)

    card = pipeline.export_checkpoint(tmp_path / "second", data, tmp_path / "served", storage="float32")
    assert card["sizes"]["compression_ratio"] == pytest.approx(told["ratio_eq11"], abs=1e-3)
    answers(tmp_path / "served", tmp_path / "second", tolerance=1e-4)


# --- what data-aware methods gain on their data ---------------------------------------------------------------


def calibrated(dense: str, data: pipeline.Data, n_rows: int) -> tuple[Any, Calibration]:
    task = data.resolve()
    loaded = checkpoints.load(dense, task)
    training, _ = data.examples(task, 0)
    features = pipeline.features_of(training, loaded.tokenizer, task, CONFIG)
    return loaded.model, Calibration(features[:n_rows], task, loaded.tokenizer.pad_token_id)


@pytest.mark.parametrize("n_rows", [1, 40])
@pytest.mark.parametrize("name", ["fwsvd", "drone"])
def test_calibrated_methods_are_never_worse_than_svd_by_their_own_measure(
    name: str, n_rows: int, data: pipeline.Data, dense: str
) -> None:
    """Layer by layer, at equal rank; also on a single row, whose inputs span far less than the layer's width."""
    model, calibration = calibrated(dense, data, n_rows)
    method, plain = find_method(name)(2.0), SVD(2.0)
    if name == "fwsvd":
        statistics = fisher_rows(model, linear_names(model), calibration, 40)
    else:
        statistics = input_grams(model, find_stacks(model), calibration, 40)
    pairs = zip(*(each.factorize(model, each.plan(model), calibration) for each in (method, plain)), strict=True)
    better = 0
    for mine, svds in pairs:
        weight, statistic = model.get_submodule(mine.member).weight.detach().double(), statistics[mine.member]
        errors = []
        for factor in (mine, svds):
            difference = weight - torch.from_numpy(factor.second).double() @ torch.from_numpy(factor.first).double()
            weighed = difference.square().sum(dim=1) @ statistic if name == "fwsvd" else difference @ statistic
            errors.append(float(weighed if name == "fwsvd" else (weighed * difference).sum()))
        assert np.isfinite(mine.first).all()
        assert np.isfinite(mine.second).all()
        assert errors[0] <= errors[1] * (1 + 1e-5)
        better += errors[0] < 0.99 * errors[1]
    assert better >= 6


def test_errors_are_those_of_the_layers(data: pipeline.Data, dense: str) -> None:
    for name in METHODS:
        model, calibration = calibrated(dense, data, 20)
        method = make_method(name)
        plan = method.plan(model)
        factors = method.factorize(model, plan, calibration)
        before = dense_weights(model, factors)
        method.attach(model, plan, factors, method.schedules[0])
        errors = relative_errors(model, factors, before)
        assert len(list(compressed_layers(model))) == len(before) == 12
        materialize(model)
        for factor in factors:
            old = torch.cat([before[member] for member in factor.members])
            new = torch.cat([model.get_submodule(member).weight for member in factor.members])
            assert errors[factor.members[0]] == pytest.approx(float((old - new).detach().norm() / old.norm()), abs=1e-4)
            assert 0 < errors[factor.members[0]] < 1


# --- what cannot work is a sentence ---------------------------------------------------------------------------


def test_methods_and_schedules_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="unknown method 'tucker': the methods are ds, svd, fwsvd, drone, nm"):
        find_method("tucker")
    with pytest.raises(ConfigError, match="--schedule sr-ste is not how --method svd is trained; it knows ft-f-ft"):
        find_schedule(make_method("svd"), "sr-ste")
    with pytest.raises(ConfigError, match=r"--pattern 1:4 means nothing to --method ds"):
        make_method("ds", pattern="1:4")


def test_the_command_says_it_in_a_sentence(data: pipeline.Data, dense: str, tmp_path: Path) -> None:
    words = ["compress", "--model", dense, "--task", "classify", "--train-file", str(data.train_file)]
    words += ["--output", str(tmp_path / "out"), "--method", "nm", "--ratio", "2.8"]
    done = subprocess.run([sys.executable, "-m", "compressor", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "2:4 sparsity is 1.88x, whatever the model, and cannot be 2.8x" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_compresses(data: pipeline.Data, dense: str, tmp_path: Path) -> None:
    words = ["compress", "--model", dense, "--task", "classify", "--train-file", str(data.train_file), "--steps", "2"]
    words += ["--output", str(tmp_path / "out"), "--method", "drone", "--ratio", "2", "--calibration-rows", "1"]
    done = subprocess.run([sys.executable, "-m", "compressor", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert "accuracy" in printed
    assert 0 <= printed["agreement"] <= 100, "with the dense model's answers"
    compression = json.loads((tmp_path / "out" / "training.json").read_text())["compression"]
    assert compression["method"] == "drone"
    assert compression["calibration_rows"] == 1
    assert compression["ranks"] == {"32x32": 8, "64x32": 10, "32x64": 10}


def test_one_command_for_every_method(data: pipeline.Data, dense: str, tmp_path: Path) -> None:
    words = ["run", "--model", dense, "--finetuned", "--task", "classify", "--train-file", str(data.train_file)]
    words += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--method", "svd", "--ratio", "2"]
    words += ["--compress-steps", "2"]
    done = subprocess.run([sys.executable, "-m", "compressor", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"dense accuracy", "svd accuracy"} <= set(json.loads(done.stdout))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["compression"]["ratio_target"] == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dsformer"]["variant"] == "svd"
