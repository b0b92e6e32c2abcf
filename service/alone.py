"""One model folder alone in a process: how long it loads, the most memory it takes, and what it answers.

`python -m service.alone FOLDER THREADS BATCHxTOKENS` prints that as one line of JSON; `dsformer-bench` reads it. Load
time and peak memory are a process's own, and so is the choice of kernels: with DSFORMER_ISA=scalar the answers are the
reference of those of any other tier.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from service import artifact
from service.errors import BackendFailed, StartError
from service.model import OnnxModel
from service.tokenizer import Row

EXIT_FAILED = 1


@dataclass(frozen=True)
class Alone:
    """What one process saw. outputs: the model's own, of `random_rows`, one after another."""

    load_seconds: float
    peak_megabytes: float
    outputs: list[float]


def random_rows(batch: int, tokens: int, vocabulary: int) -> list[Row]:
    """Rows of exactly so many tokens: time does not depend on which."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, tokens), dtype=np.int64)
    return [Row(row, np.zeros(tokens, np.int64)) for row in ids]


def watch(folder: Path, threads: int, batch: int, tokens: int) -> Alone:
    """Load the folder and run it once, here."""
    model = OnnxModel(artifact.read(folder), threads)
    outputs = model.run(random_rows(batch, tokens, 1 + model.tokenizer.max_id))
    return Alone(model.load_seconds, peak_bytes() / 1e6, np.concatenate([each.ravel() for each in outputs]).tolist())


def peak_bytes() -> int:
    """The most memory this process has held."""
    try:
        # Not ru_maxrss: Linux counts in it what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start(folder: Path, threads: int, batch: int, tokens: int, isa: str | None = None) -> Alone:
    """The same in a process of its own, with the kernels held to the tier `isa` if one is given."""
    command = [sys.executable, "-m", "service.alone", str(folder), str(threads), f"{batch}x{tokens}"]
    environment = {**os.environ, **({"DSFORMER_ISA": isa} if isa else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise StartError(f"{folder} could not be run alone: {done.stderr.strip() or f'status {done.returncode}'}")
    return Alone(**json.loads(done.stdout))


def difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference, relative to the largest number wanted."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (found, wanted))
    return float(np.abs(one - other).max() / max(np.abs(other).max(), np.finfo(np.float64).tiny))


def main() -> None:
    folder, threads, shape = sys.argv[1:]
    batch, tokens = (int(number) for number in shape.split("x"))
    try:
        print(json.dumps(asdict(watch(Path(folder), int(threads), batch, tokens))))
    except (StartError, BackendFailed) as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
