"""Time a training step of each schedule, in turns within one run, and the parts that the factorizer adds to one.

    make bench BENCH=training ARGS='--model nreimers/MiniLM-L6-H384-uncased --threads 2'

Rows of random tokens, all of one length. STF with an OMP interval of T is a step that codes afresh and T − 1 that only
solve for the values anew; those two are timed, and the others follow from them. Ratios are to the step of plain
fine-tuning in the same round, with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from compressor import checkpoint
from compressor.config import CompressionConfig, KSVDConfig, TrainConfig
from compressor.data import collate
from compressor.omp import Users, transposed_product
from compressor.pipeline import versions
from compressor.stf import code_model, factorize_model, solve_dictionaries, stacks_of
from compressor.tasks import find_task
from compressor.train import _Loop

INTERVALS = (1, 5, 8, 20, 50)
TASK = find_task("sst2")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def loops(options: argparse.Namespace) -> dict[str, _Loop]:
    """A training loop for each kind of step; `kept` is STF with supports that are never coded again."""
    plain = checkpoint.load(options.model, TASK).model
    teacher = copy.deepcopy(plain).eval().requires_grad_(False) if options.distill else None
    factorized = copy.deepcopy(plain)
    factorize_model(factorized, CompressionConfig(options.preset), KSVDConfig(iterations=1))
    frozen = copy.deepcopy(factorized)
    for stack in stacks_of(frozen):
        stack.freeze_supports()
    random = np.random.default_rng(0)
    vocabulary = plain.config.vocab_size
    rows = [
        {"input_ids": random.integers(vocabulary, size=options.length).astype(np.int32), "label": int(label)}
        for label in random.integers(2, size=8 * options.batch_size)
    ]
    common: dict[str, Any] = {
        "max_steps": 10**6,
        "batch_size": options.batch_size,
        "dropout": 0.0,
        "precision": options.precision,
        "distill_weight": 0.9 if options.distill else 0.0,
        "hidden_weight": 10.0 if options.distill else 0.0,
    }
    models = {"plain": (plain, 1), "coded": (factorized, 1), "kept": (copy.deepcopy(factorized), 10**6)}
    return {
        name: _Loop(model, rows, TASK, TrainConfig(**common, omp_interval=interval), 0, teacher)
        for name, (model, interval) in {**models, "frozen": (frozen, 1)}.items()
    }


def parts(loop: _Loop) -> dict[str, Callable[[], Any]]:
    """What STF does in a step besides training a dense model, and a teacher's forward pass."""
    model, stacks = loop.model, loop.stacks
    products = [(stack, stack.dense(), Users.of(stack.indices, stack.plan.n_atoms)) for stack in stacks]
    batch = collate(loop._next(), 0)
    batch.pop("labels")

    @torch.no_grad()
    def teacher() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=loop.bfloat16):
            model.eval()(**batch, output_hidden_states=True)

    return {
        "coding by OMP": lambda: code_model(model),
        "values anew on kept supports": lambda: code_model(model, afresh=False),
        "S·D": lambda: [stack.dense() for stack in stacks],
        "order of fresh nonzeros": lambda: [Users.of(stack.indices, stack.plan.n_atoms) for stack in stacks],
        "gradient of D": lambda: [
            transposed_product(stack.indices, stack.values, product, stack.plan.n_atoms, users)
            for stack, product, users in products
        ],
        "closed-form step of D": lambda: solve_dictionaries(model, 0.0),
        "a dense forward pass (the teacher's)": teacher,
    }


def time_in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call, by contender, after one round that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, one in contenders.items():
            began = clock()
            one()
            if number:
                taken[name].append(clock() - began)
    return taken


def steps_by_schedule(taken: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of a step on average, by schedule, round by round."""
    rows = {"plain fine-tuning": taken["plain"]}
    for interval in INTERVALS:
        pairs = zip(taken["coded"], taken["kept"], strict=True)
        rows[stf(interval)] = [(coded + (interval - 1) * kept) / interval for coded, kept in pairs]
    return {**rows, "FT-F-FT": taken["frozen"]}


def stf(interval: int) -> str:
    """The row of STF that codes afresh at every ``interval``-th step."""
    return f"STF, OMP every {interval}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="nreimers/MiniLM-L6-H384-uncased", help="Hub id or folder.")
    parser.add_argument("--preset", default="2.8x")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="Tokens of a row.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: of this process's own work, all threads together, where others want the processor too.",
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--distill", action="store_true", help="Learn from a teacher's logits and hidden states too.")
    parser.add_argument("--json", type=Path, help="Write the figures here as well (steps-NAME.json in a study).")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    contenders = loops(options)
    clock = CLOCKS[options.clock]
    taken = time_in_turns({name: loop.advance for name, loop in contenders.items()}, options.rounds, clock)
    schedules = steps_by_schedule(taken)
    about = {
        "cpu": kernels.cpu_name(),
        "threads": options.threads,
        "clock": options.clock,
        "bfloat16": contenders["plain"].bfloat16,
        "model": Path(options.model).name,
        "preset": options.preset,
        "rows": options.batch_size,
        "tokens": options.length,
        "distilled": options.distill,
        "rounds": options.rounds,
        "machine": platform.machine(),
        "versions": versions(),
    }
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ", end="\n\n")
    print("| step | ms | of plain fine-tuning (quartiles) |\n|---|---|---|")
    figures: dict[str, Any] = {"steps": {}, "parts": {}}
    kinds: dict[str, tuple[str, int | None]] = {"plain fine-tuning": ("finetune", None), "FT-F-FT": ("ft-f-ft", None)}
    kinds |= {stf(interval): ("ft-f-stf", interval) for interval in INTERVALS}
    for name, seconds in schedules.items():
        ratios = [own / plain for own, plain in zip(seconds, schedules["plain fine-tuning"], strict=True)]
        stage, interval = kinds[name]
        figures["steps"][name] = {**row(name, seconds, ratios), "stage": stage, "omp_interval": interval}
    print("\n| part of a step of STF | ms | of plain fine-tuning (quartiles) |\n|---|---|---|")
    pieces = {"plain": contenders["plain"].advance, **parts(contenders["coded"])}
    for name, seconds in (apart := time_in_turns(pieces, options.rounds, clock)).items():
        if name != "plain":
            ratios = [own / plain for own, plain in zip(seconds, apart["plain"], strict=True)]
            figures["parts"][name] = row(name, seconds, ratios)
    if options.json:
        options.json.write_text(json.dumps({**about, **figures}, indent=2) + "\n")


def row(name: str, seconds: list[float], ratios: list[float]) -> dict[str, Any]:
    """Print one row of a table; returns its figures."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    milliseconds = 1000 * statistics.median(seconds)
    print(f"| {name} | {milliseconds:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return {"ms": round(milliseconds, 2), "ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


if __name__ == "__main__":
    main()
