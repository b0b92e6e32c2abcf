"""What names a stage of ``run``: settings and files, so that a changed file is never mistaken for the old one."""

from pathlib import Path

import pytest
from tiny import make_config
from transformers import BertForSequenceClassification

from compressor.config import ConfigError, TrainConfig
from compressor.pipeline import Data, _digest, _require_alike


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


@pytest.mark.parametrize(
    ("changes", "compared", "told"),
    [
        ({"num_attention_heads": 8}, {"attention_weight": 1.0}, "num_attention_heads is 8, but the model's 4"),
        ({"num_hidden_layers": 3}, {"attention_weight": 1.0}, "num_hidden_layers is 3, but the model's 2"),
        ({"num_attention_heads": 8}, {"hidden_weight": 1.0}, None),
        ({"num_hidden_layers": 3}, {}, None),
    ],
)
def test_a_teacher_has_what_is_compared(
    changes: dict[str, object], compared: dict[str, float], told: str | None
) -> None:
    teacher = BertForSequenceClassification(make_config(**changes))
    model = BertForSequenceClassification(make_config())
    if told is None:
        _require_alike(teacher, model, TrainConfig(**compared))  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=told):
        _require_alike(teacher, model, TrainConfig(**compared))  # type: ignore[arg-type]
