"""`dsformer-bench folders`, also `python -m service.bench`: model folders against each other, in one run here.

Noise hits whoever happens to run when it comes, so the folders take turns: each has one in every round, forwards
in one round and backwards in the next, and a ratio is always of two runs of the same round. What is reported is the
median, with the quartiles as its spread. The runs are the service's own: same session options, same padding. Other
systems can take their turns too, on the graph of the first dense folder (`peers.py`). Load time and peak memory are
of processes that hold one folder alone (`alone.py`), and so is the check of every compressed folder's answers.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

import kernels
from service import alone, artifact, peers, plots
from service.alone import random_rows
from service.bench_options import Flags, command, progress, write_json
from service.errors import StartError
from service.model import OnnxModel
from service.settings import available_cpus
from service.tokenizer import Row

# Of random tokens, for peers that are quantized: time does not depend on how many.
CALIBRATION_ROWS = 4
# The most that a compressed model's answers may differ from the scalar tier's, relative to the largest: several times
# what 8-bit integers cost, and far less than a mistake would.
LARGEST_DIFFERENCE = 0.1


class Options(Flags):
    """Time model folders against the first of them, over batch x length."""

    model_config = SettingsConfigDict(cli_prog_name="dsformer-bench folders")

    folders: CliPositionalArg[list[Path]] = Field(
        default_factory=list, description="Model folders; every ratio is to the first."
    )
    synthetic: str | None = Field(
        default=None,
        description="Also make a dense and a compressed model of this shape (bert-base, ...) and time them.",
    )
    preset: str = Field(default="2.8x", description="Compression of the synthetic model: 2x, 2.8x or 3.57x.")
    keep: Path | None = Field(default=None, description="Where to leave the synthetic folders, dense and dsformer.")
    peers: str = Field(
        default="",
        description=f"Other systems on the first dense folder: {', '.join(peers.PACKAGES)}, or installed for all here.",
    )
    deepsparse: Path | None = Field(
        default=None, description="A Python interpreter that has DeepSparse: it becomes one more peer."
    )
    shapes: str = Field(default="1x32,1x128,1x384,8x128", description="Batch x tokens, comma-separated.")
    rounds: int = Field(default=20, ge=1, description="Runs of each folder per shape.")
    warm_up: int = Field(default=3, ge=0, description="Runs of each folder per shape that are not counted.")
    loads: int = Field(default=3, ge=0, description="Processes per folder that measure load time and memory; 0: none.")
    threads: int = Field(default_factory=available_cpus, ge=1, le=1024, description="CPU threads of one run.")
    plot: Path | None = Field(default=None, description="Draw the speed-ups into this file, .svg or .png.")
    json_file: Path | None = Field(default=None, alias="json", description="Write every number here as JSON.")

    @field_validator("shapes")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_shapes(text)
        return text

    @field_validator("peers")
    @classmethod
    def _known(cls, text: str) -> str:
        peers.choose(text)
        return text


@dataclass(frozen=True)
class Contender:
    """Whoever takes a turn: a model folder, or a peer. run: once over padded rows."""

    name: str
    what: str  # the folder's variant, or the peer's version
    megabytes: float | None  # of model.onnx
    run: Callable[[Sequence[Row]], object]


@dataclass(frozen=True)
class Measurement:
    """One contender at one shape. Milliseconds; `speedup` is the first one's time over this one's, round by round."""

    name: str
    batch: int
    tokens: int
    milliseconds: float
    quartiles: tuple[float, float]
    speedup: float
    speedup_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Footprint:
    """One folder in processes of its own, medians. difference: of its answers from the scalar tier's (None: dense)."""

    name: str
    load_seconds: float
    peak_megabytes: float
    difference: float | None


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """`1x32,8x128` as (batch, tokens) pairs."""
    shapes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(f"expected batch x tokens such as 1x32,8x128, but one of them is {part!r}")
        shapes.append((int(numbers[0]), int(numbers[1])))
    return shapes


def measure(
    contenders: Sequence[Contender], shapes: Sequence[tuple[int, int]], vocabulary: int, rounds: int, warm_up: int
) -> list[Measurement]:
    """Time the contenders in turns; tokens are drawn at random, the same ones for all.

    A turn is two runs, and the second counts: the first pays for what the turn before left, cold caches and the threads
    of some systems, which go on spinning for a while.
    """
    found: list[Measurement] = []
    with progress(len(shapes) * (rounds + warm_up), "round") as bar:
        for batch, tokens in shapes:
            bar.set_description(f"{batch}x{tokens}", refresh=False)
            rows = random_rows(batch, tokens, vocabulary)
            seconds: list[list[float]] = [[] for _ in contenders]
            for number in range(warm_up + rounds):
                for i in range(len(contenders))[:: -1 if number % 2 else 1]:
                    contenders[i].run(rows)
                    began = time.perf_counter()
                    contenders[i].run(rows)
                    if number >= warm_up:
                        seconds[i].append(time.perf_counter() - began)
                bar.update()
            for contender, own in zip(contenders, seconds, strict=True):
                ratios = [first / mine for first, mine in zip(seconds[0], own, strict=True)]
                found.append(
                    Measurement(
                        contender.name,
                        batch,
                        tokens,
                        1000 * statistics.median(own),
                        quartiles([1000 * value for value in own]),
                        statistics.median(ratios),
                        quartiles(ratios),
                    )
                )
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single value, the value."""
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    chosen = kernels.isa()
    return {
        "cpu": kernels.cpu_name(),
        "cpus": available_cpus(),
        "isa": chosen.name,
        "isa_reason": chosen.reason,
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("dsformer", "onnxruntime", "numpy")},
    }


def footprints(
    models: Sequence[OnnxModel], names: Sequence[str], threads: int, shape: tuple[int, int], loads: int
) -> list[Footprint]:
    """Load each folder in processes of its own, in turns; compressed ones once more in the scalar tier, to compare.

    Raises StartError where a compressed folder's answers are not those of the scalar tier.
    """
    folders = [model.artifact.path for model in models]
    seen = [[alone.start(folder, threads, *shape) for folder in folders] for _ in range(loads)]
    found = []
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        own = [turn[i] for turn in seen]
        difference = None
        if model.artifact.variant == "dsformer":
            wanted = alone.start(folders[i], threads, *shape, isa="scalar")
            difference = alone.difference(own[0].outputs, wanted.outputs)
            if not difference <= LARGEST_DIFFERENCE:
                raise StartError(
                    f"The answers of {name} differ from the scalar tier's by {difference:.2g} of the largest, more "
                    f"than {LARGEST_DIFFERENCE}: its times would mean nothing."
                )
        found.append(
            Footprint(
                name,
                statistics.median(one.load_seconds for one in own),
                statistics.median(one.peak_megabytes for one in own),
                difference,
            )
        )
    return found


def table(
    found: Sequence[Measurement],
    contenders: Sequence[Contender],
    alones: Sequence[Footprint],
    facts: dict[str, Any],
) -> str:
    """The numbers as Markdown, for people and for pull requests."""
    lines = ["| | model.onnx | | loads in | peak memory | off the scalar tier |", "|---|---|---|---|---|---|"]
    by_name = {one.name: one for one in alones}
    for one in contenders:
        size = "" if one.megabytes is None else f"{one.megabytes:.1f} MB"
        own = by_name.get(one.name)
        load, peak = (f"{own.load_seconds:.2f} s", f"{own.peak_megabytes:.0f} MB") if own else ("", "")
        off = f"{own.difference:.1e}" if own and own.difference is not None else ""
        lines.append(f"| {one.name} | {size} | {one.what} | {load} | {peak} | {off} |")
    lines += ["", "| batch x tokens | | ms, median (quartiles) | times as fast as the first (quartiles) |"]
    lines.append("|---|---|---|---|")
    for row in found:
        lines.append(
            f"| {row.batch}x{row.tokens} | {row.name} "
            f"| {row.milliseconds:.2f} ({row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}) "
            f"| {row.speedup:.2f} ({row.speedup_quartiles[0]:.2f} to {row.speedup_quartiles[1]:.2f}) |"
        )
    described = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "isa_reason")
    return "\n".join([*lines, "", described])


def of_folders(models: Sequence[OnnxModel]) -> list[Contender]:
    """The folders by their own names, or by their paths where two have the same."""
    own = [model.artifact.path.resolve().name for model in models]
    return [
        Contender(
            name if own.count(name) == 1 else str(model.artifact.path),
            model.artifact.variant,
            model.file_bytes / 1e6,
            model.run,
        )
        for model, name in zip(models, own, strict=True)
    ]


def of_peers(
    names: Sequence[str], deepsparse: Path | None, models: Sequence[OnnxModel], threads: int, scratch: Path
) -> list[Contender]:
    """The named peers, and DeepSparse if its interpreter is given, with the first dense folder's model in them."""
    if not names and not deepsparse:
        return []
    dense = next((model for model in models if model.artifact.variant == "dense"), None)
    if dense is None:
        raise StartError("Peers run a dense model, but none of the folders holds one: name a dense folder too.")
    calibration = [random_rows(1, min(128, dense.max_length), dense.tokenizer.max_id + 1)] * CALIBRATION_ROWS
    made = [peers.make(name, dense, threads, calibration, scratch) for name in names]
    if deepsparse:
        made.append(peers.make_deepsparse(deepsparse, dense, threads, scratch))
    return [_of_peer(peer, dense) for peer in made]


def _of_peer(peer: peers.Peer, dense: OnnxModel) -> Contender:
    return Contender(peer.name, peer.version, None, lambda rows: peer.run(dense.feed(rows)))


def make_synthetic(shape: str, preset: str, output: Path) -> list[Path]:
    """Have the compressor write folders with random weights; it is a program of its own, and needs PyTorch."""
    command = [sys.executable, "-m", "compressor", "synthetic"]
    command += ["--shape", shape, "--preset", preset, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # Its last words, a sentence that it may have wrapped; a traceback ends in "…Error: reason".
        reason = " ".join(re.split(r"[Ee]rror: ", done.stderr)[-1].split()) or f"exit status {done.returncode}"
        hint = "; it needs `pip install 'dsformer[compress]'`" if "No module named" in reason else ""
        raise StartError(f"No synthetic model could be made: {reason}{hint}")
    return [output / "dense", output / "dsformer"]


def run(options: Options) -> None:
    shapes = parse_shapes(options.shapes)
    if options.plot:
        plots.require_matplotlib()
    with tempfile.TemporaryDirectory() as scratch:
        folders = list(options.folders)
        if options.synthetic:
            folders += make_synthetic(options.synthetic, options.preset, options.keep or Path(scratch))
        if not folders:
            raise StartError("There is nothing to time: name model folders, or a shape with --synthetic.")
        models = [OnnxModel(artifact.read(folder), options.threads) for folder in folders]
        limit = min(model.max_length for model in models)
        for batch, tokens in shapes:
            if tokens > limit:
                raise StartError(f"The shape {batch}x{tokens} has more tokens than the models take, which is {limit}.")
        facts = machine(options.threads)
        contenders = of_folders(models)
        alones = []
        if options.loads:
            names = [one.name for one in contenders]
            alones = footprints(models, names, options.threads, shapes[0], options.loads)
        names = peers.choose(options.peers)
        contenders += of_peers(names, options.deepsparse, models, options.threads, Path(scratch))
        vocabulary = 1 + min(model.tokenizer.max_id for model in models)
        found = measure(contenders, shapes, vocabulary, options.rounds, options.warm_up)
    print(table(found, contenders, alones, facts))
    if options.plot:
        plots.speedups(found, facts, options.plot)
    if options.json_file:
        report = {
            "machine": facts,
            "folders": [asdict(one) for one in alones],
            "measurements": [asdict(row) for row in found],
        }
        write_json(options.json_file, report)


main = command(Options, run)


if __name__ == "__main__":
    main()
