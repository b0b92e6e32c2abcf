"""A study's runs are done once and alike, whoever does them and however often it was killed; its page counts right."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

from compressor import checkpoint, pipeline
from compressor.config import ConfigError
from compressor.results import write_report
from compressor.study import Study, parse_variant, planned_runs
from compressor.tasks import find_task
from compressor.worker import dense_run, weight_errors, work_off

METHODS = "ds:iterations=2,svd,nm,ds:iterations=2:schedule=ft-f"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small heads, so that the paper's presets leave more atoms than a block has columns."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 16, "intermediate_size": 128}
    BertForSequenceClassification(make_config(**sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    (folder / "cola").mkdir()
    for split, count in (("train", 64), ("dev", 40)):
        rows = ["sentence\tlabel"]
        for _ in range(count):
            good = draw.random() < 0.5
            word = draw.choice(["good", "great"] if good else ["bad", "dull"])
            rows.append(f"the {draw.choice(['film', 'plot'])} was {word} .\t{int(good)}")
        (folder / "cola" / f"{split}.tsv.gz").write_bytes(gzip.compress("\n".join([*rows, ""]).encode()))
    return folder


@pytest.fixture
def study(base: Path, data: Path, tmp_path: Path) -> Study:
    return Study(
        model=str(base),
        tasks=("cola",),
        variants=tuple(parse_variant(word) for word in METHODS.split(",")),
        presets=("2.8x",),
        seeds=(0, 1),
        output=tmp_path / "study",
        work=tmp_path / "work",
        data=data,
        learning_rates=(1e-3, 3e-3),
        batch_size=16,
        dense_epochs=4,
        steps=4,
    )


def rows_of(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}


def scores(folder: Path) -> dict[str, float]:
    return {name: row["metrics"] for name, row in rows_of(folder).items()}


@pytest.fixture(scope="module")
def unbroken(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    found = command(base, data, folder)
    subprocess.run(found, check=True, capture_output=True, env=environment())
    return folder / "study"


def command(base: Path, data: Path, folder: Path) -> list[str]:
    words = (
        "--tasks cola --presets 2.8x --seeds 0,1 --learning-rates 1e-3,3e-3 --batch-size 16 --dense-epochs 4 --steps 4"
    )
    places = ["--model", base, "--data", data, "--output", folder / "study", "--work", folder / "work"]
    return [sys.executable, "-m", "compressor", "study", "--methods", METHODS, *words.split(), *map(str, places)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_every_run_has_a_row_and_its_own_size(unbroken: Path) -> None:
    rows = rows_of(unbroken)
    dense = [name for name in rows if "dense" in name]
    assert len(dense) == 3, "the grid with the first seed, its best rate with the second"
    assert len(rows) == len(dense) + 2 * len(METHODS.split(","))
    for row in rows.values():
        assert row["train_rows"] == 64
        if row["method"] == "svd":
            ds = rows[f"cola-{row['seed']}-ds_iterations=2-2.8x"]
            assert row["compression"]["ratio_target"] == ds["compression"]["ratio_eq11"], "equal by eq. 11"
        if row["method"] != "dense":
            own = [rows[name] for name in dense if rows[name]["seed"] == row["seed"]]
            assert row["drop"] == pytest.approx(max(each["score"] for each in own) - row["score"], abs=1e-3)
    untrained = rows["cola-0-ds_iterations=2_schedule=ft-f-2.8x"]
    assert (untrained["steps"], untrained["stage"]) == (0, "ft-f")


def test_a_killed_study_goes_on_to_the_rows_of_an_unbroken_one(
    base: Path, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    found = command(base, data, tmp_path)
    for rows_before_kill in (1, 4, 8):
        with subprocess.Popen(
            found, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            while len(rows_of(tmp_path / "study")) < rows_before_kill:
                assert running.poll() is None, "it ended by itself"
                time.sleep(0.02)
            running.send_signal(signal.SIGKILL)
    subprocess.run(found, check=True, capture_output=True, env=environment())
    assert scores(tmp_path / "study") == scores(unbroken)


def test_rows_of_another_reference_are_refused(study: Study, unbroken: Path) -> None:
    """A grid whose best is another rate has other teachers."""
    shutil.copytree(unbroken, study.output)
    best = dense_run(study, "cola", 0)
    assert best
    (other,) = set(study.learning_rates) - {best.learning_rate}
    with pytest.raises(ConfigError, match=rf"has learning_rate {best.learning_rate:g} there, {other:g} here"):
        work_off(replace(study, learning_rates=(other,)))


def test_rows_of_another_base_are_refused(base: Path, study: Study, unbroken: Path, tmp_path: Path) -> None:
    """It is known by its weights and not by its name: a copy is the same one."""
    shutil.copytree(unbroken, study.output)
    shutil.copytree(base, tmp_path / "copy")
    assert work_off(replace(study, model=str(tmp_path / "copy"))) == []
    other = BertForSequenceClassification.from_pretrained(base)
    torch.nn.init.normal_(other.bert.encoder.layer[1].output.dense.weight)
    other.save_pretrained(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"holds a study of another configuration: .* has weights \w+ there"):
        work_off(replace(study, model=str(tmp_path / "copy")))


def test_a_finetuned_model_is_its_own_reference(base: Path, study: Study, data: Path, tmp_path: Path) -> None:
    """It is measured once and left as it is, and teaches the runs of all seeds."""
    folder = tmp_path / "mine"
    made = pipeline.finetune(str(base), pipeline.Data("cola", data), pipeline.TrainConfig(max_steps=20), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    own = replace(study, model=str(folder), variants=(parse_variant("svd"),), finetuned=True)
    assert work_off(own) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    rows = rows_of(study.output)
    assert set(rows) == {"cola-0-dense", "cola-0-svd-2.8x", "cola-1-svd-2.8x"}
    assert rows["cola-0-dense"]["metrics"] == made.metrics
    for seed in (0, 1):
        row = rows[f"cola-{seed}-svd-2.8x"]
        assert row["drop"] == pytest.approx(made.metrics["matthews"] - row["score"], abs=1e-3)
        assert (row["base_model"], row["settings"]["reference"]["finetuned"]) == ("mine", True)
    assert "--finetuned" in rows["cola-0-dense"]["command"]
    assert rows["cola-0-dense"]["settings"]["train"] == {}, "the study has not trained it"
    assert work_off(own) == [], "nor is it of another configuration for that"
    listed = [line.split(" | ") for line in page_of(tmp_path / "page", *rows.values())]
    assert sorted(line[3] for line in listed if line[0] == "| mine, fine-tuned before") == ["dense", "svd", "svd"]
    with pytest.raises(ConfigError, match=r"finetuned True there, False here"):
        work_off(replace(own, finetuned=False))


def test_a_compressed_model_is_no_base(base: Path, study: Study, data: Path, tmp_path: Path) -> None:
    source, config = pipeline.Data("cola", data), pipeline.TrainConfig()
    pipeline.compress(str(base), source, _method(parse_variant("svd")), config, tmp_path / "small", schedule="ft-f")
    with pytest.raises(ConfigError, match=r"small is compressed by svd already; a study wants the dense model"):
        work_off(replace(study, model=str(tmp_path / "small"), finetuned=True))


def test_two_workers_share_the_runs(base: Path, data: Path, unbroken: Path, tmp_path: Path) -> None:
    found = command(base, data, tmp_path)
    workers = [subprocess.Popen(found, env=environment(), stdout=-1, stderr=-1, text=True) for _ in range(2)]
    logs = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], logs
    assert scores(tmp_path / "study") == scores(unbroken)
    done = [sum("measuring PyTorch on cola: 40 of 40" in line for line in log.splitlines()) for log in logs]
    assert sum(done) == len(scores(unbroken)), "a run was done twice"


def test_a_study_of_another_configuration_is_refused(study: Study, unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps 4 there, 5 here.*another --output"):
        work_off(replace(study, output=unbroken, steps=5))
    assert work_off(replace(study, output=unbroken)) == [], "the same one has nothing to do"


def test_what_cannot_be_run_is_said_before_anything_is(study: Study) -> None:
    wide = parse_variant("ds:gamma=0.01")
    with pytest.raises(ConfigError, match=r"needs more atoms than the block size"):
        work_off(replace(study, variants=(*study.variants, wide)))
    assert not study.output.exists()


def test_a_run_that_fails_is_named_and_the_others_are_done(study: Study) -> None:
    hot = parse_variant("svd:learning-rate=1e38")
    (sentence,) = work_off(replace(study, variants=(hot, parse_variant("svd")), seeds=(0,), steps=8))
    assert sentence.startswith("cola-0-svd_learning-rate=1e38-2.8x: the loss became nan")
    assert "cola-0-svd-2.8x" in rows_of(study.output)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("pca", r"unknown method 'pca'"),
        ("ds:speed=3", r"'ds:speed=3': there is no option 'speed'"),
        ("ds:iterations=few", r"'ds:iterations=few': iterations: .*integer"),
        ("svd:data-aware", r"--data-aware True means nothing to --method svd"),
        ("svd:schedule=sr-ste", r"--schedule sr-ste is not how --method svd is trained"),
        ("ds:seed=3", r"there is no option 'seed'"),
    ],
)
def test_words_that_mean_nothing(word: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_variant(word)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": ("poems",)}, r"a study knows the tasks rte, .*, not 'poems'"),
        ({"presets": ("9x",)}, r"unknown preset '9x'"),
        ({"seeds": (1, 1)}, r"--seeds wants at least one, each named once"),
        ({"learning_rates": ()}, r"--learning-rates wants at least one"),
        ({"finetuned": True, "tasks": ("cola", "mrpc")}, r"--finetuned model is of one task .* --tasks names 2"),
        ({"finetuned": True, "fake_quantize": True}, r"stays as it is, but --fake-quantize fine-tunes it"),
    ],
)
def test_settings_that_mean_nothing(study: Study, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(study, **change)


def test_sizes_of_the_study_are_not_for_what_has_its_own(study: Study) -> None:
    fixed = replace(study, variants=(parse_variant("nm"), parse_variant("ds:delta=0.5"), parse_variant("svd")))
    sizes = {(run.variant.label, run.size) for run in planned_runs(fixed) if run.variant}
    assert sizes == {("nm", ""), ("ds:delta=0.5", ""), ("svd", "2.8x")}


def test_ds_by_ratio_gets_that_of_the_preset(study: Study) -> None:
    """The knapsack in place of the paper's γ and δ, at the same size."""
    word = parse_variant("ds:ratio:iterations=2:calibration-rows=8:schedule=ft-f")
    assert work_off(replace(study, variants=(word, parse_variant("svd:schedule=ft-f")), seeds=(0,))) == []
    rows = {row["method"].split(":")[0]: row["compression"] for row in rows_of(study.output).values() if row["size"]}
    assert rows["ds"]["ratio_target"] == rows["svd"]["ratio_target"]
    assert rows["ds"]["ratio_eq11"] >= rows["ds"]["ratio_target"]
    assert rows["ds"]["sizes"], "of each matrix its own"


def test_a_broken_row_is_a_sentence(study: Study, unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "study" / "rows").mkdir(parents=True)
    (tmp_path / "study" / "rows" / "cola-0-dense-0.001.json").write_text('{"score": ')
    with pytest.raises(ConfigError, match=r"dense-0.001.json is no row of a study"):
        work_off(study)
    with pytest.raises(ConfigError, match=r"holds no rows"):
        write_report(tmp_path / "nothing", tmp_path / "results.md")


def test_no_training_leaves_the_factorization(base: Path, data: Path, tmp_path: Path) -> None:
    """Schedule ft-f: the checkpoint's weights are exactly those of its factors, and the head is the dense one's."""
    source = pipeline.Data("cola", data)
    variant = parse_variant("svd")
    method = _method(variant)
    config = pipeline.TrainConfig(max_steps=3, batch_size=8)
    record = pipeline.compress(str(base), source, method, config, tmp_path / "out", schedule="ft-f")
    found = checkpoint.load(str(tmp_path / "out"), find_task("cola"))
    dense = checkpoint.load(str(base), find_task("cola"))
    assert (record.stage, record.extra["steps"]) == ("ft-f", 0)
    assert torch.equal(found.model.classifier.weight, dense.model.classifier.weight)
    for factor in found.factors:
        weight = found.model.get_submodule(factor.members[0]).weight
        assert torch.allclose(weight, torch.from_numpy(factor.second @ factor.first), atol=1e-6)


def _method(variant: Any) -> Any:
    from compressor.config import MethodOptions
    from compressor.methods import find_method

    return find_method(variant.method).from_options(MethodOptions(preset="2.8x"))


def test_the_page_has_the_numbers_of_the_rows(study: Study, unbroken: Path, tmp_path: Path) -> None:
    weight_errors(replace(study, output=unbroken), iterations=2)
    write_report(unbroken, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    rows = rows_of(unbroken)
    svd = [row for row in rows.values() if row["method"] == "svd"]
    (line,) = [line for line in lines if line[0] == "svd" and len(line) == 6]
    mean = sum(row["score"] for row in svd) / 2
    assert line[1] == f"{svd[0]['compression']['ratio_eq11']:.2f}"
    assert line[2].startswith(f"{mean:.2f} ± ")
    assert line[4] == f"{sum(row['drop'] for row in svd) / 2:.2f}"
    listed = [line for line in lines if len(line) == 10 and line[:2] == ["base", "cola"]]
    assert len(listed) == len(rows), "every run is listed"
    command = next(iter(rows.values()))["command"]
    assert {line[-1] for line in listed} == {"1"}, "with its command"
    assert f"\n1. `{command}`\n" in text
    assert str(tmp_path) not in text, "no folder of a machine"
    for name in ("frontier.svg", "weights.svg"):
        assert f"(results/{name})" in text
        assert (tmp_path / "results" / name).stat().st_size > 1000
    before = text, (tmp_path / "results" / "frontier.svg").read_bytes()
    write_report(unbroken, tmp_path / "results.md")
    assert before == ((tmp_path / "results.md").read_text(), (tmp_path / "results" / "frontier.svg").read_bytes())


def test_notes_stand_before_the_numbers(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "notes.md").write_text("## In short\n\nAll is noise.\n")
    lines = page_of(tmp_path, *rows_of(unbroken).values())
    assert lines.index("# Results") < lines.index("All is noise.") < lines.index("## Accuracy after training")


def page_of(folder: Path, *rows: dict[str, Any]) -> list[str]:
    """The lines of the report of these rows."""
    (folder / "study" / "rows").mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        (folder / "study" / "rows" / f"{i}.json").write_text(json.dumps(row))
    write_report(folder / "study", folder / "results.md")
    return (folder / "results.md").read_text().splitlines()


def test_answers_kept_are_a_table_of_what_was_measured(unbroken: Path, tmp_path: Path) -> None:
    rows = rows_of(unbroken)
    small = [row for row in rows.values() if row["method"] != "dense"]
    assert all(0 <= row["agreement"] <= 100 for row in small)
    by_seed = [{**small[0], "method": "svd", "seed": seed, "agreement": 90.0 + seed} for seed in (0, 2)]
    old = {**small[0], "method": "nm"}
    del old["agreement"]
    lines = page_of(tmp_path, *by_seed, old)
    start = lines.index("## Answers kept")
    assert f"| svd | {small[0]['compression']['ratio_eq11']:.2f} | 91.00 ± 1.41 |" in lines
    assert not any(line.startswith("| nm") for line in lines[start : start + 8]), "rows of before have none"


def test_a_piece_is_measured_against_the_same_without_it(unbroken: Path, tmp_path: Path) -> None:
    scores = {"ds": 80.0, "ds:data-aware": 83.0, "ds:pull=1:data-aware": 82.0, "svd": 70.0, "ds:x=1:y=2": 90.0}
    _, some = min(rows_of(unbroken).items())
    same = {**some, "stage": "ft-f-stf", "size": "2x"}
    rows = [{**same, "method": method, "score": score} for method, score in scores.items()]
    lines = page_of(tmp_path, *rows, {**rows[0], "task": "mrpc"}, {**rows[3], "task": "mrpc"})
    assert "| data-aware | ds | 2x | cola | +3.00 |" in lines
    assert "| pull=1 | ds:data-aware | 2x | cola | -1.00 |" in lines
    assert sum("| 2x | cola |" in line for line in lines) == 2, "svd has no pieces; nor is there ds:x=1 alone"
    scored = lines[lines.index("## Accuracy after training") : lines.index("## Each piece alone")]
    methods = [line.split(" | ")[0].strip("| ") for line in scored if line.startswith("|")][2:]
    assert sorted(methods) == ["ds", "ds:x=1:y=2", "svd"], "pieces that were not run on all tasks stand apart"


def test_of_several_recipes_the_best_is_taken(unbroken: Path, tmp_path: Path) -> None:
    """As with the dense reference; all are listed, and what the rate alone does stands among the pieces."""
    some = {**rows_of(unbroken)["cola-0-svd-2.8x"], "stage": "ft-f-stf"}
    scores = {"ds": 50.0, "ds:learning-rate=2e-4": 60.0, "ds:max-steps=9": 55.0}
    lines = page_of(
        tmp_path, *({**some, "method": method, "score": score, "drop": 70 - score} for method, score in scores.items())
    )
    accuracy = [line for line in lines if line.startswith("| ds") and line.count("|") == 7]
    ratio = f"{some['compression']['ratio_eq11']:.2f}"
    assert accuracy == [f"| ds | {ratio} | 60.00 | 60.00 | 10.00 | 10.00 |"]
    assert "| learning-rate=2e-4 | ds | 2.8x | cola | +10.00 |" in lines
    assert sum(" | cola | 0 | ds" in line for line in lines) == 3


def test_tasks_have_tables_by_what_they_are_trained_on(unbroken: Path, tmp_path: Path) -> None:
    some = rows_of(unbroken)["cola-0-svd-2.8x"]
    tasks = {"cola": 10.0, "mrpc": 20.0, "qnli": 30.0, "squad": 40.0}
    lines = page_of(tmp_path, *({**some, "task": task, "score": score, "drop": 1.0} for task, score in tasks.items()))
    ratio = f"{some['compression']['ratio_eq11']:.2f}"
    assert f"| svd | {ratio} | 10.00 | 20.00 | 15.00 | 1.00 | 1.00 |" in lines, "the mean is that of whole tasks"
    assert f"| svd | {ratio} | 30.00 | 30.00 | 1.00 | 1.00 |" in lines
    assert f"| svd | {ratio} | 40.00 | 40.00 | 1.00 | 1.00 |" in lines
    assert [line for line in lines if line.startswith("### ")] == [
        "### GLUE",
        "### GLUE, tasks with a part of their training data",
        "### SQuAD",
    ]


def test_a_task_without_a_trained_run_takes_no_mean_from_the_others(unbroken: Path, tmp_path: Path) -> None:
    """It has its reference, and what is left untrained, but nothing to stand among the trained ones."""
    rows = rows_of(unbroken)
    dense = next(row for row in rows.values() if row["method"] == "dense")
    trained = {**rows["cola-0-svd-2.8x"], "score": 20.0, "drop": 5.0}
    untrained = {**trained, "task": "mrpc", "method": "svd:schedule=ft-f", "stage": "ft-f", "score": 7.0, "drop": 3.0}
    lines = page_of(tmp_path, dense, {**dense, "task": "mrpc"}, trained, untrained)
    ratio = f"{trained['compression']['ratio_eq11']:.2f}"
    assert f"| svd | {ratio} | 20.00 | 20.00 | 5.00 | 5.00 |" in lines
    assert f"| svd:schedule=ft-f | {ratio} | 7.00 | 7.00 | 3.00 | 3.00 |" in lines


def test_models_are_measured_as_they_are_stored(base: Path, study: Study, tmp_path: Path) -> None:
    """Exported and scored through ONNX Runtime; the page says how much smaller the whole file is, and what it loses."""
    one = replace(study, variants=tuple(map(parse_variant, ("ds:iterations=2", "svd"))), seeds=(0,), storage="float32")
    assert work_off(one) == []
    rows = rows_of(study.output)
    assert "stored" not in rows["cola-0-dense-0.001"]
    n_bytes = 4 * BertForSequenceClassification.from_pretrained(base).num_parameters()
    for name in ("cola-0-ds_iterations=2-2.8x", "cola-0-svd-2.8x"):
        stored = rows[name]["stored"]["float32"]
        assert stored["score"] == pytest.approx(rows[name]["score"]), "float32 is what PyTorch computes"
        assert stored["float32_bytes"] == n_bytes
        assert 0.2 * n_bytes < stored["file_bytes"] < n_bytes
    assert "--storage float32" in rows["cola-0-svd-2.8x"]["command"]
    svd = rows["cola-0-svd-2.8x"]
    svd["stored"]["float32"] = {"score": svd["score"] - 1.5, "file_bytes": 100, "float32_bytes": 250}
    lines = page_of(tmp_path / "page", *rows.values())
    assert "| method | CR | storage | file, times smaller | cola | mean |" in lines
    assert f"| svd | {svd['compression']['ratio_eq11']:.2f} | float32 | 2.50 | 1.50 | 1.50 |" in lines


def test_other_bases_have_sections_of_their_own(unbroken: Path, tmp_path: Path) -> None:
    rows = rows_of(unbroken)
    dense = max((row for row in rows.values() if row["method"] == "dense"), key=lambda row: row["score"])
    settings = {**dense["settings"], "reference": {**dense["settings"]["reference"], "fake_quantize": True}}
    there = {"base_model": "mini", "settings": settings}
    (tmp_path / "study" / "int8" / "rows").mkdir(parents=True)
    stored = {"int8": {"score": 11.5, "file_bytes": 20, "float32_bytes": 100}}
    for name, row in {"dense": dense, "svd": {**rows["cola-0-svd-2.8x"], "stored": stored}}.items():
        path = tmp_path / "study" / "int8" / "rows" / f"{name}.json"
        path.write_text(json.dumps({**row, **there, "score": 12.0, "drop": 0.5}))
    lines = page_of(tmp_path, *rows.values())
    section = lines[lines.index("## On mini, fine-tuned on an 8-bit grid") :]
    assert "| dense | 1.00 | 12.00 | 12.00 | 0.50 | 0.50 |" in section
    assert any(line.startswith("| svd | ") and "| 12.00 | 12.00 | 0.50 | 0.50 |" in line for line in section)
    assert any(line.startswith("| svd | ") and "| int8 | 5.00 | 0.50 | 0.50 |" in line for line in section)
    accuracy = lines[lines.index("## Accuracy after training") : lines.index("## On mini, fine-tuned on an 8-bit grid")]
    assert not any("12.00" in line for line in accuracy), "bases are not mixed"
    assert any(line.startswith("| mini, fine-tuned on an 8-bit grid | cola |") for line in lines), "its runs are listed"


def test_schedules_are_compared_where_gamma_is_the_same(unbroken: Path, tmp_path: Path) -> None:
    """A preset's row is a point of the curve of δ, if no other option is set and its γ is that of the curve; of several
    recipes the best is."""
    _, some = min(rows_of(unbroken).items())

    def row(method: str, score: float, delta: float, gamma: float = 0.125, stage: str = "ft-f-stf") -> dict[str, Any]:
        compression = {"gamma": {"qkv": gamma}, "delta": delta, "block_size": 32, "ratio_eq11": 3.0}
        return {**some, "method": method, "score": score, "stage": stage, "compression": compression}

    lines = page_of(
        tmp_path,
        row("ds:data-aware:delta=0.0625", 70.0, 0.0625),
        row("ds:data-aware:delta=0.0625:schedule=ft-f-ft", 59.0, 0.0625, stage="ft-f-ft"),
        row("ds:data-aware:delta=0.0625:schedule=ft-f-ft:max-steps=9", 60.0, 0.0625, stage="ft-f-ft"),
        row("ds:data-aware", 75.0, 0.125),
        {**row("ds:data-aware", 99.0, 0.28, gamma=0.14), "size": "2x"},
        row("ds:delta=0.09375", 50.0, 0.09375),
        row("ds:data-aware:pull=1", 97.0, 0.1875),
    )
    assert "| task | method | schedule | S = 2 | S = 3 | S = 4 |" in lines
    assert "| cola | ds | ft-f-stf |  | 50.00 |  |" in lines
    assert "| cola | ds:data-aware | ft-f-stf | 70.00 |  | 75.00 |" in lines
    assert "| cola | ds:data-aware | ft-f-ft | 60.00 |  |  |" in lines
    assert (tmp_path / "results" / "schedules.svg").stat().st_size > 1000


def test_scores_stand_beside_what_a_step_costs(unbroken: Path, tmp_path: Path) -> None:
    _, some = min(rows_of(unbroken).items())

    def row(method: str, score: float, interval: int = 8, stage: str = "ft-f-stf", size: str = "2x") -> dict[str, Any]:
        settings = {**some["settings"], "train": {**some["settings"]["train"], "omp_interval": interval}}
        return {**some, "method": method, "score": score, "stage": stage, "size": size, "settings": settings}

    kinds = {
        "plain fine-tuning": ("finetune", None),
        "STF, OMP every 1": ("ft-f-stf", 1),
        "STF, OMP every 8": ("ft-f-stf", 8),
        "FT-F-FT": ("ft-f-ft", None),
    }
    about = {"model": "m", "preset": "2x", "rows": 4, "tokens": 5, "cpu": "c", "threads": 2, "rounds": 3}
    step = {"ms": 10.4, "ratio": 1.5, "quartiles": [1.25, 1.75]}
    steps = {name: {**step, "stage": stage, "omp_interval": interval} for name, (stage, interval) in kinds.items()}
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "steps-2x.json").write_text(json.dumps({**about, "distilled": True, "steps": steps}))
    lines = page_of(
        tmp_path,
        row("ds:data-aware", 80.0),
        row("ds:data-aware:omp-interval=1", 81.0, 1),
        row("ds:data-aware:omp-interval=1", 99.0, 1, size="2.8x"),
        row("ds:data-aware:schedule=ft-f-ft", 70.0, stage="ft-f-ft"),
        row("ds:data-aware:pull=1", 98.0),
    )
    assert "| step | ms | of plain fine-tuning | cola, ds:data-aware |" in lines
    assert "| plain fine-tuning | 10 | 1.50 (1.25 to 1.75) |  |" in lines
    assert "| STF, OMP every 1 | 10 | 1.50 (1.25 to 1.75) | 81.00 |" in lines
    assert "| STF, OMP every 8 | 10 | 1.50 (1.25 to 1.75) | 80.00 |" in lines
    assert "| FT-F-FT | 10 | 1.50 (1.25 to 1.75) | 70.00 |" in lines


def test_processes_that_train_together_do_each_run_once(base: Path, data: Path, unbroken: Path, tmp_path: Path) -> None:
    """torchrun with two processes: the rows of one, up to the order of sums."""
    words = command(base, data, tmp_path)[3:]
    words[words.index("--methods") + 1] = "ds:iterations=2"
    words[words.index("--seeds") + 1] = "0"
    done = launch("-m", "compressor", *words)
    assert done.returncode == 0, done.stderr
    found = rows_of(tmp_path / "study")
    assert set(found) == {"cola-0-dense-0.001", "cola-0-dense-0.003", "cola-0-ds_iterations=2-2.8x"}
    for name, row in found.items():
        assert row["score"] == pytest.approx(rows_of(unbroken)[name]["score"], abs=5), name


def test_a_reference_whose_checkpoint_is_gone_is_trained_again(study: Study) -> None:
    """Rows are committed and checkpoints are not: on another machine the study is widened all the same."""
    narrow = replace(study, variants=(parse_variant("svd"),), seeds=(0,))
    assert work_off(narrow) == []
    before = rows_of(study.output)
    shutil.rmtree(study.work)
    assert work_off(narrow) == []
    assert not list(study.work.glob("cola*")), "nothing is left to teach"
    wide = replace(narrow, variants=(parse_variant("svd"), parse_variant("svd:schedule=ft-f")))
    assert work_off(wide) == []
    after = rows_of(study.output)
    assert len(after) == len(before) + 1
    assert {name: row["metrics"] for name, row in before.items()} == {name: after[name]["metrics"] for name in before}
