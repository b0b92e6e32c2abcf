"""How far two models answer alike, and that a compressed one's record says it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import BertModel

from compressor import checkpoint, pipeline
from compressor.config import MethodOptions, TrainConfig
from compressor.dense_sparse import DenseSparse
from compressor.scoring import agreement
from compressor.tasks import find_task

LOGITS = [np.array(row) for row in ([2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0])]


def test_labels_agree_whatever_their_scores() -> None:
    other = [LOGITS[0] * 9, -LOGITS[1], LOGITS[2] + 1, LOGITS[3]]
    assert agreement(find_task("sst2"), LOGITS, LOGITS) == 100
    assert agreement(find_task("sst2"), LOGITS, other) == 75


def test_answers_agree_as_the_metric_reads_them() -> None:
    assert agreement(find_task("squad"), ["the Rhine", "1990", ""], ["Rhine.", "1991", ""]) == pytest.approx(200 / 3)


def test_numbers_agree_by_their_correlation() -> None:
    numbers = [np.array([value]) for value in (0.0, 1.0, 2.0, 5.0)]
    assert agreement(find_task("stsb"), numbers, [2 * number + 1 for number in numbers]) == pytest.approx(100)
    turned = [np.array([value]) for value in (5.0, 1.0, 2.0, 0.0)]
    assert agreement(find_task("stsb"), numbers, turned) == pytest.approx(
        100 * np.corrcoef([0, 1, 2, 5], [5, 1, 2, 0])[0, 1]
    )


def test_a_compressed_model_says_how_far_it_keeps_to_the_dense_one(sentiment_tsv: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, dense, small = (tmp_path / name for name in ("base", "dense", "small"))
    BertModel(make_config(initializer_range=0.3)).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    texts = sorted({line.split("\t")[0] for line in sentiment_tsv.read_text().splitlines()[1:]})
    numbers = tmp_path / "numbers.tsv"
    numbers.write_text("\n".join(["text\tlabel", *(f"{text}\t{len(text) / 9:.2f}" for text in texts)]) + "\n")
    data = pipeline.Data("classify", train_file=numbers, validation_file=numbers)
    pipeline.finetune(str(base), data, TrainConfig(max_steps=20, batch_size=8, learning_rate=1e-3), dense)
    method = DenseSparse.from_options(MethodOptions(gamma=0.4, delta=0.25, block_size=8, iterations=2))
    record = pipeline.compress(str(dense), data, method, TrainConfig(), small, schedule="ft-f")

    task, answers = data.resolve(), []
    for folder in (dense, small):
        loaded = checkpoint.load(str(folder), task)
        with torch.no_grad():
            inputs = (loaded.tokenizer(example.text, return_tensors="pt") for example in data.validation(task))
            answers.append([float(loaded.model.eval()(**each).logits) for each in inputs])
    assert record.extra["agreement"] == pytest.approx(100 * np.corrcoef(answers)[0, 1], abs=1e-3)
    assert 0 < record.extra["agreement"] < 99.99, "or the case shows nothing"
