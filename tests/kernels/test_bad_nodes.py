"""Whatever is wrong with a node or its input is said in a sentence with the node's name; nothing crashes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import EDGE_CASES
from ds_model import attention_model, one_node_model, session
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from kernels.onnx_op import check_weights, index_dtype

REFUSED = (errors.Fail, errors.InvalidArgument, errors.RuntimeException, errors.InvalidGraph)


def odd_arrays(name="odd"):
    """N/B = 3, B = 17, K = 37, M = 53, S = 5."""
    return next(case for case in EDGE_CASES if case.name == name).arrays()


def put(arrays, name, position, value):
    arrays[name][position] = value


BAD_WEIGHTS = {
    "index": (
        lambda a: put(a, "indices", (2, 52, 4), 37),
        r"indices: expected numbers below (K = )?37 \(atoms per block\), got 37",
    ),
    "index-uint16": (
        lambda a: a.update(indices=np.full((3, 53, 5), 40000, np.uint16)),
        "indices: expected (numbers below K = 37|uint8)",
    ),
    "index-type": (lambda a: a.update(indices=a["indices"].astype(np.int32)), "indices: expected uint8"),
    "index-shape": (lambda a: a.update(indices=a["indices"][:, :-1]), "indices: expected shape"),
    "values-shape": (lambda a: a.update(values=a["values"][:2]), r"values: expected shape [\[(]3, M, S[\])]"),
    "values-rank": (lambda a: a.update(values=a["values"][0]), r"values: expected shape [\[(]3, M, S[\])]"),
    "values-empty": (
        lambda a: a.update(values=a["values"][..., :0], indices=a["indices"][..., :0]),
        "values: expected shape .*, none of them 0",
    ),
    "dictionary-rank": (lambda a: a.update(dictionary=a["dictionary"][0]), "dictionary: expected shape"),
    "dictionary-empty": (lambda a: a.update(dictionary=a["dictionary"][:, :0]), "dictionary: expected shape"),
    "values-half": (
        lambda a: a.update(values=a["values"].astype(np.float16)),
        "values: expected float32.* got float16",
    ),
    "dictionary-half": (
        lambda a: a.update(dictionary=a["dictionary"].astype(np.float16)),
        "values: expected float16.* got float32",
    ),
    "dictionary-double": (
        lambda a: a.update(dictionary=a["dictionary"].astype(np.float64)),
        "dictionary: expected float32 or float16 or int16 or int8",
    ),
    "bias-shape": (lambda a: a.update(bias=a["bias"][:-1]), r"bias: expected .*shape [\[(]53"),
    "scales-of-floats": (
        lambda a: a.update(scales=np.ones(53, np.float32)),
        "scales: expected none, because only integer weights have them",
    ),
    "half-a-norm": (
        lambda a: a.update(norm_weight=np.ones(53, np.float32)),
        "norm_weight and norm_bias: expected both as constants, or neither|norm_weight and norm_bias: expected both or",
    ),
    "norm-shape": (
        lambda a: a.update(norm_weight=np.ones(53, np.float32), norm_bias=np.ones(52, np.float32)),
        r"norm_bias: expected .*shape [\[(]53",
    ),
}
BAD_INTEGERS = {
    "no-scales": (lambda a: a.pop("scales"), "scales: expected (a constant|float32 of shape)"),
    "scales-shape": (lambda a: a.update(scales=a["scales"][1:]), r"scales: expected .*shape [\[(]53"),
    "values-type": (lambda a: a.update(values=a["values"].astype(np.float32)), "values: expected int16, .*got float32"),
    "long-atom": (
        lambda a: put(a, "dictionary", (1, 2, 3), 32767),
        "dictionary: expected int16 atoms of norm 16384 at most, but atom 2 of block 1 is longer",
    ),
}


# Faults of all integers, and those of one kind.
BAD_INT8 = {
    "no-scales": BAD_INTEGERS["no-scales"],
    "scales-shape": BAD_INTEGERS["scales-shape"],
    "values-type": (lambda a: a.update(values=a["values"].astype(np.int16)), "values: expected int8, .*got int16"),
}
FAULTS = [
    (weights, fault)
    for weights, faults in (("odd", BAD_WEIGHTS), ("odd-int16", BAD_INTEGERS), ("odd-int8", BAD_INT8))
    for fault in faults.items()
]
each_fault = pytest.mark.parametrize(
    ("weights", "fault"), FAULTS, ids=[f"{weights}-{name}" for weights, (name, _) in FAULTS]
)


@each_fault
def test_bad_weights_are_refused_when_the_session_is_made(weights, fault):
    _, (change, message) = fault
    arrays = odd_arrays(weights)
    change(arrays)
    model = one_node_model(arrays, x_shape=["batch", "sequence", 51])
    with pytest.raises(REFUSED, match=f"DSLinear node 'layer_7': {message}"):
        session(model)


@each_fault
def test_bad_weights_are_refused_before_a_model_is_written(weights, fault):
    _, (change, message) = fault
    arrays = odd_arrays(weights)
    check_weights(**arrays)
    change(arrays)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_weights(**arrays)


def test_int16_rows_that_could_overflow_are_refused():
    arrays = odd_arrays("odd-int16")
    arrays["values"][:, 7] = 32767
    with pytest.raises(ValueError, match=r"values: expected rows whose sums stay below 2\^31, but those of row 7 can"):
        check_weights(**arrays)
    arrays = odd_arrays("odd-int16")
    arrays["scales"][3] = np.inf
    with pytest.raises(ValueError, match="scales: expected finite numbers, got inf"):
        check_weights(**arrays)


def test_bias_of_another_type_is_refused():
    arrays = odd_arrays()
    arrays["bias"] = arrays["bias"].astype(np.float16)
    with pytest.raises(ValueError, match="bias: expected float32"):
        check_weights(**arrays)
    with pytest.raises(REFUSED, match=r"bias|layer_7"):  # ONNX Runtime's own type check comes first
        session(one_node_model(arrays))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activation": "relu"}, "attribute activation: expected none or gelu, got 'relu'"),
        ({"activation": ""}, "attribute activation: expected none or gelu, got ''"),
        ({"activation": 1}, "attribute activation: expected a string"),
        ({"row_group": 4}, "attribute row_group: expected 1 .*, got 4"),
        ({"row_group": "1"}, "attribute row_group: expected an integer"),
        ({"norm_epsilon": -1.0}, "attribute norm_epsilon: expected 0 or more, got -1"),
        ({"norm_epsilon": 1}, "attribute norm_epsilon: expected a float"),
        ({"row_group": 1.0}, "attribute row_group: expected an integer"),
    ],
)
def test_bad_attributes_are_refused(attributes, message):
    with pytest.raises(REFUSED, match=f"DSLinear node 'layer_7': {message}"):
        session(one_node_model(odd_arrays(), **attributes))


@pytest.mark.parametrize("name", ["dictionary", "indices", "values"])
def test_weights_must_be_constant(name):
    model = one_node_model(odd_arrays(), x_shape=["tokens", 51], inputs=("X", name))
    with pytest.raises(REFUSED, match=rf"DSLinear node 'layer_7': {name}: expected a constant"):
        session(model)


def test_bias_may_be_computed_and_is_checked_at_the_call():
    arrays = odd_arrays()
    model = session(one_node_model(arrays, x_shape=["tokens", 51], inputs=("X", "bias")))
    x = np.zeros((2, 51), np.float32)
    y = model.run(None, {"X": x, "bias": arrays["bias"]})[0]
    np.testing.assert_array_equal(y, [arrays["bias"]] * 2)
    dynamic = one_node_model({**arrays, "bias": np.zeros(50, np.float32)}, inputs=("X", "bias"))
    with pytest.raises(REFUSED, match=r"DSLinear node 'layer_7': bias: expected shape \[53\], got \[50\]"):
        session(dynamic).run(None, {"X": x[None], "bias": np.zeros(50, np.float32)})


def test_a_norm_must_be_constant():
    arrays = {**odd_arrays(), "norm_weight": np.ones(53, np.float32), "norm_bias": np.ones(53, np.float32)}
    model = session(one_node_model(arrays, x_shape=["tokens", 51], inputs=("X", "norm_weight", "norm_bias")))
    given = {name: arrays[name] for name in ("norm_weight", "norm_bias")}
    with pytest.raises(REFUSED, match="DSLinear node 'layer_7': norm_weight and norm_bias: expected both as constants"):
        model.run(None, {"X": np.zeros((2, 51), np.float32), **given})


def test_a_residual_of_another_shape_is_refused_and_the_session_lives_on():
    model = session(one_node_model(odd_arrays(), x_shape=["tokens", 51], inputs=("X", "residual")))
    x = np.zeros((2, 51), np.float32)
    message = r"DSLinear node 'layer_7': residual: expected shape \[2, 53\], that of Y, got \[1, 53\]"
    with pytest.raises(REFUSED, match=message):
        model.run(None, {"X": x, "residual": np.zeros((1, 53), np.float32)})
    assert model.run(None, {"X": x, "residual": np.zeros((2, 53), np.float32)})[0].shape == (2, 53)


@pytest.mark.parametrize(
    ("x_shape", "message"),
    [((3, 50), r"X: expected shape \[\.\.\., 51\], got \[3, 50\]"), ((), r"X: expected shape .*, got \[\]")],
)
def test_input_of_a_wrong_shape_is_refused_and_the_session_lives_on(x_shape, message):
    model = session(one_node_model(odd_arrays(), x_shape=["a", "b"] if x_shape else []))
    with pytest.raises(REFUSED, match=f"DSLinear node 'layer_7': {message}"):
        model.run(None, {"X": np.zeros(x_shape, np.float32)})
    if x_shape:
        assert model.run(None, {"X": np.zeros((2, 51), np.float32)})[0].shape == (2, 53)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "attribute num_heads: expected 1 or more, got 0"),
        ({"num_heads": -3}, "attribute num_heads: expected 1 or more, got -3"),
        ({"num_heads": "12"}, "attribute num_heads: expected an integer"),
        ({"num_heads": 2, "precision": "half"}, "attribute precision: expected float32 or bfloat16, got 'half'"),
    ],
)
def test_bad_attributes_of_attention_are_refused(attributes, message):
    with pytest.raises(REFUSED, match=f"Attention node 'attention_7': {message}"):
        session(attention_model(**attributes))


@pytest.mark.parametrize(
    ("n_heads", "qkv_shape", "mask_shape", "message"),
    [
        (2, (1, 4, 25), (1, 4), r"QKV: expected shape \[batch, sequence, 3 \* width \* 2\].*, got \[1, 4, 25\]"),
        (2, (1, 4, 0), (1, 4), "QKV: expected shape"),
        (1, (1, 4, 3 * 257), (1, 4), "QKV: expected shape .*a head's width up to 256, got"),
        (2, (1, 4, 24), (1, 3), r"mask: expected shape \[1, 4\], got \[1, 3\]"),
        (2, (1, 4, 24), (4, 1), r"mask: expected shape \[1, 4\], got \[4, 1\]"),
    ],
)
def test_bad_inputs_of_attention_are_refused(n_heads, qkv_shape, mask_shape, message):
    model = session(attention_model(n_heads))
    with pytest.raises(REFUSED, match=f"Attention node 'attention_7': {message}"):
        model.run(None, {"QKV": np.zeros(qkv_shape, np.float32), "mask": np.ones(mask_shape, np.int32)})
    y = model.run(None, {"QKV": np.ones((1, 4, 12), np.float32), "mask": np.ones((1, 4), np.int32)})[0]
    np.testing.assert_allclose(y, np.ones((1, 4, 4)), rtol=1e-6)


def test_attention_infers_its_shape():
    assert session(attention_model(2, columns=24)).get_outputs()[0].shape == ["batch", "sequence", 8]


MAKE_SESSION = """
from ds_model import attention_model, one_node_model, session
from cases import EDGE_CASES
session(one_node_model(EDGE_CASES[3].arrays()))
"""


def run_forced(code, tier):
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([os.path.join(tests, "kernels"), tests])
    environment = {**os.environ, "DSFORMER_ISA": tier, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [MAKE_SESSION, "import kernels; kernels.isa()"], ids=["session", "isa"])
def test_an_unknown_tier_is_an_error(code):
    done = run_forced(code, "nonsense")
    assert done.returncode == 1
    assert "DSFORMER_ISA=nonsense is not a tier of this build; it knows scalar" in done.stderr


@pytest.mark.parametrize(("n_atoms", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16)])
def test_index_dtype(n_atoms, dtype):
    assert index_dtype(n_atoms) is dtype


@pytest.mark.parametrize("n_atoms", [0, 65537])
def test_index_dtype_out_of_range(n_atoms):
    with pytest.raises(ValueError, match=f"atoms per block: expected 1 to 65536, got {n_atoms}"):
        index_dtype(n_atoms)
