"""Runs every model of a folder between guard pages: `python run_guarded.py LIBRARY FOLDER [PROTECTED]`.

As run_models.py, but each weight, input and output lies in memory of its own that ends at a page no one may touch, and
in a second run begins after one: a number read or written out of bounds ends the process. Scratch is ONNX Runtime's.
A PROTECTED tensor may not be touched itself, to show that tensors are used where they lie.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

PAGE = mmap.PAGESIZE
PROT_NONE = 0
libc = ctypes.CDLL(None, use_errno=True)
kept: list[object] = []  # what ONNX Runtime uses without owning it


def protect(address: int, size: int) -> None:
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(array: np.ndarray, at_end: bool, protected: bool = False) -> np.ndarray:
    """A copy that ends, or begins, at a guard page."""
    pages = -(-array.nbytes // PAGE)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * PAGE), np.uint8)
    start = memory.ctypes.data
    protect(start, PAGE)
    protect(start + (pages + 1) * PAGE, PAGE)
    first = (pages + 1) * PAGE - array.nbytes if at_end else PAGE
    kept.append(memory)
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    if protected:
        protect(start + PAGE, pages * PAGE)
    return copy


def main(library: str, folder: Path, protected: str | None) -> None:
    for path in sorted(folder.glob("*.onnx")):
        weights = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        outputs = {}
        for prefix, at_end in (("y", True), ("t", False)):
            options = onnxruntime.SessionOptions()
            options.register_custom_ops_library(library)
            options.intra_op_num_threads = 1
            for name, array in weights.items():
                if array.size:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(guarded(array, at_end, name == protected))
                    kept.append(value)
                    options.add_initializer(name, value)
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            names = [node.name for node in session.get_inputs()]
            with np.load(path.with_suffix(".npz")) as arrays, np.load(path.with_suffix(".shapes.npz")) as shapes:
                for i in range(len(arrays.files) // len(names)):
                    binding = session.io_binding()
                    for name in names:
                        x = guarded(arrays[f"{name}{i}"], at_end, name == protected)
                        binding.bind_input(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
                    y = guarded(np.full(shapes[f"y{i}"], np.nan, np.float32), at_end)
                    binding.bind_output("Y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
                    session.run_with_iobinding(binding)
                    outputs[f"{prefix}{i}"] = y
        np.savez(path.with_suffix(".out.npz"), **outputs)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
