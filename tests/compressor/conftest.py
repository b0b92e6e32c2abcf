"""Fixtures of the compressor's tests; what they build is in ``tiny.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_folder

# Tensors this small are slower on two threads, and far slower where something else wants the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("bert"), "classify")


@pytest.fixture(scope="session")
def sentiment_tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of a label the words decide, so that training can be seen to work."""
    generator = torch.Generator().manual_seed(0)
    rows = ["text\tlabel"]
    for _ in range(200):
        positive = bool(torch.randint(2, (), generator=generator))
        adjective = ["good", "great", "fine"] if positive else ["bad", "awful", "dull"]
        noun = ["film", "movie", "plot", "story", "actor"]
        pick = torch.randint(1000, (2,), generator=generator).tolist()
        text = f"the {noun[pick[0] % 5]} was very {adjective[pick[1] % 3]} ."
        rows.append(f"{text}\t{'happy' if positive else 'angry'}")
    path = tmp_path_factory.mktemp("data") / "reviews.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path
