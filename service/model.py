"""One model folder, ready to run. The only file of the server that knows ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

import kernels
from service import golden
from service.artifact import Artifact, broken
from service.errors import BackendFailed, StartError
from service.tokenizer import Row, Tokenizer

Logits = npt.NDArray[np.float32]

RUNTIME_VERSION: str = ort.__version__
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS = {"classify": ("logits",), "qa": ("start_logits", "end_logits")}
ORT_ERRORS_ONLY = 3


class OnnxModel:
    """A session with its tokenizer and what config.json says of it."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        began = time.perf_counter()
        self.artifact = artifact
        self.max_length = artifact.config.max_length
        self.file_bytes = artifact.onnx_path.stat().st_size
        self.tokenizer = Tokenizer(artifact.tokenizer_path)
        self._session = open_session(artifact, threads)
        self.inputs = self._checked_inputs()
        self.outputs = OUTPUTS[artifact.task]
        self._check_run()
        wrong = golden.wrong_tokens(artifact.golden, self.tokenizer)
        if wrong:
            raise broken(artifact.path, wrong)
        self.load_seconds = time.perf_counter() - began

    def run(self, rows: Sequence[Row]) -> list[Logits]:
        """Pad the rows to the longest of them and run once.

        Returns one array per output of the task: `logits` (n, labels), or `start_logits` and `end_logits` (n, T).
        """
        try:
            outputs = self._session.run(self.outputs, self.feed(rows))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendFailed(f"The model {self.artifact.name} failed: {error}") from error
        if not all(np.isfinite(output).all() for output in outputs):
            raise BackendFailed(f"The model {self.artifact.name} returned NaN or infinity.")
        return list(outputs)

    def feed(self, rows: Sequence[Row]) -> dict[str, npt.NDArray[np.int64]]:
        """The graph's inputs, each (n, T): the rows padded on the right."""
        shape = (len(rows), max(len(row) for row in rows))
        feed = {name: np.zeros(shape, dtype=np.int64) for name in INPUTS}
        feed["input_ids"] += self.artifact.config.pad_token_id or 0
        for i, row in enumerate(rows):
            feed["input_ids"][i, : len(row)] = row.ids
            feed["attention_mask"][i, : len(row)] = 1
            feed["token_type_ids"][i, : len(row)] = row.type_ids
        return {name: feed[name] for name in self.inputs}

    def _checked_inputs(self) -> list[str]:
        names = [node.name for node in self._session.get_inputs()]
        if not set(INPUTS[:2]) <= set(names) <= set(INPUTS):
            raise broken(self.artifact.path, f"model.onnx has inputs {names}, expected {list(INPUTS)}")
        outputs = {node.name for node in self._session.get_outputs()}
        missing = [name for name in OUTPUTS[self.artifact.task] if name not in outputs]
        if missing:
            raise broken(self.artifact.path, f"model.onnx has outputs {sorted(outputs)}, {missing[0]} is missing")
        return names

    def _check_run(self) -> None:
        """One real run, so that a graph which cannot run is refused at start and not at the first request."""
        row = self.tokenizer.single.join(np.array([self.tokenizer.max_id], dtype=np.int64))
        try:
            outputs = self.run([row, row])
        except BackendFailed as error:
            raise broken(self.artifact.path, f"a trial run failed: {error.sentence.rstrip('.')}") from error
        width = len(self.artifact.labels) if self.artifact.task == "classify" else len(row)
        for name, output in zip(self.outputs, outputs, strict=True):
            if output.shape != (2, width):
                raise broken(
                    self.artifact.path,
                    f"{name} has shape {list(output.shape)} for 2 inputs, expected {[2, width]}",
                )


def session_options(threads: int) -> ort.SessionOptions:
    """What every session of the service has in common."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ORT_ERRORS_ONLY
    # A pattern is kept for every shape that ever came, and saves no time. By tests/load/arena.py, sst2-dsformer: 74 MB
    # without, 87 MB with; without the arena 89 to 103 MB; the time of a token the same to within its scatter.
    options.enable_mem_pattern = False
    # The models share the cores: threads of the one that just ran must not spin under the one that runs now. Measured
    # with two MiniLM sessions taking turns on 2 busy cores: 1.2 to 2 times slower with spinning.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(artifact: Artifact, threads: int) -> ort.InferenceSession:
    options = session_options(threads)
    try:
        if artifact.variant == "dsformer":
            options.register_custom_ops_library(kernels.library_path())
        return ort.InferenceSession(str(artifact.onnx_path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise StartError(f"Model folder {artifact.path}: model.onnx cannot be loaded: {error}") from error
