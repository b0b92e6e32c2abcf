"""Tiny but real model folders: a one-layer attention graph in ONNX and a WordPiece tokenizer.

The weights are drawn from a fixed seed, so answers mean nothing but never change. The QA graph looks at its input
through attention, so the same token gets other logits in another window, as in a real model.
"""

from __future__ import annotations

import hashlib
import json
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from compressor import golden
from service.app import create_app
from service.settings import Settings

HIDDEN = 32
BLOCK = 16
ATOMS = 24
NONZERO = 3
MAX_LENGTH = 128
WORDS = ["a", "the", "film", "is", "good", "bad", "clara", "lives", "in", "berkeley", "who", "where", "does", "live"]


def vocabulary() -> list[str]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits + ".,!?'-"
    return list(
        dict.fromkeys([*special, *WORDS, *letters, *(f"##{c}" for c in letters), *"東京は日本の首都です", "🎬", "🦄"])
    )


def tokenizer() -> Tokenizer:
    words = vocabulary()
    made = Tokenizer(WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As training tools leave it behind: the service must not let this cut anything unseen.
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made


def graph(task: str, variant: str, outputs: int) -> onnx.ModelProto:
    """Embeddings, one attention, one hidden layer (dense or DSLinear), one head."""
    rng = np.random.default_rng(7)
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(name: str, *shape: int) -> str:
        return constant(name, rng.normal(0, 1.0 / np.sqrt(shape[0]) * 2, shape).astype(np.float32))

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    words = node("Gather", [weight("word_embeddings", len(vocabulary()), HIDDEN), "input_ids"], "words")
    kinds = node("Gather", [weight("type_embeddings", 2, HIDDEN), "token_type_ids"], "kinds")
    count = node("CumSum", ["attention_mask", constant("along", np.array(1))], "count")
    place = node("Sub", [count, constant("step", np.array(1))], "place")
    places = node("Gather", [weight("position_embeddings", MAX_LENGTH, HIDDEN), place], "places")
    x = node("Add", [node("Add", [words, kinds], "wk"), places], "x")  # (B, T, H)
    turned = node("Transpose", [x], "turned", perm=[0, 2, 1])
    near = node("MatMul", [x, turned], "near")  # (B, T, T)
    mask = node("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
    bias = node(
        "Mul", [node("Sub", [mask, constant("one", np.float32(1))], "off"), constant("big", np.float32(1e4))], "b"
    )
    masked = node("Add", [near, node("Unsqueeze", [bias, constant("axis", np.array([1]))], "b1")], "masked")
    mixed = node("MatMul", [node("Softmax", [masked], "weights", axis=-1), x], "mixed")
    y = node("Add", [x, mixed], "y")
    hidden = hidden_layer(variant, y, rng, constant, nodes)
    z = node("Tanh", [hidden], "z")
    if task == "classify":
        first = node("Gather", [z, constant("zero", np.array(0))], "first", axis=1)
        node("MatMul", [first, weight("head", HIDDEN, outputs)], "logits")
        results = [("logits", ["batch", outputs])]
    else:
        both = node("MatMul", [z, weight("head", HIDDEN, 2)], "both")  # (B, T, 2)
        nodes.append(helper.make_node("Split", [both], ["start3", "end3"], axis=-1, num_outputs=2))
        last = constant("last", np.array([-1]))
        node("Squeeze", ["start3", last], "start_logits")
        node("Squeeze", ["end3", last], "end_logits")
        results = [("start_logits", ["batch", "sequence"]), ("end_logits", ["batch", "sequence"])]
    made = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
            for n in ("input_ids", "attention_mask", "token_type_ids")
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in results],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("dsformer", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8)


def hidden_layer(variant, y, rng, constant, nodes) -> str:
    blocks = HIDDEN // BLOCK
    dictionary = rng.normal(size=(blocks, ATOMS, BLOCK)).astype(np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=-1, keepdims=True)
    indices = np.stack([[rng.permutation(ATOMS)[:NONZERO] for _ in range(HIDDEN)] for _ in range(blocks)]).astype(
        np.uint8
    )
    values = rng.normal(size=indices.shape).astype(np.float32)
    if variant == "dsformer":
        inputs = [y, constant("d", dictionary), constant("i", indices), constant("v", values)]
        nodes.append(helper.make_node("DSLinear", inputs, ["hidden"], domain="dsformer"))
        return "hidden"
    # The same matrix written out, so that both variants must agree.
    columns = [np.einsum("ms,msb->mb", values[i], dictionary[i][indices[i]]) for i in range(blocks)]
    nodes.append(helper.make_node("MatMul", [y, constant("w", np.concatenate(columns, axis=1).T.copy())], ["hidden"]))
    return "hidden"


def write_model_folder(
    folder: Path,
    task: str,
    variant: str,
    labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE"),
    problem_type: str | None = "single_label_classification",
) -> Path:
    folder.mkdir(parents=True)
    onnx.save(graph(task, variant, len(labels)), folder / "model.onnx")
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": 0,
        "dsformer": {
            "task": task,
            "variant": variant,
            "preset": "2.8x" if variant == "dsformer" else None,
            "gamma": 0.75 if variant == "dsformer" else None,
            "delta": 3 / 16 if variant == "dsformer" else None,
            "block_size": BLOCK if variant == "dsformer" else None,
            "precision": "float32",
            "base_model": "tiny",
            "format_version": 1,
            "sha256": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(),
        },
    }
    if task == "classify":
        config |= {"id2label": {str(i): label for i, label in enumerate(labels)}, "problem_type": problem_type}
    (folder / "config.json").write_text(json.dumps(config))
    golden.write_here(folder)
    return folder


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """Writes one tiny model folder: (folder, task, variant, labels, problem_type)."""
    return write_model_folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks, both variants."""
    root = tmp_path_factory.mktemp("models")
    for task in ("classify", "qa"):
        for variant in ("dense", "dsformer"):
            write_model_folder(root / f"tiny-{task}-{variant}", task, variant)
    return root


@pytest.fixture(scope="session")
def make_client() -> Callable[..., TestClient]:
    """A client of a new service; use it in a `with`, which returns when the service is ready."""

    class ReadyClient(TestClient):
        def __enter__(self) -> ReadyClient:
            super().__enter__()
            deadline = time.monotonic() + 60
            while self.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline, self.get("/readyz").text
                time.sleep(0.02)
            return self

    def make(models: Path, **options: object) -> TestClient:
        return ReadyClient(create_app(Settings(models=models, threads=1, **options)))

    return make


@pytest.fixture(scope="module")
def client(models: Path, make_client: Callable[..., TestClient]) -> Iterator[TestClient]:
    with make_client(models) as ready:
        yield ready
