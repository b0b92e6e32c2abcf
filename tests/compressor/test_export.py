"""Exported folders compute what PyTorch computes, in fused operators, and say why when they cannot."""

import copy
import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tiny import WORDS, make_config, make_tokenizer
from transformers import (
    AlbertConfig,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
)

from compressor.data import ClassifyExample, QAExample
from compressor.evaluate import evaluate_folder, evaluate_model
from compressor.export import ExportError, Factors, Storage, export, usable_positions
from compressor.export import sizes as export_sizes
from compressor.graph import fuse, put_chains, put_factors, trace
from compressor.layers import materialize
from compressor.lowrank import SVD
from compressor.session import open_session
from compressor.tasks import find_task

SIZES = make_config().to_dict()
SHARED = {
    name: SIZES[name]
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
# One layer, called as often as there are layers.
ALBERT = {**SHARED, "num_hidden_layers": 2, "embedding_size": 16, "hidden_act": "gelu", "max_position_embeddings": 128}
LABELS = {"id2label": {0: "angry", 1: "calm", 2: "happy"}, "label2id": {"angry": 0, "calm": 1, "happy": 2}}
K, B, S = 20, 8, 3


def make_model(name: str) -> Any:
    """A random model whose biases and layer norms all differ, so that none can take another's place."""
    torch.manual_seed(0)
    model: Any
    match name:
        case "bert":
            model = BertForSequenceClassification(make_config(**LABELS))
        case "bert-relu":
            model = BertForSequenceClassification(make_config(hidden_act="relu", **LABELS))
        case "bert-qa":
            model = BertForQuestionAnswering(make_config())
        case "distilbert":
            config = DistilBertConfig(
                vocab_size=SHARED["vocab_size"], dim=32, n_layers=2, n_heads=4, hidden_dim=64, **LABELS
            )
            model = DistilBertForSequenceClassification(config)
        case "roberta":
            config = RobertaConfig(**SHARED, max_position_embeddings=65, pad_token_id=0, type_vocab_size=1, **LABELS)
            model = RobertaForSequenceClassification(config)
        case "roberta-qa":
            config = RobertaConfig(**SHARED, max_position_embeddings=65, pad_token_id=0, type_vocab_size=1)
            model = RobertaForQuestionAnswering(config)
        case "electra":
            model = ElectraForSequenceClassification(ElectraConfig(**SHARED, embedding_size=16, **LABELS))
        case "albert":
            model = AlbertForSequenceClassification(AlbertConfig(**ALBERT, **LABELS))
        case "albert-qa":
            model = AlbertForQuestionAnswering(AlbertConfig(**ALBERT))
        case "albert-groups":  # the activation of ALBERT's second version
            config = AlbertConfig(**{**ALBERT, "num_hidden_groups": 2, "hidden_act": "gelu_new"}, **LABELS)
            model = AlbertForSequenceClassification(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in parameter_name else 1.0, std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def bert_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def factorize(model: Any) -> dict[str, Factors]:
    """Random factors for every linear layer of the encoder, and the model's weights set to their products."""
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".layer." in name or "albert_layers." in name):
            is_qkv = name.rpartition(".")[2] in ("query", "key", "value", "q_lin", "k_lin", "v_lin")
            stacks.setdefault(name.rpartition(".")[0] if is_qkv else name, []).append(name)
    random = np.random.default_rng(0)
    factors = {}
    for members in stacks.values():
        layers = [model.get_submodule(name) for name in members]
        rows, blocks = sum(layer.out_features for layer in layers), layers[0].in_features // B
        dictionary = random.standard_normal((blocks, K, B)).astype(np.float32)
        dictionary /= np.linalg.norm(dictionary, axis=2, keepdims=True)
        indices = random.random((blocks, rows, K)).argsort(axis=2)[:, :, :S]
        values = random.normal(0, 0.2, (blocks, rows, S)).astype(np.float32)
        codes = np.zeros((blocks, rows, K), dtype=np.float32)
        np.put_along_axis(codes, indices, values, axis=2)
        weight = torch.from_numpy(np.concatenate(codes @ dictionary, axis=1))
        for layer, part in zip(layers, weight.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data.copy_(part)
        factors[members[0]] = Factors(tuple(members), dictionary, indices, values)
    return factors


def entry(kind: str = "classify", variant: str = "dense") -> dict[str, Any]:
    return {"task": kind, "variant": variant, "preset": None, "base_model": "tiny"}


def batch_of(n_rows: int, length: int, names: list[str]) -> dict[str, np.ndarray]:
    """Random tokens; every row but the first ends in padding."""
    random = np.random.default_rng(length)
    batch = {
        "input_ids": random.integers(5, 5 + len(WORDS), (n_rows, length)),
        "attention_mask": np.ones((n_rows, length), dtype=np.int64),
        "token_type_ids": random.integers(2, size=(n_rows, length)),
    }
    for row in range(1, n_rows):
        batch["attention_mask"][row, length - row :] = 0
        batch["input_ids"][row, length - row :] = 0
    return {name: batch[name] for name in names}


@pytest.mark.parametrize("factorized", [False, True], ids=["dense", "factorized"])
@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("bert", "float32"),
        ("bert", "float16"),
        ("bert-relu", "float32"),
        ("bert-qa", "float16"),
        ("distilbert", "float16"),
        ("roberta", "float32"),
        ("roberta-qa", "float32"),
        ("electra", "float16"),
        ("albert", "float32"),
        ("albert-qa", "float32"),
        ("albert-groups", "float32"),
        ("bert", "int16"),
        ("bert-qa", "int16"),
        ("roberta", "int16"),
    ],
)
def test_an_export_computes_what_pytorch_computes(name: str, storage: Any, factorized: bool, tmp_path: Path) -> None:
    model = make_model(name)
    factors = factorize(model) if factorized else None
    tokenizer = bert_tokenizer() if name.startswith(("bert", "electra", "albert")) else make_tokenizer()
    kind = "qa" if name.endswith("-qa") else "classify"
    export(model, tokenizer, factors, tmp_path / "out", config_entry=entry(kind), storage=storage)

    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["MultiHeadAttention"] == (0 if factorized else 2)
    assert counts["Attention"] == (2 if factorized else 0)
    assert counts["SkipLayerNormalization"] == (0 if factorized else 4)
    assert counts["DSLinear"] == (8 if factorized else 0)
    norms = [node for node in graph.node if any(value.name == "norm_epsilon" for value in node.attribute)]
    assert len(norms) == (4 if factorized else 0)
    gelus = [node for node in graph.node if any(value.s == b"gelu" for value in node.attribute)]
    if name == "bert-relu":
        assert counts["Relu"] == 2
        assert not gelus
    elif name == "albert-groups":
        assert counts["FastGelu"] == 2
        assert not gelus
    else:
        assert len(gelus if factorized else [n for n in graph.node if n.op_type == "BiasGelu"]) == 2

    session = open_session(tmp_path / "out" / "model.onnx", threads=1, custom_ops=factorized)
    names = [node.name for node in session.get_inputs()]
    assert ("token_type_ids" in names) == (tokenizer.model_input_names != ["input_ids", "attention_mask"])
    outputs = [node.name for node in session.get_outputs()]
    assert outputs == (["start_logits", "end_logits"] if kind == "qa" else ["logits"])
    # Float16 rounds each weight to 11 bits; logits here are of size 1 to 5.
    tolerance = 1e-4 if storage == "float32" else 2e-2
    for shape in ((3, 23), (1, 2), (5, 64)):
        batch = batch_of(*shape, names)
        with torch.inference_mode():
            expected = model(**{key: torch.from_numpy(value) for key, value in batch.items()})
        for output, found in zip(outputs, session.run(outputs, batch), strict=True):
            wanted = expected[output].numpy()
            if kind == "qa":
                wanted, found = (values[batch["attention_mask"] == 1] for values in (wanted, found))
            assert np.ptp(wanted) > 10 * tolerance  # a constant would pass the next line otherwise
            np.testing.assert_allclose(found, wanted, atol=tolerance)


@pytest.mark.parametrize("name", ["bert", "bert-qa", "roberta", "electra", "albert"])
def test_an_int8_export_computes_nearly_what_pytorch_computes(name: str, tmp_path: Path) -> None:
    model, kind = make_model(name), "qa" if name.endswith("-qa") else "classify"
    export(model, make_tokenizer(), factorize(model), tmp_path / "out", config_entry=entry(kind), storage="int8")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    precisions = [v.s for n in graph.node if n.op_type == "Attention" for v in n.attribute if v.name == "precision"]
    assert precisions == [b"bfloat16"] * 2
    session = open_session(tmp_path / "out" / "model.onnx", threads=1)
    batch = batch_of(5, 64, [node.name for node in session.get_inputs()])
    with torch.inference_mode():
        expected = model(**{key: torch.from_numpy(value) for key, value in batch.items()})
    for node, found in zip(session.get_outputs(), session.run(None, batch), strict=True):
        wanted = expected[node.name].numpy()
        if kind == "qa":
            wanted, found = (values[batch["attention_mask"] == 1] for values in (wanted, found))
        assert np.abs(found - wanted).max() < 0.1 * wanted.std()


@pytest.mark.parametrize(
    "name", ["bert", "bert-relu", "bert-qa", "distilbert", "roberta", "electra", "albert", "albert-groups"]
)
def test_low_rank_chains_leave_every_other_operator_as_it_is(name: str, tmp_path: Path) -> None:
    """Two MatMuls for each one, in standard operators alone; export itself holds them against PyTorch."""
    model, method = make_model(name), SVD(2.0)
    plan = method.plan(model)
    factors = method.factorize(model, plan, None)  # type: ignore[arg-type] - it looks at no data
    method.attach(model, plan, factors, "ft-f-ft")
    kind = "qa" if name.endswith("-qa") else "classify"
    counts = []
    for folder, chains in (("chains", {factor.member: factor for factor in factors}), ("dense", None)):
        sizes = export(
            materialize(model),
            make_tokenizer(),
            chains,
            tmp_path / folder,
            config_entry=entry(kind, "svd"),
            storage="float32",
        )
        counts.append(Counter(node.op_type for node in onnx.load(tmp_path / folder / "model.onnx").graph.node))
        assert sizes["compression_ratio"] == (pytest.approx(2.0645, abs=1e-4) if chains else 1.0)
    assert counts[0] - counts[1] == Counter({"MatMul": 12})
    assert counts[1] - counts[0] == Counter()
    assert counts[0]["MultiHeadAttention"] == 2
    assert (tmp_path / "chains" / "model.onnx").stat().st_size < (tmp_path / "dense" / "model.onnx").stat().st_size


@pytest.mark.parametrize(("name", "times"), [("albert", 1), ("albert-groups", 2)])
def test_layers_that_share_their_weights_are_stored_once(name: str, times: int, tmp_path: Path) -> None:
    """Two calls of one layer: nodes for each, one set of factors (as for two groups of one call each: two)."""
    model = make_model(name)
    factors = factorize(model)
    assert len(factors) == 4 * times
    chains = SVD(2.0).factorize(model, SVD(2.0).plan(model), None)  # type: ignore[arg-type] - it looks at no data
    for variant, given in (("dsformer", factors), ("svd", {each.member: each for each in chains})):
        if variant == "svd":
            method = SVD(2.0)
            method.attach(model, method.plan(model), chains, "ft-f-ft")
            materialize(model)
        entry_of = entry(variant=variant)
        sizes = export(model, make_tokenizer(), given, tmp_path / variant, config_entry=entry_of, storage="float32")
        assert sizes["factorized_float32_bytes"] == 4 * times * (4 * 32 * 32 + 2 * 32 * 64)
        graph = onnx.load(tmp_path / variant / "model.onnx").graph
        parts = [tensor.name for tensor in graph.initializer if ".attention." in tensor.name or ".ffn" in tensor.name]
        stored = [part for part in parts if part.endswith((".dictionary", ".first"))]
        assert len(stored) == len(given)
        for part in stored:
            readers = [node for node in graph.node if part in node.input]
            assert len(readers) == 2 // times
            assert len({node.name for node in readers}) == len(readers)


def test_members_that_are_not_called_together_are_refused() -> None:
    model = make_model("albert")
    model.set_attn_implementation("eager")
    batch = {key: torch.from_numpy(value) for key, value in batch_of(2, 8, ["input_ids", "attention_mask"]).items()}
    traced = trace(model, batch, {"logits": {0: "batch"}})
    graph = fuse(traced, n_layers=2, n_heads=4, hidden_size=32, gelu=True)
    (factors, *_) = factorize(model).values()
    matmul = next(node for node in graph.graph.node if node.name.endswith("/key_1/MatMul"))
    graph.graph.node.remove(matmul)
    with pytest.raises(ExportError, match=r"query\+key\+value: its members are not called equally often"):
        put_factors(graph, [factors], "float32")


def test_attention_that_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.graph.MAX_HEAD_WIDTH", 4)
    model = make_model("bert")
    export(model, make_tokenizer(), factorize(model), tmp_path / "out", config_entry=entry(), storage="float32")
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    assert (counts["DSLinear"], counts["MultiHeadAttention"], counts["Attention"]) == (8, 2, 0)
    assert counts["Split"] >= 2


@pytest.mark.parametrize("storage", ["int16", "int8"])
def test_integers_are_for_factorized_weights(storage: Any, tmp_path: Path) -> None:
    model = make_model("bert")
    for factors, precision in ((factorize(model), storage), (None, "float16")):
        export(model, make_tokenizer(), factors, tmp_path / "out", config_entry=entry(), storage=storage)
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["dsformer"]["precision"] == precision
        graph = onnx.load(tmp_path / "out" / "model.onnx").graph
        types = {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in graph.initializer}
        integers = ("dictionary", "values", *(["position_embeddings.weight"] if storage == "int8" else []))
        assert all((types[name] == np.dtype(storage)) == name.endswith(integers) for name in types)


def test_float16_halves_the_file_and_stays_float16_in_memory(tmp_path: Path) -> None:
    # Sizes at which the weights outweigh the graph.
    model = BertForSequenceClassification(make_config(vocab_size=4000, hidden_size=64, intermediate_size=256)).eval()
    factors = factorize(model)
    sizes = {
        storage: export(model, make_tokenizer(), factors, tmp_path / storage, config_entry=entry(), storage=storage)
        for storage in ("float32", "float16")
    }
    assert sizes["float16"]["file_bytes"] < 0.53 * sizes["float32"]["file_bytes"]
    graph = onnx.load(tmp_path / "float16" / "model.onnx").graph
    types = {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in graph.initializer}
    embeddings = next(name for name in types if "word_embeddings" in name)
    assert types[embeddings] == np.float16
    (gather,) = [node for node in graph.node if embeddings in node.input]
    assert gather.op_type == "Gather"  # looked up as float16, a row at a time cast
    assert all(types[name] == np.float32 for name in types if "LayerNorm" in name or name.endswith("bias"))


def test_int8_embeddings_stay_int8_in_memory(tmp_path: Path) -> None:
    """Rows within half a step of the model's; no table becomes float32 when a session is made."""
    model = BertForSequenceClassification(make_config(vocab_size=4000)).eval()
    table = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        table[7] *= 1000
    out = tmp_path / "out"
    export(model, make_tokenizer(), None, out, config_entry=entry(), storage="float16", embeddings="int8")
    assert json.loads((out / "config.json").read_text())["dsformer"]["embeddings"] == "int8"
    graph = onnx.load(out / "model.onnx").graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (name,) = [name for name in held if name.endswith("word_embeddings.weight")]
    scales = held[f"{name}.scales"]
    assert (held[name].dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (4000, 1))
    difference = np.abs(held[name] * scales - table.detach().numpy())
    assert (difference <= 0.5001 * scales).all()
    assert scales[0] == 0  # of padding
    assert np.abs(held[name]).max(axis=1).tolist() == [0] + [127] * 3999

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx").graph.initializer
    assert [tensor.data_type for tensor in loaded if 4000 in tensor.dims and 32 in tensor.dims] == [TensorProto.INT8]


@pytest.mark.parametrize("embeddings", ["int8", "float16", "float32"])
@pytest.mark.parametrize("storage", ["int8", "float32"])
def test_embeddings_have_a_storage_of_their_own(storage: Any, embeddings: Any, tmp_path: Path) -> None:
    """The file holds its weights and little else, and each weight takes the bytes of its storage."""
    config = make_config(vocab_size=4000, hidden_size=64, intermediate_size=256)
    model = BertForSequenceClassification(config).eval()
    sizes = export(
        model,
        make_tokenizer(),
        factorize(model),
        tmp_path / "out",
        config_entry=entry(),
        storage=storage,
        embeddings=embeddings,
    )
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tables = {name: tensor.nbytes for name, tensor in held.items() if "_embeddings.weight" in name}
    number = {"int8": 1, "float16": 2, "float32": 4}[embeddings]
    small = 4 * 2 * 64  # of the token types
    assert sum(tables.values()) == (4000 + 128) * (number * 64 + (4 if embeddings == "int8" else 0)) + small
    own = sum(t.nbytes for name, t in held.items() if name.endswith(("dictionary", "indices", "values", ".scales")))
    assert sizes["factorized_bytes"] == own - sum(tables[name] for name in tables if name.endswith(".scales"))
    assert sizes["file_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert 0 < sizes["file_bytes"] - sum(tensor.nbytes for tensor in held.values()) < 30_000


@pytest.mark.parametrize("storage", ["float16", "int16", "int8"])
def test_sizes(storage: Any, tmp_path: Path) -> None:
    model = make_model("bert")
    factors = factorize(model)
    sizes = export(model, make_tokenizer(), factors, tmp_path / "out", config_entry=entry(), storage=storage)
    n_blocks = sum(len(factor.dictionary) for factor in factors.values())
    codes = sum(factor.values.size for factor in factors.values())
    scales = 4 * sum(factor.out_features for factor in factors.values()) if storage[:3] == "int" else 0
    number = 1 if storage == "int8" else 2
    assert sizes["factorized_bytes"] == number * n_blocks * K * B + (number + 1) * codes + scales
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert sizes["factorized_float32_bytes"] == 4 * weights
    # Eq. 11 by its meaning: 32 bits a dictionary entry and a value, log2(K) an index.
    bits = 32 * n_blocks * K * B + (32 + np.log2(K)) * codes
    assert sizes["compression_ratio"] == pytest.approx(32 * weights / bits, abs=1e-4)
    assert sizes["file_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert export_sizes([], "float16", 7) == {
        "compression_ratio": 1.0,
        "factorized_bytes": 0,
        "factorized_float32_bytes": 0,
        "file_bytes": 7,
    }


def test_the_folder_describes_itself(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    tokenizer(["good", "bad film"], truncation=True, max_length=3, padding="max_length")  # leaves its settings behind
    card = {"seed": 5}
    out = tmp_path / "out"
    sizes = export(make_model("bert"), tokenizer, None, out, config_entry=entry(), storage="float32", card=card)
    assert sorted(path.name for path in out.iterdir()) == [
        "card.json",
        "config.json",
        "golden.json",
        "model.onnx",
        "tokenizer.json",
    ]
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "angry", "1": "calm", "2": "happy"}
    assert config["label2id"] == LABELS["label2id"]
    assert config["max_position_embeddings"] == 128
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["dsformer"] == {
        **entry(),
        "precision": "float32",
        "embeddings": "float32",
        "format_version": 1,
        "sha256": hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest(),
    }
    assert json.loads((out / "card.json").read_text()) == {"seed": 5, "sizes": sizes}


def test_roberta_sets_positions_aside() -> None:
    assert usable_positions(make_model("roberta")) == 64
    assert usable_positions(make_model("bert")) == 128


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_model("bert").train()
    before = copy.deepcopy(model.state_dict())
    export(model, make_tokenizer(), None, tmp_path / "out", config_entry=entry(), storage="float16")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "distance"),
    [("float32", "up to"), ("int16", "up to"), ("int8", "a root mean square of")],
)
def test_a_wrong_export_is_refused_and_the_old_folder_stays(storage: Storage, distance: str, tmp_path: Path) -> None:
    model = make_model("bert")
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # logits of a trained model's size
    factors = factorize(model)
    export(model, make_tokenizer(), factors, tmp_path / "out", config_entry=entry(), storage=storage)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    name = "bert.encoder.layer.1.output.dense"
    factors[name] = replace(factors[name], values=factors[name].values[:, ::-1])
    with pytest.raises(ExportError, match=f"logits differ from PyTorch's by {distance}"):
        export(model, make_tokenizer(), factors, tmp_path / "out", config_entry=entry(), storage=storage)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def traced() -> Any:
    model = make_model("bert")
    model.set_attn_implementation("eager")
    batch = {key: torch.from_numpy(value) for key, value in batch_of(2, 8, ["input_ids", "attention_mask"]).items()}
    return trace(model, batch, {"logits": {0: "batch"}})


def test_layers_that_were_not_fused_are_noticed(traced: Any) -> None:
    with pytest.raises(ExportError, match=r"made 2 MultiHeadAttention nodes of 3 layers, expected 3"):
        fuse(traced, n_layers=3, n_heads=4, hidden_size=32, gelu=True)


FFN1 = "bert.encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    ("change", "storage", "message"),
    [
        ({"members": ("bert.nowhere",)}, "float16", "no MatMul for the layer bert.nowhere"),
        (
            {"members": ("bert.encoder.layer.0.output.dense",)},
            "float16",
            "factors are of a 64 × 32 matrix, but the layer is 32 × 64",
        ),
        ({"members": (FFN1, FFN1.replace("0", "1"))}, "float16", "do not share one input"),
        ({"values": 1e6}, "float16", "beyond float16: export with float32"),
        ({"values": np.nan}, "float32", "not finite"),
        ({"values": np.inf}, "int16", "not finite"),
    ],
)
def test_factors_that_do_not_fit_are_refused(traced: Any, change: dict[str, Any], storage: Any, message: str) -> None:
    factors = factorize(make_model("bert"))[FFN1]
    if "values" in change:
        change = {"values": factors.values * change["values"]}
    graph = fuse(traced, n_layers=2, n_heads=4, hidden_size=32, gelu=True)
    with pytest.raises(ExportError, match=message):
        put_factors(graph, [replace(factors, **change)], storage)


def test_chains_that_do_not_fit_are_refused(traced: Any) -> None:
    graph = fuse(traced, n_layers=2, n_heads=4, hidden_size=32, gelu=True)
    first = np.ones((32, 4), dtype=np.float32)
    with pytest.raises(ExportError, match=r"no MatMul for the layer bert\.nowhere"):
        put_chains(graph, {"bert.nowhere": {"first": first}})
    with pytest.raises(ExportError, match=r"dense\.first holds values that are not finite"):
        put_chains(graph, {FFN1: {"first": first * np.nan}})


def test_factors_that_contradict_themselves_are_refused() -> None:
    factors = factorize(make_model("bert"))[FFN1]
    with pytest.raises(ExportError, match=r"outside of its dictionary of 20 atoms"):
        replace(factors, indices=factors.indices + 1)
    with pytest.raises(ExportError, match="do not fit"):
        replace(factors, values=factors.values[:1])


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    gpt = GPT2ForSequenceClassification(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, pad_token_id=0))
    with pytest.raises(ExportError, match="only the BERT family can be exported"):
        export(gpt, make_tokenizer(), None, tmp_path / "out", config_entry=entry(), storage="float32")
    assert not (tmp_path / "out").exists()


# --- measuring ----------------------------------------------------------------------------------------------


def test_a_folder_measures_like_its_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    task = replace(find_task("classify"), label_names=("angry", "calm", "happy"))
    model, tokenizer = make_model("bert"), bert_tokenizer()
    factors = factorize(model)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 40))) for _ in range(50)]
    examples = [ClassifyExample(text, None, int(random.integers(3))) for text in texts]
    export(model, tokenizer, factors, tmp_path / "out", config_entry=entry(variant="dsformer"), storage="float32")
    model.train()
    expected = evaluate_model(model, tokenizer, task, examples)
    assert model.training
    assert 0 < expected["accuracy"] < 100
    assert evaluate_folder(tmp_path / "out", task, examples, batch_size=7, threads=1) == expected


def test_a_question_answering_folder_measures_like_its_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    model, tokenizer = make_model("bert-qa"), bert_tokenizer()
    examples = []
    for number in range(12):
        words = list(random.choice(WORDS, random.integers(20, 200)))  # the longest need several windows
        start = len(" ".join(words[:10])) + 1
        examples.append(QAExample(str(number), "who won", " ".join(words), ((start, words[10]),)))
    export(model, tokenizer, None, tmp_path / "out", config_entry=entry("qa"), storage="float32")
    expected = evaluate_model(model, tokenizer, find_task("squad"), examples)
    assert expected["f1"] > 0
    assert evaluate_folder(tmp_path / "out", find_task("squad"), examples, threads=1) == expected


def test_the_stored_answers_are_those_of_the_scalar_tier(tmp_path: Path) -> None:
    model = make_model("bert")
    out = tmp_path / "out"
    export(model, make_tokenizer(), factorize(model), out, config_entry=entry(variant="dsformer"), storage="int8")
    before = (out / "golden.json").read_text()
    stored = json.loads(before)
    assert stored["reference"].startswith("tier scalar")
    assert stored["sha256"]["model.onnx"] == json.loads((out / "config.json").read_text())["dsformer"]["sha256"]
    session = open_session(out / "model.onnx")  # of whatever tier this processor has
    for row in stored["rows"]:
        ids = np.array([row["input_ids"]], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        known = {node.name for node in session.get_inputs()}
        (logits,) = session.run(["logits"], {name: value for name, value in feed.items() if name in known})
        np.testing.assert_allclose(logits[0], row["logits"], atol=stored["tolerance"])
    done = subprocess.run([sys.executable, "-m", "compressor.golden", str(out)], check=False)
    assert done.returncode == 0
    assert (out / "golden.json").read_text() == before
