"""A model folder with one byte flipped, or a file cut short, is refused with a sentence, or answers as before.

python tests/load/corruption.py FOLDER [--draws 500]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np

from service import golden, registry
from service.engine import Engine
from service.errors import StartError
from service.settings import Settings
from service.tokenizer import Row

FILES = ("model.onnx", "tokenizer.json", "config.json", "golden.json", "card.json")


def damage(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        path.write_bytes(content[:at])
        return f"{path.name} cut at byte {at}"
    bit = draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}, byte {at}, bit {bit}"


def answers(folder: Path) -> tuple[float, list[np.ndarray]]:
    """Of the self-test the largest error over its tolerance, and the outputs of two rows."""
    (model,) = registry.load(Settings(models=folder, threads=1))
    rows = [Row(np.arange(5, 5 + n) % model.tokenizer.max_id, np.zeros(n, np.int64)) for n in (7, 30)]

    async def self_test() -> float:
        engine = Engine(1024, lambda _: None)
        error = await golden.largest_error(model.artifact.golden, engine, model)
        engine.close()
        return error / model.artifact.golden.tolerance

    return asyncio.run(self_test()), [output for row in rows for output in model.run([row])]


def check(folder: Path, draws: int) -> None:
    draw, seen = random.Random(0), collections.Counter[str]()
    _, expected = answers(folder)
    for _ in range(draws):
        with tempfile.TemporaryDirectory() as work:
            copy = Path(work) / "copy"
            shutil.copytree(folder, copy)
            name = draw.choice([name for name in FILES if (copy / name).exists()])
            what = damage(copy / name, draw)
            try:
                error, found = answers(copy)
            except StartError as refused:
                # A sentence that does not name the folder is as bad as none.
                seen["refused at load" if str(copy) in str(refused) else f"badly refused: {what}"] += 1
                continue
            if not error <= 1:
                seen["refused by the self-test"] += 1
                continue
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=what)
            seen["harmless"] += 1
    print(f"{draws} damaged copies: {dict(seen)}")
    assert set(seen) <= {"refused at load", "refused by the self-test", "harmless"}
    assert seen["refused at load"] > draws / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=500)
    options = parser.parse_args()
    check(options.folder, options.draws)
