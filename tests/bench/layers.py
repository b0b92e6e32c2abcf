"""Time single layers: DSLinear against a dense MatMul of ONNX Runtime of the same shape, in turns within one run.

    make bench ARGS='--tokens 32,128 --threads 2'

`real` counts the multiply-adds that DSLinear does, K·B a block and token in its dense half and M·S in its sparse half;
`as dense` those that the matrix it replaces would take: what a dense library would have to reach to be as fast. A
multiply-add is two operations. The share is of the fastest dense MatMul of the run.
"""

import argparse
import statistics
import time

import numpy as np
from cases import BENCH_CASES, Case
from ds_model import one_node_model, session
from onnx import TensorProto, helper, numpy_helper

import kernels

STORAGES = ("float32", "int16", "int8")


def dense_model(in_features: int, out_features: int) -> bytes:
    """A serialized model Y = X W."""
    weight = np.random.default_rng(0).standard_normal((in_features, out_features)).astype(np.float32)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["tokens", in_features])
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["tokens", out_features])
    node = helper.make_node("MatMul", ["X", "W"], ["Y"])
    graph = helper.make_graph([node], "dense", [x], [y], [numpy_helper.from_array(weight, "W")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def operations(case: Case, tokens: int) -> tuple[int, int]:
    """Of DSLinear, and of the dense matrix."""
    real = case.n_blocks * (case.n_atoms * case.width + case.rows * case.n_nonzero)
    return 2 * tokens * real, 2 * tokens * case.n_blocks * case.width * case.rows


def time_case(case: Case, tokens: int, threads: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each run, by contender; every round runs each once after a run that warms its caches."""
    in_features = case.n_blocks * case.width
    x = np.random.default_rng(1).standard_normal((tokens, in_features)).astype(np.float32)
    contenders = {"dense": session(dense_model(in_features, case.rows), threads)}
    for storage in STORAGES:
        arrays = case._replace(storage=storage).arrays()
        model = one_node_model(arrays, x_shape=["tokens", in_features], activation=case.activation)
        contenders[storage] = session(model, threads)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(taken["dense"]) < 3:
        for name, one in contenders.items():
            one.run(None, {"X": x})
            began = time.perf_counter()
            one.run(None, {"X": x})
            taken[name].append(time.perf_counter() - began)
    return taken


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="32,128", help="Tokens, comma-separated.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="Of each contender at each shape.")
    parser.add_argument("--match", default="", help="Only layers with this in their name.")
    options = parser.parse_args(argv)
    chosen = kernels.isa()
    print(f"{kernels.cpu_name()}, {options.threads} threads, tier {chosen.name} ({chosen.reason})\n")
    print("| layer | tokens | | ms | GFLOP/s real | as dense | share | times as fast as dense (quartiles) |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for tokens in (int(number) for number in options.tokens.split(",")):
        for case in (case for case in BENCH_CASES if options.match in case.name):
            taken = time_case(case, tokens, options.threads, options.seconds)
            real, dense = operations(case, tokens)
            for name, own in taken.items():
                ratios = [first / mine for first, mine in zip(taken["dense"], own, strict=True)]
                rows.append((case.name, tokens, name, statistics.median(own), real, dense, ratios))
    peak = max(dense / seconds for *_, name, seconds, _, dense, _ in rows if name == "dense")
    for layer, tokens, name, seconds, real, dense, ratios in rows:
        done = dense if name == "dense" else real
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(
            f"| {layer} | {tokens} | {name} | {1000 * seconds:.3f} | {done / seconds / 1e9:.0f} "
            f"| {dense / seconds / 1e9:.0f} | {done / seconds / peak:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )


if __name__ == "__main__":
    main()
