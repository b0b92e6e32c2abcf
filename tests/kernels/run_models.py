"""Runs every model of a folder: `python run_models.py LIBRARY FOLDER`, with any Python that has onnxruntime.

For NAME.onnx reads the inputs X0, X1, … (and residual0, …) of NAME.npz, and writes NAME.out.npz: y0, y1, … with one
thread and t0, t1, … with two. Prints the version of ONNX Runtime and the inferred output shapes.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(library: str, folder: Path) -> None:
    print("onnxruntime", onnxruntime.__version__)
    for model in sorted(folder.glob("*.onnx")):
        outputs = {}
        for prefix, threads in (("y", 1), ("t", 2)):
            options = onnxruntime.SessionOptions()
            options.register_custom_ops_library(library)
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            names = [node.name for node in session.get_inputs()]
            with np.load(model.with_suffix(".npz")) as inputs:
                for i in range(len(inputs.files) // len(names)):
                    outputs[f"{prefix}{i}"] = session.run(None, {name: inputs[f"{name}{i}"] for name in names})[0]
        print(model.stem, session.get_outputs()[0].shape)
        np.savez(model.with_suffix(".out.npz"), **outputs)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
