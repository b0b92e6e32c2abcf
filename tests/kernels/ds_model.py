"""ONNX models of one node, and sessions that run them."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kernels import library_path
from kernels.onnx_op import ATTENTION_OP_TYPE, DOMAIN, INPUT_NAMES, OP_TYPE, SINCE_VERSION

# Stands for optional inputs that are left out before others (FORMAT.md section 1).
NOTHING = "nothing"


def one_node_model(arrays: dict[str, np.ndarray], x_shape=None, inputs=("X",), **attributes) -> bytes:
    """A serialized model Y = DSLinear(X, arrays...); `inputs` are graph inputs, the other arrays initializers.

    A residual is always a graph input. An IR version that ONNX Runtime 1.17 reads.
    """
    dictionary = arrays["dictionary"]
    if x_shape is None:
        x_shape = ["batch", "sequence", dictionary.shape[0] * dictionary.shape[-1]]
    names = [name if name in inputs or name in arrays else NOTHING for name in INPUT_NAMES]
    while names[-1] == NOTHING:
        names.pop()
    arrays = {**arrays, NOTHING: np.zeros(0, np.float32)}
    node = helper.make_node(OP_TYPE, names, ["Y"], name="layer_7", domain=DOMAIN, **attributes)
    graph_inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, x_shape)]
    for name in inputs[1:]:
        kind = TensorProto.FLOAT if name == "residual" else helper.np_dtype_to_tensor_dtype(arrays[name].dtype)
        shape = [*x_shape[:-1], arrays["values"].shape[1]] if name == "residual" else arrays[name].shape
        graph_inputs.append(helper.make_tensor_value_info(name, kind, shape))
    initializers = [numpy_helper.from_array(arrays[n], n) for n in dict.fromkeys(names[1:]) if n not in inputs]
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one_node", graph_inputs, [output], initializers)
    return _serialized(graph)


def attention_model(num_heads=None, *, mask=True, columns=None, **attributes) -> bytes:
    """A serialized model Y = Attention(QKV, mask)."""
    names = ["QKV", "mask"] if mask else ["QKV"]
    if num_heads is not None:
        attributes["num_heads"] = num_heads
    node = helper.make_node(ATTENTION_OP_TYPE, names, ["Y"], name="attention_7", domain=DOMAIN, **attributes)
    inputs = [helper.make_tensor_value_info("QKV", TensorProto.FLOAT, ["batch", "sequence", columns])]
    inputs += [helper.make_tensor_value_info("mask", TensorProto.INT32, ["batch", "sequence"])] * mask
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    return _serialized(helper.make_graph([node], "one_node", inputs, [output]))


def _serialized(graph) -> bytes:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, SINCE_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def session(model: bytes | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library_path())
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # the errors that tests provoke come as exceptions too
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
