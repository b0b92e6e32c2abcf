"""``dsformer-compress``: finetune, compress, export, evaluate, or ``run`` for all of it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from compressor.config import (
    CLASSIFY_LENGTH,
    OMP_INTERVAL,
    QA_LENGTH,
    SHORT_CALIBRATION_ROWS,
    CompressionConfig,
    ConfigError,
    KSVDConfig,
    MethodOptions,
    TrainConfig,
)
from compressor.data import DataError
from compressor.files import SaveError
from compressor.progress import console
from compressor.tasks import UnknownTaskError, find_task

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
stdout = Console()

Model = Annotated[str, typer.Option(help="Hugging Face hub id, or a folder.")]
TaskName = Annotated[
    str,
    typer.Option(
        help="cola, sst2, mrpc, stsb, rte, qnli, qqp, mnli, squad, squad_v2; classify or qa for your own files."
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data", help="Folder with the tasks' files; without it and without files of your own, the hub."),
]
TrainFile = Annotated[Path | None, typer.Option(help="Your own TSV, CSV, JSONL or SQuAD JSON.")]
ValidationFile = Annotated[
    Path | None, typer.Option(help="The same for measuring; without it a fifth of --train-file is held out.")
]
Rows = Annotated[int | None, typer.Option(min=1, help="Draw only this many training rows.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Preset = Annotated[str, typer.Option(help="2x, 2.8x or 3.57x.")]
Gamma = Annotated[float | None, typer.Option(help="Atoms per output row (K = γM), instead of the preset's.")]
Delta = Annotated[float | None, typer.Option(help="Nonzeros per column of a block (S = δB), instead of the preset's.")]
BlockSize = Annotated[int, typer.Option(help="Columns per block (B); 0 takes the head size.")]
LimitBanks = Annotated[
    bool, typer.Option(help="Spread a row's nonzeros over the banks of its dictionary: hardly less exact, and faster.")
]
Iterations = Annotated[int, typer.Option(help="Sweeps of K-SVD.")]
Update = Annotated[
    Literal["auto", "mod", "ksvd"],
    typer.Option(
        "--dictionary-update", help="How K-SVD updates the dictionary; auto keeps the better, block by block."
    ),
]
MethodName = Annotated[
    Literal["ds", "svd", "fwsvd", "drone", "nm"],
    typer.Option(
        help="DSFormer, low rank (plain, weighted by Fisher information, by the layers' inputs), N:M sparsity."
    ),
]
MethodSchedule = Annotated[
    Literal["ft-f-stf", "ft-f-ft", "sr-ste", "ft-f"] | None,
    typer.Option(
        help="How the factorized model is trained: ft-f-stf (default of ds), fixed structure (ft-f-ft, of all others), "
        "sr-ste, which moves the mask of nm, or ft-f: not at all."
    ),
]
MethodPreset = Annotated[str | None, typer.Option(help="2x, 2.8x or 3.57x (2.8x if no --ratio is given; not for nm).")]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Target by eq. 11 instead of a preset; ds chooses the sizes of each matrix for it, on training rows."
    ),
]
Pattern = Annotated[str, typer.Option(help="nm: weights that stay, of how many neighbours.")]
SparseDecay = Annotated[float, typer.Option(help="nm with sr-ste: pull of masked weights to zero.")]
CalibrationRows = Annotated[
    int | None,
    typer.Option(
        help="Training rows to look at before factorizing (data-aware ds, ds with --ratio, fwsvd, drone); "
        f"if not given {SHORT_CALIBRATION_ROWS}, or {MethodOptions.calibration_rows} windows for question answering."
    ),
]
DataAware = Annotated[
    bool | None,
    typer.Option(help="Factorize for the layers' outputs on training data, in place of their weights; default of ds."),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        help="Factorize layer after layer, each for the inputs that it gets from those before it as they are by then; "
        "default of a data-aware ds that is not trained (--schedule ft-f), and of use there above all."
    ),
]
WeighOutputs = Annotated[
    bool | None,
    typer.Option(
        help="Weigh each output of a layer by how far the model's hidden states move with it (data-aware ds, drone); "
        "default of ds."
    ),
]
OrderNeurons = Annotated[
    bool,
    typer.Option(
        help="Renumber the feed-forward neurons first, so that neighbouring columns are alike: exact, and free."
    ),
]
Epochs = Annotated[
    float | None, typer.Option(help="Passes over the training data; if not given 2, or more to make 100 steps.")
]
Steps = Annotated[int, typer.Option(help="Optimiser steps instead of epochs (0: by epochs).")]
Batch = Annotated[int, typer.Option(help="Examples per step.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
DictionaryRate = Annotated[float, typer.Option(help="Peak learning rate of the dictionaries.")]
Length = Annotated[int, typer.Option(help="Tokens per window (0: 128, or 384 for question answering).")]
Dropout = Annotated[float | None, typer.Option(help="Dropout share (the model's own if not given).")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 where the processor has it.")
]
Seed = Annotated[int, typer.Option(help="Seed of heads, order and factorization.")]
Distill = Annotated[
    bool, typer.Option("--distill/--no-distill", help="Learn from the dense fine-tuned teacher as well.")
]
DistillWeight = Annotated[
    float, typer.Option(help="Share of the teacher's answers in the loss, beside the labels; 1: no labels at all.")
]
Teacher = Annotated[
    str | None,
    typer.Option(help="Checkpoint to learn from besides the task; by default the model before its factorization."),
]
Hidden = Annotated[float, typer.Option(help="Weight of the relative distance to the teacher's hidden states.")]
Attention = Annotated[float, typer.Option(help="Weight of the divergence from the teacher's attention maps.")]
Interval = Annotated[int, typer.Option(help="Steps between fresh codings; in between the supports are kept.")]
Pull = Annotated[float, typer.Option(help="Pull of the weights to their factorization, relative to the gradient.")]
DictionaryNorm = Annotated[float, typer.Option(help="The dictionaries' gradient is clipped to this norm.")]
ClosedForm = Annotated[
    float,
    typer.Option(help="How far a step takes dictionaries to their least-squares solution; 0: by gradient instead."),
]
Hysteresis = Annotated[
    float, typer.Option(help="A row keeps its support unless another lowers its error by more than this share.")
]
FrozenShare = Annotated[
    float, typer.Option(help="Share of the steps, the last ones, that keep all supports and train the factors.")
]
EvaluateEvery = Annotated[
    int,
    typer.Option(
        help="Measure on the validation data after so many steps and keep the best weights (0: keep the last). Scores "
        "of weights chosen like this are a little too good for unseen data."
    ),
]
StorageName = Literal["int8", "int16", "float16", "float32"]
StorageType = Annotated[
    StorageName,
    typer.Option(help="How the model folder stores weights; integers: those not factorized as float16."),
]
Finetuned = Annotated[bool, typer.Option("--finetuned", help="--model is fine-tuned for this task already.")]
FakeQuantize = Annotated[
    bool, typer.Option(help="Fine-tune on an 8-bit grid of weights and inputs, as Q8BERT; the weights stay on it.")
]
EmbeddingsType = Annotated[
    Literal["int8", "float16", "float32"] | None,
    typer.Option(
        help="How it stores the tables of embeddings; int8 with one scale a row. If not given as --storage, or float16 "
        "beside int16."
    ),
]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Go on from the checkpoint of a killed run.")]


def _data(task: str, data: Path | None, train_file: Path | None, validation_file: Path | None, rows: int | None) -> Any:
    from compressor.pipeline import Data

    return Data(task, data, train_file, validation_file, rows)


def _method(values: Mapping[str, Any]) -> Any:
    """The method that a command's options say, by their names."""
    from compressor.methods import find_method

    given = {option.name: values[option.name] for option in fields(MethodOptions)}
    if given["data_aware"] is None:
        given["data_aware"] = values["method"] == "ds"
    if given["sequential"] is None:
        given["sequential"] = given["data_aware"] and values["schedule"] == "ft-f"
    if given["weigh_outputs"] is None:
        given["weigh_outputs"] = given["data_aware"]
    if given["calibration_rows"] is None:
        chooses_sizes = values["method"] == "ds" and given["ratio"] is not None
        looks = given["data_aware"] or chooses_sizes or values["method"] in ("fwsvd", "drone")
        short = find_task(values["task"]).kind != "qa"
        given["calibration_rows"] = SHORT_CALIBRATION_ROWS if looks and short else MethodOptions.calibration_rows
    return find_method(values["method"]).from_options(MethodOptions(**given))


def _length(length: int, task: str) -> int:
    return length or (QA_LENGTH if find_task(task).kind == "qa" else CLASSIFY_LENGTH)


def _passes(epochs: float | None) -> dict[str, Any]:
    return {"min_steps": 100} if epochs is None else {"epochs": epochs}


@app.command()
def finetune(
    model: Model,
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    rows: Rows = None,
    epochs: Epochs = None,
    steps: Steps = 0,
    batch_size: Batch = 32,
    learning_rate: Rate = 5e-5,
    max_length: Length = 0,
    dropout: Dropout = None,
    precision: Precision = "auto",
    seed: Seed = 0,
    evaluate_every: EvaluateEvery = 0,
    fake_quantize: FakeQuantize = False,
    resume: Resume = False,
) -> None:
    """Fine-tune a model densely; the checkpoint is an ordinary Hugging Face folder.

    Several processes do it together when torchrun or accelerate launch starts them.
    """
    from compressor import pipeline

    config = TrainConfig(
        **_passes(epochs),
        max_steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=_length(max_length, task),
        dropout=dropout,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
    )
    source = _data(task, data, train_file, validation_file, rows)
    record = pipeline.finetune(model, source, config, output, fake_quantize=fake_quantize, resume=resume)
    _show(record.metrics, str(output))


@app.command()
def share(
    model: Model,
    output: Output,
    groups: Annotated[int, typer.Option(help="Layers with weights of their own; the others repeat them.")] = 1,
) -> None:
    """Make a BERT's layers share their weights, as ALBERT's do; fine-tune the result afterwards."""
    from compressor.share import share_folder

    _show(share_folder(model, output, groups), str(output))


@app.command()
def compress(
    model: Model,
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    rows: Rows = None,
    method: MethodName = "ds",
    preset: MethodPreset = None,
    ratio: Ratio = None,
    gamma: Gamma = None,
    delta: Delta = None,
    block_size: BlockSize = 0,
    limit_banks: LimitBanks = True,
    iterations: Iterations = 50,
    dictionary_update: Update = "mod",
    data_aware: DataAware = None,
    sequential: Sequential = None,
    weigh_outputs: WeighOutputs = None,
    order_neurons: OrderNeurons = False,
    pattern: Pattern = MethodOptions.pattern,
    sparse_decay: SparseDecay = MethodOptions.sparse_decay,
    calibration_rows: CalibrationRows = None,
    schedule: MethodSchedule = None,
    epochs: Epochs = None,
    steps: Steps = 0,
    batch_size: Batch = 32,
    learning_rate: Rate = 1e-4,
    dictionary_learning_rate: DictionaryRate = 1e-3,
    max_length: Length = 0,
    dropout: Dropout = 0.0,
    precision: Precision = "auto",
    seed: Seed = 0,
    distill: Distill = True,
    distill_weight: DistillWeight = TrainConfig.distill_weight,
    hidden_weight: Hidden = 10.0,
    attention_weight: Attention = 0.0,
    teacher: Teacher = None,
    omp_interval: Interval = OMP_INTERVAL,
    pull: Pull = 0.0,
    dictionary_max_grad_norm: DictionaryNorm = 1.0,
    closed_form_share: ClosedForm = 0.0,
    support_hysteresis: Hysteresis = 0.0,
    frozen_share: FrozenShare = 0.0,
    evaluate_every: EvaluateEvery = 0,
    resume: Resume = False,
) -> None:
    """Factorize a fine-tuned checkpoint and train through the factorization; or train a compressed one on.

    Several processes do it together when torchrun or accelerate launch starts them.
    """
    from compressor import pipeline

    chosen = _method(locals())
    config = TrainConfig(
        **_passes(epochs),
        max_steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dictionary_learning_rate=dictionary_learning_rate,
        max_length=_length(max_length, task),
        dropout=dropout,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
        distill_weight=distill_weight if distill else 0.0,
        hidden_weight=hidden_weight if distill else 0.0,
        attention_weight=attention_weight if distill else 0.0,
        omp_interval=omp_interval,
        pull=pull,
        dictionary_max_grad_norm=dictionary_max_grad_norm,
        closed_form_share=closed_form_share,
        support_hysteresis=support_hysteresis,
        frozen_share=frozen_share,
    )
    record = pipeline.compress(
        model,
        _data(task, data, train_file, validation_file, rows),
        chosen,
        config,
        output,
        schedule=schedule,
        teacher=teacher,
        resume=resume,
    )
    kept = {name: value for name, value in record.extra.items() if name == "agreement"}
    _show({**record.metrics, **kept}, str(output))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, dense or compressed.")],
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    storage: StorageType = "int8",
    embeddings: EmbeddingsType = None,
    measure: Annotated[bool, typer.Option(help="Measure the exported model on the validation set.")] = True,
) -> None:
    """Write the model folder that the service loads."""
    from compressor import pipeline

    card = pipeline.export_checkpoint(
        checkpoint,
        _data(task, data, train_file, validation_file, None),
        output,
        storage=storage,
        embeddings=embeddings,
        measure=measure,
    )
    _show({**card.get("metrics", {}), **card["sizes"]}, str(output))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A model folder (ONNX) or a checkpoint folder (PyTorch).")],
    task: TaskName,
    data: DataFolder = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
) -> None:
    """Measure the task's own metrics over the whole validation set."""
    from compressor import checkpoint as checkpoints
    from compressor.evaluate import evaluate_folder, evaluate_model

    source = _data(task, data, train_file, validation_file, None)
    resolved = source.resolve()
    examples = source.validation(resolved)
    if (model / "model.onnx").is_file():
        metrics = evaluate_folder(model, resolved, examples)
    else:
        loaded = checkpoints.load(str(model), resolved)
        metrics = evaluate_model(loaded.model, loaded.tokenizer, resolved, examples)
    _show(metrics, str(model))


@app.command()
def errors(
    model: Model,
    task: TaskName = "sst2",
    preset: Preset = "2.8x",
    gamma: Gamma = None,
    delta: Delta = None,
    block_size: BlockSize = 0,
    limit_banks: LimitBanks = True,
    iterations: Iterations = 50,
    dictionary_update: Update = "mod",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here as well.")] = None,
) -> None:
    """K-SVD against SVD of the same eq.-11 size, matrix by matrix: no data and no training."""
    from compressor import pipeline

    rows = pipeline.error_table(
        model,
        task,
        CompressionConfig(preset, gamma, delta, block_size, limit_banks),
        KSVDConfig(iterations, dictionary_update),
    )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    stdout.print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


@app.command()
def synthetic(
    shape: Annotated[str, typer.Option(help="bert-base, bert-large, distilbert-base, minilm-l6-h384, …")],
    output: Annotated[Path, typer.Option(help="Where to write the model folders dense and dsformer.")],
    preset: Preset = "2.8x",
    gamma: Gamma = None,
    delta: Delta = None,
    block_size: BlockSize = 0,
    limit_banks: LimitBanks = True,
    seed: Seed = 0,
    storage: StorageType = "int8",
) -> None:
    """A dense and a compressed model folder with random weights, to time any shape without training it."""
    from compressor.synthetic import write_folders

    compression = CompressionConfig(preset, gamma, delta, block_size, limit_banks)
    sizes = write_folders(shape, compression, output, storage=storage, seed=seed)
    for variant, numbers in sizes.items():
        _show(numbers, str(output / variant))


@app.command()
def run(
    model: Model,
    task: TaskName,
    output: Output,
    data: DataFolder = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    rows: Rows = None,
    method: MethodName = "ds",
    preset: MethodPreset = None,
    ratio: Ratio = None,
    gamma: Gamma = None,
    delta: Delta = None,
    block_size: BlockSize = 0,
    limit_banks: LimitBanks = True,
    iterations: Iterations = 50,
    dictionary_update: Update = "mod",
    data_aware: DataAware = None,
    sequential: Sequential = None,
    weigh_outputs: WeighOutputs = None,
    order_neurons: OrderNeurons = False,
    pattern: Pattern = MethodOptions.pattern,
    sparse_decay: SparseDecay = MethodOptions.sparse_decay,
    calibration_rows: CalibrationRows = None,
    schedule: MethodSchedule = None,
    finetuned: Finetuned = False,
    epochs: Epochs = None,
    learning_rate: Rate = 5e-5,
    dense_dropout: Dropout = None,
    compress_epochs: Epochs = None,
    compress_steps: Steps = 0,
    compress_learning_rate: Rate = 1e-4,
    dictionary_learning_rate: DictionaryRate = 1e-3,
    batch_size: Batch = 32,
    max_length: Length = 0,
    precision: Precision = "auto",
    seed: Seed = 0,
    distill: Distill = True,
    distill_weight: DistillWeight = TrainConfig.distill_weight,
    hidden_weight: Hidden = 10.0,
    omp_interval: Interval = OMP_INTERVAL,
    evaluate_every: EvaluateEvery = 0,
    storage: StorageType = "int8",
    embeddings: EmbeddingsType = None,
    dense_output: Annotated[Path | None, typer.Option(help="Keep the dense model folder here as well.")] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints between the stages; a killed run goes on from here.")] = Path(
        "runs"
    ),
) -> None:
    """Fine-tune, compress, export and measure; run it again after a kill and it goes on where it was."""
    from compressor import pipeline

    chosen = _method(locals())
    dense = TrainConfig(
        **_passes(epochs),
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=_length(max_length, task),
        dropout=dense_dropout,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
    )
    compressing = TrainConfig(
        **_passes(compress_epochs),
        max_steps=compress_steps,
        batch_size=batch_size,
        learning_rate=compress_learning_rate,
        dictionary_learning_rate=dictionary_learning_rate,
        max_length=_length(max_length, task),
        dropout=0.0,
        precision=precision,
        seed=seed,
        evaluate_every=evaluate_every,
        distill_weight=distill_weight if distill else 0.0,
        hidden_weight=hidden_weight if distill else 0.0,
        omp_interval=omp_interval,
    )
    card = pipeline.run(
        model,
        _data(task, data, train_file, validation_file, rows),
        chosen,
        dense,
        compressing,
        output,
        work=work,
        dense_output=dense_output,
        finetuned=finetuned,
        schedule=schedule,
        storage=storage,
        embeddings=embeddings,
    )
    _show(
        {
            **{f"dense {name}": value for name, value in card["dense"]["metrics"].items()},
            **{f"{method} {name}": value for name, value in card["metrics"].items()},
            **card["sizes"],
        },
        str(output),
    )


@app.command()
def study(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names of tasks, by commas.")],
    output: Annotated[Path, typer.Option(help="Folder of the study: a JSON file for each run.")],
    methods: Annotated[
        str,
        typer.Option(
            help="By commas: ds, svd, fwsvd, drone, nm, each perhaps with options of compress behind colons, such as "
            "nm:schedule=sr-ste or ds:data-aware:omp-interval=1. ft-f as schedule is no training at all."
        ),
    ] = "ds,svd,fwsvd,drone,nm,nm:schedule=sr-ste",
    presets: Annotated[str, typer.Option(help="Sizes, by commas; every method gets that of ds by eq. 11.")] = (
        "2x,2.8x,3.57x"
    ),
    seeds: Annotated[str, typer.Option(help="Whole numbers, by commas.")] = "0",
    data: DataFolder = None,
    work: Annotated[Path, typer.Option(help="Checkpoints of the runs.")] = Path("runs/study"),
    learning_rates: Annotated[str, typer.Option(help="Grid of the dense reference, by commas.")] = "5e-5,1e-4",
    rows: Rows = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step, for all tasks.")] = None,
    dense_epochs: Annotated[float | None, typer.Option(help="Epochs of the dense reference, for all tasks.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps after the factorization, for all tasks.")] = None,
    max_length: Length = 0,
    fake_quantize: FakeQuantize = False,
    finetuned: Finetuned = False,
    storage: Annotated[
        StorageName | None, typer.Option(help="Export every compressed model so, too, and measure what comes of it.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write tables (Markdown) and plots (SVG, beside it) here.")
    ] = None,
) -> None:
    """Run every method on every task and seed at every size; then tables and plots.

    Runs that are there already are not run again. Several processes may work on one folder: start the same command as
    often as there are cores or GPUs to spare.
    """
    from compressor import processes
    from compressor.results import write_report
    from compressor.study import Study, parse_variant
    from compressor.worker import weight_errors, work_off

    plan = Study(
        model=model,
        tasks=_words(tasks),
        variants=tuple(parse_variant(word) for word in _words(methods)),
        presets=_words(presets),
        seeds=_numbers("seeds", seeds, int),
        output=output,
        work=work,
        data=data,
        learning_rates=_numbers("learning-rates", learning_rates, float),
        batch_size=batch_size,
        rows=rows,
        dense_epochs=dense_epochs,
        steps=steps,
        max_length=max_length,
        fake_quantize=fake_quantize,
        finetuned=finetuned,
        storage=storage,
    )
    failed = work_off(plan)
    if processes.is_first():
        weight_errors(plan)
        if report:
            write_report(output, report)
    if failed:
        raise ConfigError(f"{len(failed)} runs could not be done: {'; '.join(failed)}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError as error:
        raise ConfigError(f"--{name} wants numbers, by commas; got {text!r}") from error


def _show(numbers: dict[str, Any], title: str) -> None:
    """Numbers on standard output, as JSON for programs or a table for people."""
    from compressor import processes

    if not processes.is_first():
        return
    if not sys.stdout.isatty():
        print(json.dumps(numbers))
        return
    table = Table("", "", title=title, show_header=False)
    for name, value in numbers.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    stdout.print(table)


def main() -> None:
    """The console command: what a user can mend is one sentence and exit status 2, never a traceback."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    from compressor import processes
    from compressor.export import ExportError
    from compressor.train import TrainingError

    processes.join()
    if not processes.is_first():
        logging.disable(logging.INFO)
    try:
        app()
    except (
        ConfigError,
        DataError,
        SaveError,
        TrainingError,
        ExportError,
        UnknownTaskError,
        ValueError,
    ) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from error
    finally:
        processes.leave()


if __name__ == "__main__":
    main()
