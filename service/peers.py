"""Other systems that run the same dense model, for `dsformer-bench --peers`: what a user would take instead of us.

Each is made from the dense folder's own graph when it is asked for, with the same number of threads:

    ort-int8       ONNX Runtime's dynamic quantization of all MatMuls (needs the package onnx)
    openvino-f32   OpenVINO, computing in float32 (openvino)
    openvino-bf16  OpenVINO, computing in bfloat16 where the processor can
    openvino-int8  OpenVINO after NNCF's post-training quantization for transformers (openvino, nncf)
    torch-f32      PyTorch in float32, through transformers' own attention (torch, transformers)
    torch-bf16     PyTorch with bfloat16 weights
    deepsparse     DeepSparse on the dense graph, in the interpreter given with --deepsparse (torch to make the graph)

The last three run in processes of their own, on a model of the same config.json with random weights.
Quantized models are calibrated with random tokens: that is enough for their speed, and says nothing of their accuracy.
`ONEDNN_MAX_CPU_ISA` in the environment holds OpenVINO to an instruction set, as `DSFORMER_ISA` does our kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

import kernels
from service.errors import StartError
from service.model import OnnxModel, session_options
from service.tokenizer import Row

Feed = Mapping[str, npt.NDArray[np.int64]]

# What each needs besides the service's own packages.
PACKAGES: dict[str, tuple[str, ...]] = {
    "ort-int8": ("onnx",),
    "openvino-f32": ("openvino",),
    "openvino-bf16": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
    "torch-f32": ("torch", "transformers"),
    "torch-bf16": ("torch", "transformers"),
}
DEEPSPARSE = "deepsparse"
DEEPSPARSE_PROGRAM = Path(__file__).with_name("deepsparse_peer.py")


@dataclass(frozen=True)
class Peer:
    """A system with the model in it. run: from the padded inputs of a batch to the model's outputs.

    Programs of their own give no outputs back.
    """

    name: str
    version: str
    run: Callable[[Feed], Sequence[npt.NDArray[Any]]]


def choose(text: str) -> list[str]:
    """Names from `ort-int8,openvino-f32`; `installed` means all whose packages are there. ValueError if unknown."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "installed":
            names += [name for name in PACKAGES if not missing_packages(name)]
        elif part in PACKAGES:
            names.append(part)
        else:
            raise ValueError(f"expected some of {', '.join(PACKAGES)} or installed, but one of them is {part!r}")
    return list(dict.fromkeys(names))


def missing_packages(name: str) -> list[str]:
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


def make(name: str, model: OnnxModel, threads: int, calibration: Iterable[Sequence[Row]], scratch: Path) -> Peer:
    """The peer of this name with the dense `model` in it; intermediate files go to scratch."""
    missing = missing_packages(name)
    if missing:
        raise StartError(f"The peer {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    try:
        if name == "ort-int8":
            return _onnxruntime_int8(name, model, threads, scratch)
        if name.startswith("torch-"):
            return _torch(name, model, threads, scratch)
        return _openvino(name, model, threads, [model.feed(rows) for rows in calibration])
    except Exception as error:  # other projects' exceptions: any of them means that this peer cannot be had
        raise StartError(f"The peer {name} cannot run {model.artifact.path}: {error}") from error


def _has_vnni() -> bool:
    """Without it ONNX Runtime adds pairs of 8-bit products in 16 bits, which weights of more than 7 bits overflow."""
    return "vnni" in kernels.cpu_info()


def _onnxruntime_int8(name: str, model: OnnxModel, threads: int, scratch: Path) -> Peer:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Weights lie in the file as float16 behind a Cast, where the quantizer does not look: fold the Casts first.
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    folded, quantized = scratch / "folded.onnx", scratch / "int8.onnx"
    options.optimized_model_filepath = str(folded)
    ort.InferenceSession(str(model.artifact.onnx_path), options, providers=["CPUExecutionProvider"])
    logging.disable(logging.WARNING)  # it logs advice to the root logger
    try:
        # Behind ONNX Runtime's fused operators no types are inferred; they are all floats.
        extra = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(
            folded,
            quantized,
            ["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not _has_vnni(),
            weight_type=QuantType.QInt8,
            extra_options=extra,
        )
    finally:
        logging.disable(logging.NOTSET)
    session = ort.InferenceSession(str(quantized), session_options(threads), providers=["CPUExecutionProvider"])
    return Peer(name, ort.__version__, lambda feed: session.run(None, dict(feed)))


def _openvino(name: str, model: OnnxModel, threads: int, calibration: Sequence[Feed]) -> Peer:
    import openvino

    graph = openvino.Core().read_model(str(model.artifact.onnx_path))
    if name == "openvino-int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        dataset = nncf.Dataset(calibration, dict)
        graph = nncf.quantize(graph, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if name == "openvino-bf16" else "f32",
    }
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    return Peer(name, openvino.__version__, lambda feed: list(compiled(dict(feed)).values()))


class _Program:
    """A program that holds a peer: after "ready" it answers each line on its standard input with "done"."""

    def __init__(self, name: str, command: Sequence[str], scratch: Path) -> None:
        self._name = name
        self._log = scratch / f"{name}.log"
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        weakref.finalize(self, self._process.kill)
        self._expect("ready")

    def ask(self, line: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its log says why
            print(line, file=self._process.stdin, flush=True)
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._process.stdout
        said = " "
        while said and said.strip() != word:  # other people's programs print banners
            said = self._process.stdout.readline()
        if not said:
            status = self._process.wait()
            reason = _last_line(self._log.read_text(encoding="utf-8", errors="replace"))
            raise StartError(f"the program of {self._name}: it ended with status {status}: {reason}")


def _last_line(text: str) -> str:
    """Of what a program said before it ended: the reason, in a traceback."""
    return text.strip().rpartition("\n")[2] or "without a word"


def _dense_peer(model: OnnxModel, *words: object) -> list[str]:
    """The command that has the compressor run or export the dense model."""
    return [sys.executable, "-m", "compressor.dense_peer", str(model.artifact.path), *map(str, words)]


def _torch(name: str, model: OnnxModel, threads: int, scratch: Path) -> Peer:
    precision = {"torch-f32": "float32", "torch-bf16": "bfloat16"}[name]
    program = _Program(name, _dense_peer(model, "run", threads, precision), scratch)

    def run(feed: Feed) -> Sequence[npt.NDArray[Any]]:
        program.ask("{} {}".format(*feed["input_ids"].shape))
        return ()

    return Peer(name, version("torch"), run)


def make_deepsparse(python: Path, model: OnnxModel, threads: int, scratch: Path) -> Peer:
    """DeepSparse in the interpreter ``python``. Every shape has a graph of its own, made by PyTorch when first run."""
    try:
        found = subprocess.run(
            [python, "-c", "import deepsparse; print(deepsparse.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        )
        program = _Program(DEEPSPARSE, [str(python), str(DEEPSPARSE_PROGRAM), str(threads)], scratch)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StartError(
            f"--deepsparse expects a Python interpreter with DeepSparse in it, not {python}: {error}"
        ) from error
    except StartError as error:
        raise StartError(f"The peer {DEEPSPARSE} cannot be run: {error}") from error

    def run(feed: Feed) -> Sequence[npt.NDArray[Any]]:
        batch, tokens = feed["input_ids"].shape
        graph = scratch / f"plain-{batch}x{tokens}.onnx"
        if not graph.exists():
            command = _dense_peer(model, "export", batch, tokens, graph)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StartError(f"The peer {DEEPSPARSE} has no graph: {_last_line(done.stderr)}")
        program.ask(f"{batch} {tokens} {graph}")
        return ()

    return Peer(DEEPSPARSE, found.stdout.split()[-1], run)
