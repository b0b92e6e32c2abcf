"""Which settings of ONNX Runtime's memory the service takes: time and memory of each, on the same batches.

    python tests/load/arena.py FOLDER [--batches 300]

Each setting runs in a process of its own: the grid of the warm-up, then batches of random shapes up to the token
budget. Memory is the growth since before the session; `service/model.py` has what was chosen and why.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import resident_megabytes

from service import artifact, model
from service.lifecycle import shapes
from service.tokenizer import Row

MAX_BATCH_TOKENS = 1024
SETTINGS = {
    "chosen": {},
    "arena, patterns": {"enable_cpu_mem_arena": True, "enable_mem_pattern": True},
    "arena, no patterns": {"enable_cpu_mem_arena": True, "enable_mem_pattern": False},
    "no arena, patterns": {"enable_cpu_mem_arena": False, "enable_mem_pattern": True},
    "no arena, no patterns": {"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
}


def watch(folder: Path, name: str, batches: int) -> None:
    chosen = model.session_options

    def options(threads: int) -> object:
        made = chosen(threads)
        for key, value in SETTINGS[name].items():
            setattr(made, key, value)
        return made

    model.session_options = options
    before = resident_megabytes("self")
    loaded = model.OnnxModel(artifact.read(folder), threads=1)
    draw, zeros = random.Random(0), np.zeros(loaded.max_length, np.int64)

    def run(rows: int, length: int) -> float:
        began = time.process_time()
        loaded.run([Row(zeros[:length], zeros[:length])] * rows)
        return 1e6 * (time.process_time() - began) / (rows * length)

    for rows, length in shapes(loaded.max_length, MAX_BATCH_TOKENS):
        run(rows, length)
    warm = resident_megabytes("self") - before
    times = []
    for _ in range(batches):
        length = draw.randint(4, loaded.max_length)
        times.append(run(draw.randint(1, max(1, MAX_BATCH_TOKENS // length)), length))
    grown = resident_megabytes("self") - before
    print(f"{name}: {statistics.median(times):.1f} us a token; {warm:.0f} MB when warm, {grown:.0f} MB after")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--setting", choices=SETTINGS)
    wanted = parser.parse_args()
    if wanted.setting:
        watch(wanted.folder, wanted.setting, wanted.batches)
    else:
        for setting in SETTINGS:
            subprocess.run([sys.executable, *sys.argv, "--setting", setting], check=True)
