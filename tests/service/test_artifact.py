"""Every way a model folder can be broken is one sentence that names the folder and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import artifact, registry
from service.app import create_app
from service.errors import StartError
from service.settings import Settings


@pytest.fixture
def folder(tmp_path: Path, write_folder: Callable[..., Path]) -> Path:
    return write_folder(tmp_path / "mine", "classify", "dense")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def sign(folder: Path) -> None:
    """Let golden.json agree with the files again, so that a test sees what else is wrong."""
    signed = json.loads((folder / "golden.json").read_text())
    signed["sha256"] = {name: artifact.sha256(folder / name) for name in signed["sha256"]}
    (folder / "golden.json").write_text(json.dumps(signed))


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    edit(folder, lambda c: c["dsformer"].update(sha256=artifact.sha256(folder / "model.onnx")))


def start(folder: Path) -> None:
    create_app(Settings(models=folder.parent, threads=1))


def test_a_good_folder_is_read(folder: Path) -> None:
    found = artifact.read(folder)
    assert (found.task, found.variant, found.labels) == ("classify", "dense", ["NEGATIVE", "POSITIVE"])
    assert found.config.max_length == 128


def test_roberta_has_fewer_tokens_than_positions(folder: Path) -> None:
    edit(folder, lambda c: c.update(model_type="roberta", max_position_embeddings=514, pad_token_id=1))
    assert artifact.read(folder).config.max_length == 512


@pytest.mark.parametrize("name", artifact.FILES)
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StartError, match=rf"mine: {name} is missing"):
        start(folder)


def test_damaged_model_file(folder: Path) -> None:
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StartError, match=r"mine: model\.onnx has sha256 .* damaged"):
        start(folder)


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, "\udcff"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartError, match=r"mine: config\.json"):
        start(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("dsformer"), 'no object "dsformer"'),
        (lambda c: c["dsformer"].update(format_version=2), "format_version is 2, this service reads 1"),
        (lambda c: c["dsformer"].pop("format_version"), "format_version is None"),
        (lambda c: c["dsformer"].update(task="translate"), "dsformer.task"),
        (lambda c: c["dsformer"].update(variant="quantised"), "dsformer.variant"),
        (lambda c: c["dsformer"].pop("sha256"), "dsformer.sha256"),
        (lambda c: c.pop("max_position_embeddings"), "max_position_embeddings"),
        (lambda c: c.update(problem_type="ranking"), "problem_type"),
        (lambda c: c.pop("id2label"), "id2label"),
        (lambda c: c.update(id2label={"0": "a", "2": "b"}), r"keys of id2label are \[0, 2\]"),
        (lambda c: c.update(id2label={"0": "a", "1": "b", "2": "c"}), r"logits has shape \[2, 2\]"),
        (lambda c: c["dsformer"].update(task="qa"), "start_logits is missing"),
    ],
)
def test_wrong_config(folder: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    edit(folder, change)
    with pytest.raises(StartError, match=f"mine.*{reason}"):
        start(folder)


def test_a_folder_without_stored_answers(folder: Path) -> None:
    (folder / "golden.json").unlink()
    with pytest.raises(StartError, match=r"mine: golden\.json is missing; .*python -m compressor\.golden"):
        start(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"tolerance": 0.1, "sha256": {}, "rows": []}', "\udcff"])
def test_stored_answers_that_are_none(folder: Path, text: str) -> None:
    (folder / "golden.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartError, match=r"mine: golden\.json"):
        start(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_that_was_changed(folder: Path, name: str) -> None:
    with (folder / name).open("a") as file:
        file.write(" ")
    with pytest.raises(StartError, match=rf"mine: {name} is not the file that golden\.json was made with"):
        start(folder)


def test_a_tokenizer_that_splits_otherwise(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    sign(folder)
    with pytest.raises(StartError, match=r"mine: the tokenizer splits row \d of golden\.json otherwise"):
        start(folder)


@pytest.mark.parametrize(("said", "made"), [("dense", "dsformer"), ("dsformer", "dense")])
def test_a_variant_that_the_graph_is_not(
    tmp_path: Path, write_folder: Callable[..., Path], said: str, made: str
) -> None:
    folder = write_folder(tmp_path / "mine", "qa", made)
    edit(folder, lambda c: c["dsformer"].update(variant=said))
    with pytest.raises(
        StartError, match=rf"mine: config\.json says variant {said}, but model\.onnx .* the op DSLinear"
    ):
        start(folder)


def test_model_file_that_is_no_onnx(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"not a model")
    edit(folder, lambda c: c["dsformer"].update(sha256=artifact.sha256(folder / "model.onnx")))
    with pytest.raises(StartError, match=r"mine: model\.onnx cannot be loaded"):
        start(folder)


def test_tokenizer_that_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    sign(folder)
    with pytest.raises(StartError, match=r"mine: tokenizer\.json cannot be read"):
        start(folder)


def test_foreign_inputs(folder: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "ids"
        for node in model.graph.node:
            node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]

    edit_graph(folder, rename)
    with pytest.raises(StartError, match=r"mine: model\.onnx has inputs .*expected"):
        start(folder)


def test_vocabulary_smaller_than_the_tokenizers(folder: Path) -> None:
    def shrink(model: onnx.ModelProto) -> None:
        (words,) = [w for w in model.graph.initializer if w.name == "word_embeddings"]
        words.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(words)[:10], words.name))

    edit_graph(folder, shrink)
    with pytest.raises(StartError, match=r"mine: a trial run failed"):
        start(folder)


def test_weights_with_nan(folder: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        (head,) = [w for w in model.graph.initializer if w.name == "head"]
        head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(np.nan), head.name))

    edit_graph(folder, spoil)
    with pytest.raises(StartError, match=r"mine: a trial run failed.*NaN"):
        start(folder)


def test_two_folders_for_one_task_and_variant(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "other")
    with pytest.raises(StartError, match=r"mine and .*other are both classify, dense"):
        start(folder)


def test_no_directory_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="There is no model directory"):
        artifact.find_folders(tmp_path / "nowhere")
    with pytest.raises(StartError, match="holds no model folder"):
        artifact.find_folders(tmp_path)


def test_a_model_folder_may_be_given_itself(folder: Path) -> None:
    assert artifact.find_folders(folder) == [folder]


def test_a_budget_below_the_longest_input_is_refused(folder: Path) -> None:
    with pytest.raises(StartError, match=r"takes 128 tokens, more than max_batch_tokens 64"):
        registry.load(Settings(models=folder, threads=1, max_batch_tokens=64))


def test_a_missing_kernel_library_stops_the_start(
    tmp_path: Path, write_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise FileNotFoundError("libdsformer.so is not built: run this")

    write_folder(tmp_path / "fast", "qa", "dsformer")
    monkeypatch.setattr("kernels.library_path", missing)
    with pytest.raises(StartError, match=r"fast: model\.onnx cannot be loaded: libdsformer\.so is not built"):
        start(tmp_path / "fast")
