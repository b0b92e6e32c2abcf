"""Open an exported model in ONNX Runtime."""

from pathlib import Path
from typing import Any

import onnxruntime

import kernels


def open_session(model: Path, threads: int = 0, custom_ops: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    threads: for one call; 0 is ONNX Runtime's own choice, one a physical core. custom_ops: load the DSLinear
    library too; a model without factorized layers does not need it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if custom_ops:
        options.register_custom_ops_library(kernels.library_path())
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
