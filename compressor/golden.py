"""golden.json: what a model folder must answer, which the service asks it before it serves anybody.

    python -m compressor.golden FOLDER...     adds the file, or writes it anew; the other files stay as they are

It holds texts, the tokens they must become, the logits those must give, and the sha256 of the folder's other files. So
the service finds a damaged file, a tokenizer that splits otherwise, and a processor, kernel library or ONNX Runtime
that computes something else. The logits are those of the tier `scalar`, which rounds nothing that the file does not:
the plain loops that every other tier is measured against.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers

from compressor.files import replace_file
from compressor.session import open_session

FILE = "golden.json"
SIGNED = ("model.onnx", "tokenizer.json", "config.json")
OUTPUTS = {"classify": ("logits",), "qa": ("start_logits", "end_logits")}

SENTENCES = (
    "Yes.",
    "A charming and often affecting journey.",
    "The service answers the next request, whatever the last one was, and says in a sentence what was wrong.",
    "Architecturally, the school has a Catholic character: atop the main building's gold dome is a golden statue, "
    "and immediately in front of it, facing it, is a copper statue with arms upraised.",
)
QUESTION = "What is on top of the dome?"

# How far a tier may stray from `scalar`, as a share of the largest logit, and at least of 1. Float32 sums in another
# order; the tiers for int8 round what goes into a product to 8 bits as well, and some hold attention in bfloat16.
SHARE = {"float32": 1e-3, "float16": 1e-3, "int16": 1e-2, "int8": 1e-1}
EXIT_FAILED = 2


def write(folder: Path) -> None:
    """Write golden.json of a folder that has its model.onnx, tokenizer.json and config.json.

    A model with the custom op is asked in a process of its own, for a process keeps the tier it chose first.
    """
    if not _has_custom_op(folder):
        write_here(folder)
        return
    environment = {**os.environ, "DSFORMER_ISA": "scalar", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "compressor.golden", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ValueError(f"{folder} could not be asked for its {FILE}: {done.stderr.strip()}")


def write_here(folder: Path) -> None:
    """The same by this process, with the tier that it uses."""
    config = json.loads((folder / "config.json").read_bytes())
    section = config["dsformer"]
    names = OUTPUTS[section["task"]]
    session = open_session(folder / "model.onnx", threads=1, custom_ops=_has_custom_op(folder))
    inputs = {node.name for node in session.get_inputs()}
    rows = []
    largest = 1.0
    for text, pair, encoding in _encoded(folder, section["task"], config["max_position_embeddings"]):
        row: dict[str, Any] = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        feed = {**row, "attention_mask": [1] * len(encoding.ids)}
        found = session.run(list(names), {n: np.array([v], np.int64) for n, v in feed.items() if n in inputs})
        largest = max(largest, *(float(np.abs(output).max()) for output in found))
        outputs = {name: [float(f"{x:.6g}") for x in output[0]] for name, output in zip(names, found, strict=True)}
        rows.append({"text": text, "text_pair": pair, **row, **outputs})
    content = {
        "reference": f"tier scalar, onnxruntime {onnxruntime.__version__}, tokenizers {tokenizers.__version__}",
        "tolerance": float(f"{SHARE[section['precision']] * largest:.2g}"),
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SIGNED},
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps(content, indent=1).removesuffix("\n}")
    replace_file(folder / FILE, f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'.encode())


def _has_custom_op(folder: Path) -> bool:
    return b"DSLinear" in (folder / "model.onnx").read_bytes()


def _encoded(folder: Path, task: str, limit: int) -> list[tuple[str, str | None, tokenizers.Encoding]]:
    """The sentences, one by one and all in a row, with their tokens: those that the model takes uncut."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [*SENTENCES, " ".join(SENTENCES)]
    pairs = [(text, None) if task == "classify" else (QUESTION, text) for text in texts]
    encoded = tokenizer.encode_batch([a if b is None else (a, b) for a, b in pairs])
    return [(a, b, e) for (a, b), e in zip(pairs, encoded, strict=True) if len(e.ids) <= limit]


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print("Name the model folders: python -m compressor.golden FOLDER...", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    os.environ["DSFORMER_ISA"] = "scalar"
    for name in arguments:
        try:
            write_here(Path(name))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
