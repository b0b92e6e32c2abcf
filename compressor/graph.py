"""From a PyTorch model to the ONNX graph that is served, in four steps whose order matters.

1. `trace`: PyTorch's graph, in standard operators.
2. `fuse`: ONNX Runtime's optimizer finds attention, skip + layer norm and bias + GELU. Its patterns all look for
   MatMul, so this must come before the next step; Q, K and V stay MatMuls outside of the attention node.
3. `put_factors`: DSLinear in place of the MatMuls of factorized layers and of what follows them: bias, GELU, residual
   and layer norm. One for Q, K and V together, and our Attention after it.
4. `store_int8_embeddings`, `store_float16`: large tables and weights in fewer bytes, computed in float32 all the same.
"""

import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compressor.config import LayerPlan
from kernels.integers import to_int8, to_int16
from kernels.onnx_op import ATTENTION_OP_TYPE, DOMAIN, INPUT_NAMES, MAX_HEAD_WIDTH, OP_TYPE, SINCE_VERSION, index_dtype

# How weights lie in the file. int8 and int16: DSLinear's as integers, which are multiplied as they are; other large
# weights as float16.
Storage = Literal["float32", "float16", "int16", "int8"]
# The tables of embeddings; int8 has one scale a row.
EmbeddingStorage = Literal["float32", "float16", "int8"]
# onnx.ModelProto, .GraphProto and .NodeProto; onnx is not followed by the type checker.
ModelProto: TypeAlias = Any
GraphProto: TypeAlias = Any
NodeProto: TypeAlias = Any

# The newest opset that ONNX Runtime 1.17 and the optimizer's patterns both know well.
_OPSET = 17
# Scope of the traced model in node names: "/model/bert/encoder/.../MatMul".
_ROOT = "model"
# A constant without elements, for optional inputs of DSLinear that are left out before others.
_NOTHING = "dsformer.nothing"
# Smaller tensors (biases, layer norms, heads of few labels) stay float32: nothing to gain.
_LARGE = 2048


class ExportError(RuntimeError):
    """The model cannot be exported, or its export does not compute the same; the message says why."""


@dataclass(frozen=True)
class Factors:
    """One factorized matrix W (M, N), cut into N/B blocks of B columns.

    members: names of the nn.Linear modules whose weights are stacked in it, in row order: query, key and value,
    or a single one. dictionary (N/B, K, B) float32; indices (N/B, M, S) int, values (N/B, M, S) float32. metric
    (N/B, B, B) float32 or None: what the weights are coded in while they are trained. target (M, N) float32 or None:
    fresh factors are of these weights, which are trained in place of the layers' own. No graph has either.
    """

    custom_op: ClassVar[bool] = True

    members: tuple[str, ...]
    dictionary: NDArray[np.float32]
    indices: NDArray[np.integer]
    values: NDArray[np.float32]
    metric: NDArray[np.float32] | None = None
    target: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        blocks, atoms, _ = self.dictionary.shape
        if self.indices.shape != self.values.shape or len(self.indices) != blocks:
            raise ExportError(
                f"{self.name}: indices {self.indices.shape} and values {self.values.shape} do not fit "
                f"{blocks} dictionaries."
            )
        if self.indices.min() < 0 or self.indices.max() >= atoms:
            raise ExportError(f"{self.name}: an index lies outside of its dictionary of {atoms} atoms.")

    @property
    def name(self) -> str:
        """The members' common path, then what differs: `layer.0.attention.self.query+key+value`."""
        first, *others = self.members
        return "+".join([first, *(other.rpartition(".")[2] for other in others)])

    @property
    def out_features(self) -> int:
        """M"""
        return int(self.indices.shape[1])

    @property
    def in_features(self) -> int:
        """N"""
        return int(self.dictionary.shape[0] * self.dictionary.shape[2])

    @property
    def n_weights(self) -> int:
        """M·N"""
        return self.out_features * self.in_features

    @property
    def bits(self) -> float:
        """By eq. 11: float32 numbers, and indices at their information content."""
        _, n_atoms, block_size = self.dictionary.shape
        plan = LayerPlan(self.out_features, self.in_features, block_size, n_atoms, self.indices.shape[2])
        return plan.bits

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint keeps; indices as small as PyTorch knows them all."""
        others = {"metric": self.metric, "target": self.target}
        n_atoms = self.dictionary.shape[1]
        return {
            "dictionary": self.dictionary,
            "indices": self.indices.astype(np.uint8 if n_atoms <= 256 else np.int16 if n_atoms <= 32768 else np.int32),
            "values": self.values,
            **{name: array for name, array in others.items() if array is not None},
        }

    @classmethod
    def from_tensors(cls, members: Sequence[str], tensors: Mapping[str, NDArray[Any]]) -> "Factors":
        parts = (tensors.get(name) for name in ("dictionary", "indices", "values", "metric", "target"))
        return cls(tuple(members), *parts)  # type: ignore[arg-type]

    def dense(self) -> NDArray[np.float32]:
        """S·D (M, N)"""
        codes = np.zeros((*self.indices.shape[:2], self.dictionary.shape[1]), dtype=np.float32)
        np.put_along_axis(codes, self.indices.astype(np.int64), self.values, axis=2)
        return np.concatenate(codes @ self.dictionary, axis=1)

    @staticmethod
    def put(model: ModelProto, factors: Sequence["Factors"], storage: Storage) -> None:
        put_factors(model, factors, storage)

    def stored(self, storage: Storage) -> dict[str, NDArray[Any]]:
        """The tensors as DSLinear takes them, by the names of its inputs."""
        indices = self.indices.astype(index_dtype(self.dictionary.shape[1]))
        if storage in TO_INTEGERS:
            for name, tensor in (("dictionary", self.dictionary), ("values", self.values)):
                _require_finite(f"{self.name}.{name}", tensor)
            dictionary, values, scales = TO_INTEGERS[storage](self.dictionary, self.indices, self.values)
            return {"dictionary": dictionary, "indices": indices, "values": values, "scales": scales}
        return {
            "dictionary": _as_float(f"{self.name}.dictionary", self.dictionary, storage),
            "indices": indices,
            "values": _as_float(f"{self.name}.values", self.values, storage),
        }


TO_INTEGERS: dict[str, Callable[..., tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]] = {
    "int16": to_int16,
    "int8": to_int8,
}


def _as_float(name: str, tensor: NDArray[Any], storage: Storage) -> NDArray[Any]:
    _require_finite(name, tensor)
    largest = np.abs(tensor).max()
    if storage == "float16" and largest > np.finfo(np.float16).max:
        raise ExportError(f"{name} reaches {largest:.3g}, beyond float16: export with float32 storage.")
    return np.ascontiguousarray(tensor, dtype=storage)


def _require_finite(name: str, tensor: NDArray[Any]) -> None:
    if not np.isfinite(tensor).all():
        raise ExportError(f"{name} holds values that are not finite.")


# --- 1. trace -----------------------------------------------------------------------------------------------


class _Outputs(torch.nn.Module):
    """The model with tensors in, tensors out, by position."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.add_module(_ROOT, model)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.get_submodule(_ROOT)(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(result[name] for name in self.outputs)


def trace(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], output_axes: Mapping[str, Mapping[int, str]]
) -> ModelProto:
    """The model's graph with free batch and sequence sizes; inputs are an example batch (batch, sequence)."""
    input_axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing a transformers model warns about each of its Python branches
        path = str(Path(folder) / "traced.onnx")
        torch.onnx.export(
            _Outputs(model, list(inputs), list(output_axes)).eval(),
            tuple(inputs.values()),
            path,
            # The optimizer's patterns were written for the graphs of this exporter, and need what it names.
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=list(output_axes),
            dynamic_axes={**input_axes, **{name: dict(axes) for name, axes in output_axes.items()}},
        )
        return onnx.load(path)


# --- 2. fuse ------------------------------------------------------------------------------------------------


def fuse(model: ModelProto, n_layers: int, n_heads: int, hidden_size: int, gelu: bool) -> ModelProto:
    """The graph with ONNX Runtime's fused operators; `ExportError` if a layer was not recognized."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_multi_head_attention = True  # the Attention node would swallow the weights of Q, K and V
    options.enable_embed_layer_norm = False  # it needs float32 embeddings; ours are stored as float16
    options.use_raw_attention_mask(True)  # as 0 and 1 per token, which holds for padding on either side
    _put_branches_first(model.graph)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "traced.onnx")
        onnx.save(model, path)
        optimized = optimize_model(
            path,
            model_type="bert",
            num_heads=n_heads,
            hidden_size=hidden_size,
            optimization_options=options,
            opt_level=0,  # the Python fusions only: the session applies the rest when it loads the model
        )
        optimized.save_model_to_file(path)  # sorts the nodes and declares their domains, too
        fused = onnx.load(path)
    counts = Counter(node.op_type for node in fused.graph.node)
    found = {
        "MultiHeadAttention": (counts["MultiHeadAttention"], n_layers),
        "SkipLayerNormalization": (counts["SkipLayerNormalization"], 2 * n_layers),
        "BiasGelu or Gelu": (counts["BiasGelu"] + counts["Gelu"], n_layers if gelu else 0),
    }
    for name, (count, wanted) in found.items():
        if count < wanted:
            raise ExportError(
                f"ONNX Runtime's optimizer made {count} {name} nodes of {n_layers} layers, expected {wanted}: "
                "this architecture, or this version of onnxruntime, torch or transformers, is not supported."
            )
    return fused


def _put_branches_first(graph: GraphProto) -> None:
    """Order, in place, what each Add sums by how many nodes read it.

    The patterns look for a layer behind the first Add that a residual connection sums. Where the stream itself comes
    out of an Add (ALBERT's first layer), that must be the branch, which nothing else reads.
    """
    consumers = _consumers(graph)
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Add" and made.issuperset(node.input):
            node.input[:] = sorted(node.input, key=lambda name: len(consumers[name]))


# --- 3. put factors -----------------------------------------------------------------------------------------


def put_factors(model: ModelProto, factors: Sequence[Factors], storage: Storage) -> None:
    """Replace, in place, the MatMuls of the factors' members by DSLinear nodes."""
    graph = model.graph
    calls = _calls(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    consumers = _consumers(graph)
    fresh: dict[str, list[NodeProto]] = {}  # by the name of the node whose place they take
    gone: set[str] = set()
    # Next to weights of 8 bits, more in attention would be wasted.
    precision = "bfloat16" if storage == "int8" else "float32"
    for factor in factors:
        inputs = {}
        for name, tensor in factor.stored(storage).items():
            inputs[name] = f"{factor.name}.{name}"
            graph.initializer.append(numpy_helper.from_array(tensor, inputs[name]))
        for number, members in enumerate(_calls_of(factor, calls)):
            sizes = _member_sizes(factor, members, weights)
            name = _call_name(factor.name, number)
            if len(members) == 1:
                nodes, absorbed = _single(name, factor.out_features, inputs, members[0], weights, consumers)
            else:
                nodes, absorbed = _stacked(graph, name, inputs, members, sizes, weights, consumers, precision)
            # Where the last one absorbed stood: what the epilogue reads has been computed by then.
            place = absorbed[-1] if absorbed else members[0]
            fresh[place.name] = nodes
            gone.update(node.name for node in [*members, *absorbed])
    graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.float32), _NOTHING))
    _replace_nodes(graph, fresh, gone)
    model.opset_import.append(helper.make_opsetid(DOMAIN, SINCE_VERSION))


def put_chains(model: ModelProto, chains: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> None:
    """Replace, in place, the MatMuls of each named layer by MatMuls with these matrices, one after another.

    chains: by module name, the matrices by theirs: (in_features, r), …, (r, out_features).
    """
    graph = model.graph
    calls = _calls(graph)
    fresh: dict[str, list[NodeProto]] = {}
    for layer, matrices in chains.items():
        for name, matrix in matrices.items():
            _require_finite(f"{layer}.{name}", matrix)
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"{layer}.{name}"))
        for number, matmul in enumerate(_member(calls, layer)):
            output = matmul.input[0]
            nodes = []
            for name in matrices:
                node = _call_name(f"{layer}.{name}", number)
                source, output = output, f"{node}.output"
                nodes.append(helper.make_node("MatMul", [source, f"{layer}.{name}"], [output], name=node))
            nodes[-1].output[0] = matmul.output[0]
            fresh[matmul.name] = nodes
    _replace_nodes(graph, fresh, set(fresh))


def _calls(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """The MatMuls of each module, in order: one, or more where layers share their weights (ALBERT).

    The exporter names them by the module, with a number for later calls: query, query_1, query_2.
    """
    calls: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        name = _module_name(node)
        first, _, number = name.rpartition("_")
        again = number.isdigit() and first in calls and calls[first][0].input[1] == node.input[1]
        calls.setdefault(first if again else name, []).append(node)
    return calls


def _calls_of(factor: Factors, calls: Mapping[str, Sequence[NodeProto]]) -> list[tuple[NodeProto, ...]]:
    """The MatMuls of all members, call by call."""
    members = [_member(calls, name) for name in factor.members]
    if len({len(nodes) for nodes in members}) > 1:
        raise ExportError(f"{factor.name}: its members are not called equally often.")
    return list(zip(*members, strict=True))


def _call_name(name: str, number: int) -> str:
    """A name for what a call adds to the graph; that of the first is the name itself."""
    return f"{name}_{number}" if number else name


def _module_name(node: NodeProto) -> str:
    """`/model/bert/encoder/layer.0/output/dense/MatMul` → `bert.encoder.layer.0.output.dense`."""
    path = node.name.removeprefix(f"/{_ROOT}/").removesuffix(f"/{node.op_type}")
    return str(path.replace("/", "."))


def _consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    consumers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    return consumers


def _member(calls: Mapping[str, Sequence[NodeProto]], name: str) -> Sequence[NodeProto]:
    if name not in calls:
        raise ExportError(f"The exported graph has no MatMul for the layer {name}.")
    return calls[name]


def _member_sizes(factor: Factors, members: Sequence[NodeProto], weights: Mapping[str, Any]) -> list[int]:
    """out_features of each member, once they and the shared input are known to fit the factors."""
    if len({node.input[0] for node in members}) > 1:
        raise ExportError(f"{factor.name}: its members do not share one input.")
    shapes = [tuple(weights[node.input[1]].dims) for node in members]  # (in_features, out_features)
    shape = (sum(out_features for _, out_features in shapes), shapes[0][0])
    if shape != (factor.out_features, factor.in_features):
        raise ExportError(
            f"{factor.name}: the factors are of a {factor.out_features} × {factor.in_features} matrix, "
            f"but the layer is {shape[0]} × {shape[1]}."
        )
    return [out_features for _, out_features in shapes]


def _ds_linear(name: str, inputs: Mapping[str, str], output: str, **attributes: Any) -> NodeProto:
    """inputs: names of tensors by the names of the op's inputs; those left out at the end are not written."""
    given = [inputs.get(each) or _NOTHING for each in INPUT_NAMES]
    while given[-1] == _NOTHING:
        given.pop()
    return helper.make_node(
        OP_TYPE,
        given,
        [output],
        name=name,
        domain=DOMAIN,
        row_group=1,
        **attributes,
    )


def _single(
    name: str,
    out_features: int,
    inputs: Mapping[str, str],
    matmul: NodeProto,
    weights: Mapping[str, Any],
    consumers: Mapping[str, Sequence[NodeProto]],
) -> tuple[list[NodeProto], list[NodeProto]]:
    """(new nodes, nodes absorbed beside the MatMul): what follows goes into the op's epilogue, be it a bias and a GELU,
    or a bias, a residual and a layer normalization.
    """
    names = {**inputs, "X": matmul.input[0]}
    output, attributes = matmul.output[0], {"activation": "none"}
    absorbed: list[NodeProto] = []
    while len(consumers[output]) == 1 and attributes["activation"] == "none" and "residual" not in names:
        (node,) = consumers[output]
        if node.op_type == "SkipLayerNormalization":
            epilogue = _norm_epilogue(node, output, weights)
            if not epilogue or ("bias" in names and "bias" in epilogue[0]):
                break
            names |= epilogue[0]
            attributes |= epilogue[1]
        elif node.op_type == "Gelu":
            attributes["activation"] = "gelu"
        else:
            bias = next((each for each in node.input if each in weights), "")
            fits = bias and tuple(weights[bias].dims) == (out_features,)
            if node.op_type not in ("BiasGelu", "Add") or not fits or "bias" in names:
                break
            names["bias"] = bias
            attributes["activation"] = "gelu" if node.op_type == "BiasGelu" else "none"
        absorbed.append(node)
        output = node.output[0]
    return [_ds_linear(name, names, output, **attributes)], absorbed


def _norm_epilogue(node: NodeProto, x: str, weights: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]] | None:
    """DSLinear's inputs and attributes that do what this SkipLayerNormalization does to x; None if none do."""
    skip = [name for name in node.input[:2] if name != x]
    parameters = dict(zip(("norm_weight", "norm_bias", "bias"), node.input[2:], strict=False))
    given = {name: source for name, source in parameters.items() if source}
    complete = len(skip) == 1 and "norm_bias" in given and all(source in weights for source in given.values())
    if not complete or any(node.output[1:]):
        return None
    epsilon = next((value.f for value in node.attribute if value.name == "epsilon"), 1e-5)
    return {**given, "residual": skip[0]}, {"norm_epsilon": epsilon}


def _stacked(
    graph: GraphProto,
    name: str,
    inputs: Mapping[str, str],
    members: Sequence[NodeProto],
    sizes: Sequence[int],
    weights: Mapping[str, Any],
    consumers: Mapping[str, Sequence[NodeProto]],
    precision: str,
) -> tuple[list[NodeProto], list[NodeProto]]:
    """(new nodes, nodes absorbed beside the MatMuls): one DSLinear for all members, then the Attention that takes them
    side by side; or a Split, where what follows is no attention of these three."""
    output = f"{name}.output"
    sources = {**inputs, "X": members[0].input[0]}
    outputs = [node.output[0] for node in members]
    attention = _attention(outputs, sizes, weights, consumers)
    if not attention:
        split = f"{name}.sizes"
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), split))
        divide = helper.make_node("Split", [output, split], outputs, name=f"{name}.split", axis=-1)
        return [_ds_linear(name, sources, output, activation="none"), divide], []
    given = dict(zip(("query", "key", "value", "bias", "mask"), attention.input, strict=False))
    mask = given.get("mask", "")
    n_heads = next(value.i for value in attention.attribute if value.name == "num_heads")
    return [
        _ds_linear(name, {**sources, "bias": given.get("bias", "")}, output, activation="none"),
        helper.make_node(
            ATTENTION_OP_TYPE,
            [output, mask] if mask else [output],
            list(attention.output),
            name=attention.name,
            domain=DOMAIN,
            num_heads=n_heads,
            precision=precision,
        ),
    ], [attention]


def _attention(
    outputs: Sequence[str],
    sizes: Sequence[int],
    weights: Mapping[str, Any],
    consumers: Mapping[str, Sequence[NodeProto]],
) -> NodeProto | None:
    """The node that does with queries, keys and values (their sizes) what our Attention does; None if none does."""
    users = [user for output in outputs for user in consumers[output]]
    if len(users) != 3 or any(user.op_type != "MultiHeadAttention" or user.name != users[0].name for user in users):
        return None
    (node, *_), hidden = users, sizes[0]
    attributes = {value.name: value for value in node.attribute}
    bias = node.input[3] if len(node.input) > 3 else ""
    alike = (
        list(node.input[:3]) == list(outputs)
        and len(set(sizes)) == 1
        and (not bias or (bias in weights and tuple(weights[bias].dims) == (sum(sizes),)))
        and not any(node.input[5:])  # additive biases, keys of earlier calls
        and not any(node.output[1:])
        and set(attributes) <= {"num_heads", "mask_filter_value"}
        and hidden // attributes["num_heads"].i <= MAX_HEAD_WIDTH
    )
    return node if alike else None


def _replace_nodes(graph: GraphProto, fresh: Mapping[str, Sequence[NodeProto]], gone: set[str]) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += fresh.get(node.name, [])
        if node.name not in gone:
            nodes.append(node)
    _set_nodes(graph, nodes)


def _set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    fresh = onnx.GraphProto(node=nodes)  # copies: clearing the old list frees its nodes
    del graph.node[:]
    graph.node.extend(fresh.node)


# --- 4. store -----------------------------------------------------------------------------------------------


def as_stored(name: str, tensor: NDArray[np.float32], storage: Storage) -> NDArray[Any]:
    """A MatMul's weight as `store_float16` leaves it."""
    return _as_float(name, tensor, "float32" if storage == "float32" or tensor.size < _LARGE else "float16")


def embeddings_of(storage: Storage) -> EmbeddingStorage:
    """How the tables of embeddings lie in a file with this storage, where nothing else is asked for."""
    return "float16" if storage == "int16" else storage


def store_int8_embeddings(model: ModelProto) -> None:
    """Store, in place, the large float32 tables of Gather as int8 with a float32 scale a row: row = scale · numbers.

    The largest number of a row is 127. Numbers and scales are looked up first, and what was found is multiplied: the
    tables stay as small in memory as in the file, for no session can compute that ahead of its tokens.
    """
    graph = model.graph
    consumers = _consumers(graph)
    after: dict[str, list[NodeProto]] = {}  # by the name of the Gather they follow
    scales = []
    for tensor in graph.initializer:
        users = consumers[tensor.name]
        if (
            not _is_large_float(tensor)
            or len(tensor.dims) != 2
            or not all(_looks_up(node, tensor.name) for node in users)
        ):
            continue
        table = numpy_helper.to_array(tensor)
        _require_finite(tensor.name, table)
        scale = (np.abs(table).max(axis=1, keepdims=True) / np.iinfo(np.int8).max).astype(np.float32)
        numbers = np.rint(table / np.where(scale > 0, scale, 1.0)).astype(np.int8)
        scales.append(numpy_helper.from_array(scale, f"{tensor.name}.scales"))
        for gather in users:
            after[gather.name] = _scaled(gather, f"{tensor.name}.scales")
        tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    graph.initializer.extend(scales)
    _insert_after(graph, after)


def _looks_up(node: NodeProto, table: str) -> bool:
    """Whether the node gathers rows of the table."""
    axis = next((value.i for value in node.attribute if value.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0


def _scaled(gather: NodeProto, scales: str) -> list[NodeProto]:
    """Nodes that make what `gather` finds float32 again; its output is renamed."""
    output = gather.output[0]
    numbers, found = f"{output}.int8", f"{output}.scale"
    gather.output[0] = numbers
    return [
        helper.make_node("Gather", [scales, gather.input[1]], [found], name=found, axis=0),
        _cast_to_float32(numbers, f"{output}.numbers"),
        helper.make_node("Mul", [f"{output}.numbers", found], [output], name=f"{output}.scaled"),
    ]


def store_float16(model: ModelProto, *, matrices: bool = True, embeddings: bool = True) -> None:
    """Store, in place, the large float32 weights of MatMul and Gemm (`matrices`) and Gather (`embeddings`) as float16.

    A Cast after each Gather keeps the embeddings float16 in memory too; a Cast of a MatMul's weight is computed
    once, when ONNX Runtime loads the model.
    """
    graph = model.graph
    consumers = _consumers(graph)
    casts: list[NodeProto] = []
    after: dict[str, list[NodeProto]] = {}  # Cast by the name of the Gather it follows
    for tensor in graph.initializer:
        users = consumers[tensor.name]
        kinds = {node.op_type for node in users}
        if not _is_large_float(tensor) or not users:
            continue
        name = tensor.name
        if kinds == {"Gather"} and embeddings:
            for gather in users:
                output = gather.output[0]
                gather.output[0] = f"{output}.float16"
                after[gather.name] = [_cast_to_float32(f"{output}.float16", output)]
        elif kinds <= {"MatMul", "Gemm"} and matrices:
            casts.append(_cast_to_float32(f"{name}.float16", name))
        else:
            continue
        half = _as_float(name, numpy_helper.to_array(tensor), "float16")
        tensor.CopyFrom(numpy_helper.from_array(half, name if kinds == {"Gather"} else f"{name}.float16"))
    _insert_after(graph, after)
    _set_nodes(graph, [*casts, *graph.node])


def _is_large_float(tensor: Any) -> bool:
    return bool(tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= _LARGE)


def _insert_after(graph: GraphProto, after: Mapping[str, Sequence[NodeProto]]) -> None:
    _set_nodes(graph, [each for node in graph.node for each in (node, *after.get(node.name, ()))])


def _cast_to_float32(source: str, target: str) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=onnx.TensorProto.FLOAT)


def tidy(model: ModelProto) -> None:
    """Drop, in place, what nothing reads, and notes of the exporter (they may name local files)."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):  # topological order: consumers come first this way
        if needed.intersection(node.output):
            needed.update(node.input)
            node.ClearField("doc_string")
            kept.append(node)
    _set_nodes(graph, kept[::-1])
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(weights) < len(graph.initializer):
        fresh = onnx.GraphProto(initializer=weights)  # copies, as in _set_nodes
        del graph.initializer[:]
        graph.initializer.extend(fresh.initializer)
    del graph.value_info[:]
    del model.metadata_props[:]
    graph.name, model.producer_name, model.producer_version = "dsformer", "dsformer", ""
