"""Train tiny models in as many processes as the launcher starts, and leave what each of them ended with in a folder.

torchrun --nproc-per-node 2 train_in_processes.py reviews.tsv out
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

from compressor import processes
from compressor.config import CompressionConfig, KSVDConfig, TrainConfig
from compressor.data import classify_features, complete_task, load_examples
from compressor.stf import factorize_model, stacks_of
from compressor.tasks import find_task
from compressor.train import _Loop, train

# Nine steps to an epoch of 129 rows, the last of one row: no share of it for the second process.
ROWS = 129
CONFIG = TrainConfig(
    max_steps=12, batch_size=16, learning_rate=1e-3, dropout=0.0, distill_weight=0.5, precision="float32"
)
CASES: dict[str, TrainConfig] = {
    "dense": CONFIG,
    "stf": CONFIG,
    "options": replace(CONFIG, pull=0.2, support_hysteresis=0.05, omp_interval=2, frozen_share=0.4),
    "closed form": replace(CONFIG, closed_form_share=0.5),
    "dropout": replace(CONFIG, dropout=0.1),
}


def fresh(case: str) -> Any:
    torch.manual_seed(1)
    model = BertForSequenceClassification(make_config())
    if case != "dense":
        factorize_model(model, CompressionConfig(gamma=0.4, delta=0.375, block_size=8), KSVDConfig(1))
    return model


def trained(case: str, tsv: Path, folder: Path) -> dict[str, torch.Tensor]:
    """State at the end; the run is broken off after seven steps and resumed."""
    task = complete_task(find_task("classify"), tsv)
    features = classify_features(load_examples(task, "train", train_file=tsv), make_tokenizer(), 32)[:ROWS]
    torch.manual_seed(2)
    teacher = BertForSequenceClassification(make_config()).eval().requires_grad_(False)
    config = CASES[case]
    path = folder / f"{case}.training.pt"
    loop = _Loop(fresh(case), features, task, config, 0, teacher, lambda: 0.0)
    for _ in range(7):
        loop.advance()
    loop.save(path)
    model = fresh(case)
    if processes.rank() == 1:  # weights are the first one's, whatever the others begin with
        model.classifier.weight.data.zero_()
    train(
        model,
        features,
        task,
        config,
        pad_id=0,
        checkpoint=path,
        teacher=teacher,
        score=lambda: 0.0,
        resume=True,
        title=f"training {case}",
    )
    unbroken = fresh(case)
    whole = folder / f"{case}.whole.pt"
    train(unbroken, features, task, config, pad_id=0, checkpoint=whole, teacher=teacher, score=lambda: 0.0, title="x")
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), f"{case}: {name} is another after a resume"
    assert bool(stacks_of(model)) == (case != "dense")
    return dict(model.state_dict())


def main() -> None:
    torch.set_num_threads(1)
    processes.join()
    tsv, folder = Path(sys.argv[1]), Path(sys.argv[2])
    states = {case: trained(case, tsv, folder) for case in CASES}
    torch.save(states, folder / f"{processes.rank()}-of-{processes.count()}.pt")
    try:
        processes.from_first(lambda: (folder / "missing").read_text())
    except FileNotFoundError as error:
        (folder / f"{processes.rank()}.error").write_text(str(error))
    processes.leave()


if __name__ == "__main__":
    main()
