"""Stages of the pipeline: what names one, which rows it sees, and the average of several checkpoints."""

from pathlib import Path

import pytest
import torch
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

from compressor import checkpoint
from compressor.config import CompressionConfig, ConfigError, KSVDConfig, TrainConfig
from compressor.pipeline import Data, _digest, average
from compressor.stf import factorize_model


def test_a_stage_is_named_by_settings_and_by_the_files_they_name(tmp_path: Path) -> None:
    rows = tmp_path / "mine.tsv"
    rows.write_text("text\tlabel\ngood\tyes\nbad\tno\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data = Data("classify", train_file=rows)
    first = _digest(str(model), data, TrainConfig())
    assert _digest(str(model), data, TrainConfig()) == first
    assert _digest(str(model), data, TrainConfig(seed=1)) != first
    assert _digest("some/hub-id", data, TrainConfig()) != first
    rows.write_text("text\tlabel\ngood\tyes\nbad\tno\nfine\tyes\n")
    changed = _digest(str(model), data, TrainConfig())
    assert changed != first
    (model / "config.json").write_text('{"hidden_size": 32}')
    assert _digest(str(model), data, TrainConfig()) != changed


def test_held_out_rows_do_not_depend_on_the_order_of_calls(tmp_path: Path) -> None:
    rows = tmp_path / "mine.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"text {i}\t{'yes' if i % 2 else 'no'}\n" for i in range(50)))
    data = Data("classify", train_file=rows)
    task = data.resolve()
    training, validation = data.examples(task, seed=3)
    assert (len(training), len(validation)) == (40, 10)
    assert not {example.text for example in training} & {example.text for example in validation}
    assert data.examples(task, seed=3)[1] == validation
    assert data.examples(task, seed=4)[1] != validation
    assert len(Data("classify", train_file=rows, rows=7).examples(task, seed=3)[0]) == 7


def member(folder: Path, seed: int, base: str = "tiny", **changes: object) -> Path:
    """A dense checkpoint folder of random weights."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(make_config(**changes))
    record = checkpoint.Record("classify", base, "finetune", seed, 1.5, extra={"train_rows": 160})
    checkpoint.save(folder, model, make_tokenizer(), record)
    return folder


def test_an_average_is_the_mean_of_every_weight(tmp_path: Path, sentiment_tsv: Path) -> None:
    data = Data("classify", train_file=sentiment_tsv)
    members = [member(tmp_path / str(seed), seed) for seed in range(3)]
    record = average(members, data, tmp_path / "mean")
    assert (record.stage, record.minutes, record.base_model) == ("average", 4.5, "tiny")
    assert len(record.extra["members"]) == 3
    assert set(record.metrics) == {"accuracy"}
    task = data.resolve()
    mean = checkpoint.load(str(tmp_path / "mean"), task).model.state_dict()
    weights = [checkpoint.load(str(folder), task).model.state_dict() for folder in members]
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([w[name] for w in weights]).mean(0))


def test_what_cannot_be_averaged_is_refused(tmp_path: Path, sentiment_tsv: Path) -> None:
    data = Data("classify", train_file=sentiment_tsv)
    one = member(tmp_path / "one", 1)
    factorized = BertForSequenceClassification(make_config())
    factorize_model(factorized, CompressionConfig(gamma=0.4, delta=0.375, block_size=8), KSVDConfig(1))
    record = checkpoint.Record("classify", "tiny", "ft-f-stf", 0, 1.0)
    checkpoint.save(tmp_path / "factorized", factorized, make_tokenizer(), record)
    for others, sentence in (
        ([], "at least two checkpoints, got 1"),
        ([member(tmp_path / "other", 2, base="another")], "do not come from one base .tiny and another."),
        ([member(tmp_path / "wide", 2, intermediate_size=128)], "do not come from one base;"),
        ([tmp_path / "factorized"], "is factorized; only dense"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            average([one, *others], data, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
