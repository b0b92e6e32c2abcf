"""Write the model folder that the service loads, and prove that it computes what the PyTorch model computes.

The folder holds `model.onnx`, `tokenizer.json`, `config.json`, `golden.json` and `card.json`, and appears in one step:
a full disk or a kill leaves the old one as it was. The steps inside the graph are in `compressor.graph`.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
import torch
from numpy.typing import NDArray

from compressor import golden
from compressor.data import ClassifyExample, Example, QAExample, Tokenizer
from compressor.factors import WeightFactors, ratio
from compressor.files import replaced_folder
from compressor.graph import (
    TO_INTEGERS,
    EmbeddingStorage,
    ExportError,
    Factors,
    ModelProto,
    Storage,
    embeddings_of,
    fuse,
    store_float16,
    store_int8_embeddings,
    tidy,
    trace,
)
from compressor.session import open_session

__all__ = ["EmbeddingStorage", "ExportError", "Factors", "Storage", "export"]

FORMAT_VERSION = 1

# Largest allowed difference of a logit from PyTorch's. Float32 differs by the order of its sums; other storage rounds
# weights, and some tiers round tokens and products too: its bound is a share of the largest logit, if that exceeds 1.
# 8 bits are noise, of which one logit in a few hundred may get much: there it is the root mean square of both.
_BOUNDS = {"float32": 1e-3, "float16": 1e-2, "int16": 1e-2, "int8": 1e-1}

_OUTPUT_AXES = {
    "classify": {"logits": {0: "batch"}},
    "qa": {
        "start_logits": {0: "batch", 1: "sequence"},
        "end_logits": {0: "batch", 1: "sequence"},
    },
}

# What config.json keeps of the model's own configuration: what describes the model, not where it came from.
_CONFIG_KEYS = (
    "model_type",
    "problem_type",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "type_vocab_size",
    "vocab_size",
    "pad_token_id",
)

_CHECK_EXAMPLES: dict[str, list[Example]] = {
    "classify": [ClassifyExample(text, None, 0) for text in golden.SENTENCES],
    "qa": [QAExample(str(i), golden.QUESTION, text) for i, text in enumerate(golden.SENTENCES)],
}


def export(
    model: Any,
    tokenizer: Tokenizer,
    factors: Mapping[str, WeightFactors] | None,
    output: Path,
    *,
    config_entry: Mapping[str, Any],
    storage: Storage = "int8",
    embeddings: EmbeddingStorage | None = None,
    check_texts: Sequence[Example] = (),
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the model folder `output` and return its sizes (see `sizes`).

    model: a transformers model for sequence classification or question answering of the BERT family, its
    weights dense, those of compressed layers multiplied out; it is not changed. factors: by their first member, of
    any method. config_entry: the "dsformer" entry of config.json without precision, embeddings, format_version and
    sha256, which are added; its `task` says classify or qa. embeddings: how their tables are stored, if not as
    `embeddings_of` has it. check_texts: examples on which the folder is compared with the model (a few built-in
    sentences by default). card: written as card.json, with the sizes as its "sizes".
    Raises `ExportError`, or `SaveError` where the folder cannot be written.
    """
    kind = config_entry["task"]
    matrices = list((factors or {}).values())
    custom_ops = any(factor.custom_op for factor in matrices)
    model = copy.deepcopy(model).cpu().float().eval()
    model.set_attn_implementation("eager")  # the form of attention that the optimizer recognizes
    examples = list(check_texts) or _CHECK_EXAMPLES[kind]
    embeddings = embeddings or embeddings_of(storage)
    limit = usable_positions(model)
    batch = _encode(tokenizer, _input_names(model, tokenizer), examples, limit)

    graph = _build_graph(model, batch, kind, matrices, storage, embeddings)
    content = graph.SerializeToString()
    entry = {
        **config_entry,
        "precision": storage if custom_ops or storage not in TO_INTEGERS else "float16",
        "embeddings": embeddings,
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    measured = sizes(matrices, storage, len(content))
    with replaced_folder(output) as folder:
        (folder / "model.onnx").write_bytes(content)
        _save_tokenizer(tokenizer, folder / "tokenizer.json")
        _save_json(folder / "config.json", {**_config(model, kind, limit), "dsformer": entry})
        _save_json(folder / "card.json", {**(card or {}), "sizes": measured})
        _check_tokenizer(folder, batch, examples, limit)
        _check_outputs(folder, model, batch, kind, (storage, embeddings), custom_ops)
        golden.write(folder)
    return measured


def sizes(factors: Sequence[WeightFactors], storage: Storage, file_bytes: int) -> dict[str, Any]:
    """The three sizes of a compressed model, and what the factorized matrices take as dense float32.

    compression_ratio: by the paper's eq. 11 over the factorized matrices, averaged by parameters; 1 without any.
    factorized_bytes: of the same matrices as stored, indices included. file_bytes: of model.onnx.
    """
    return {
        "compression_ratio": round(ratio(factors), 4),
        "factorized_bytes": sum(tensor.nbytes for factor in factors for tensor in factor.stored(storage).values()),
        "factorized_float32_bytes": sum(4 * factor.n_weights for factor in factors),
        "file_bytes": file_bytes,
    }


def usable_positions(model: Any) -> int:
    """How many tokens the model takes: its position embeddings, less those that RoBERTa sets aside."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    raise ExportError(
        f"{type(model).__name__} has no learned position embeddings: only the BERT family can be exported."
    )


def _build_graph(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    kind: str,
    factors: Sequence[WeightFactors],
    storage: Storage,
    embeddings: EmbeddingStorage,
) -> ModelProto:
    config = model.config
    try:
        traced = trace(model, batch, _OUTPUT_AXES[kind])
    except (RuntimeError, ValueError, TypeError, KeyError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(f"PyTorch cannot export {type(model).__name__} to ONNX: {error}") from error
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", "")
    graph = fuse(
        traced,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        gelu=activation == "gelu",
    )
    for form in dict.fromkeys(type(factor) for factor in factors):
        form.put(graph, [factor for factor in factors if type(factor) is form], storage)
    if embeddings == "int8":
        store_int8_embeddings(graph)
    if storage != "float32" or embeddings == "float16":
        store_float16(graph, matrices=storage != "float32", embeddings=embeddings == "float16")
    tidy(graph)
    onnx.checker.check_model(graph)
    return graph


def _input_names(model: Any, tokenizer: Tokenizer) -> list[str]:
    """The graph's inputs: what the tokenizer makes and the model tells apart."""
    accepted = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 0) < 2:  # RoBERTa takes token types, but knows only one
        accepted.discard("token_type_ids")
    return [
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in tokenizer.model_input_names and name in accepted
    ]


def _pair(example: Example) -> tuple[str, str | None]:
    if isinstance(example, QAExample):
        return example.question, example.context
    return example.text, example.text_pair


def _encode(
    tokenizer: Tokenizer, names: Sequence[str], examples: Sequence[Example], limit: int
) -> dict[str, torch.Tensor]:
    """The examples as one padded batch (examples, longest) int64."""
    texts, pairs = zip(*map(_pair, examples), strict=True)
    encoded = tokenizer(
        list(texts),
        None if None in pairs else list(pairs),
        truncation=True,
        max_length=limit,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return {name: encoded[name] for name in names}


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """The whole tokenizer without settings of the last call: truncation and padding are the reader's."""
    plain = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.save(str(path))


def _save_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(model: Any, kind: str, limit: int) -> dict[str, Any]:
    own = {name: getattr(model.config, name, None) for name in _CONFIG_KEYS}
    config = {name: value for name, value in own.items() if value is not None}
    config["architectures"] = [type(model).__name__]
    config["max_position_embeddings"] = limit
    if kind == "classify":
        labels = {int(number): name for number, name in model.config.id2label.items()}
        config["id2label"] = {str(number): name for number, name in sorted(labels.items())}
        config["label2id"] = {name: number for number, name in sorted(labels.items())}
    return config


def _check_tokenizer(folder: Path, batch: Mapping[str, torch.Tensor], examples: Sequence[Example], limit: int) -> None:
    """The saved tokenizer.json gives the very tokens of the tokenizer that the model was trained with."""
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(limit)
    pairs = [_pair(example) for example in examples]
    encodings = saved.encode_batch([text if pair is None else (text, pair) for text, pair in pairs])
    for row, encoding in enumerate(encodings):
        expected = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        if encoding.ids != expected:
            raise ExportError(f"tokenizer.json splits {pairs[row][0]!r} otherwise than the model's tokenizer.")


def _check_outputs(
    folder: Path, model: Any, batch: Mapping[str, torch.Tensor], kind: str, storages: Sequence[str], custom_ops: bool
) -> None:
    """ONNX Runtime against PyTorch: the padded batch, and its shortest row alone."""
    session = open_session(folder / "model.onnx", custom_ops=custom_ops)
    lengths = batch["attention_mask"].sum(dim=1)
    row = int(lengths.argmin())
    alone = {name: tensor[row : row + 1, : lengths[row]] for name, tensor in batch.items()}
    for inputs in (batch, alone):
        with torch.inference_mode():
            result = model(**inputs)
        mask = inputs["attention_mask"].bool().numpy()
        found = session.run(list(_OUTPUT_AXES[kind]), {name: x.numpy() for name, x in inputs.items()})
        for name, values in zip(_OUTPUT_AXES[kind], found, strict=True):
            expected = result[name].numpy()
            if kind == "qa":  # what stands at padding is never read
                expected, values = expected[mask], values[mask]
            _compare(name, expected, values, storages)


def _compare(name: str, expected: NDArray[Any], found: NDArray[Any], storages: Sequence[str]) -> None:
    """storages: of factors and of embeddings; the coarser one bounds the difference."""
    storage = max(storages, key=lambda each: _BOUNDS[each])
    kind, size = ("a root mean square of", _root_mean_square) if storage == "int8" else ("up to", _largest)
    difference = size(expected - found)
    bound = _BOUNDS[storage] * (1.0 if storage == "float32" else max(1.0, size(expected)))
    if not difference < bound:  # also true of NaN
        raise ExportError(
            f"The exported model's {name} differ from PyTorch's by {kind} {difference:.2g}, "
            f"more than the {bound:.2g} allowed with {storage} storage."
        )


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values).max())


def _root_mean_square(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
