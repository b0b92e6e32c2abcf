"""`dsformer-bench card A B`: one card of a pair of model folders, as card.md, card.json and card.png.

What a person asks before taking the compressed model B for the dense A: what of the accuracy is left (each folder's
own card.json has it, measured when it was made), the three sizes, memory and load time, and the speed over a grid of
batch x tokens, which is the break-even map: at which shapes B is faster, level or slower. Times and memory are those
of `dsformer-bench folders`, in turns, on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from service import artifact, plots
from service.bench import Footprint, Measurement, footprints, machine, measure, of_folders
from service.bench_options import Flags, command, write_json
from service.errors import StartError
from service.model import OnnxModel
from service.settings import available_cpus

SMALLEST, LARGEST = 1, 4096


class Options(Flags):
    """Write the card of a dense and a compressed model folder: accuracy, sizes, memory, speed."""

    model_config = SettingsConfigDict(cli_prog_name="dsformer-bench card")

    folders: CliPositionalArg[list[Path]] = Field(description="Two model folders of one task; the first is the dense.")
    output: Path = Field(default=Path("."), description="Folder for card.md, card.json and card.png.")
    batches: str = Field(default="1,4,16", description="Texts of one run, comma-separated.")
    lengths: str = Field(default="16,64,128,256,384", description="Tokens of each text, comma-separated.")
    rounds: int = Field(default=10, ge=1, description="Runs of each folder per shape.")
    warm_up: int = Field(default=1, ge=0, description="Runs of each folder per shape that are not counted.")
    loads: int = Field(default=3, ge=1, description="Processes per folder that measure load time and memory.")
    threads: int = Field(default_factory=available_cpus, ge=1, le=1024, description="CPU threads of one run.")

    @field_validator("batches", "lengths")
    @classmethod
    def _numbers(cls, text: str) -> str:
        parse_numbers(text)
        return text


@dataclass(frozen=True)
class Side:
    """One folder. metrics in points; sizes in bytes, None where card.json does not tell."""

    name: str
    metrics: dict[str, float]
    compression_ratio: float | None
    factorized_bytes: int | None
    file_bytes: int
    footprint: Footprint


@dataclass(frozen=True)
class Card:
    """Everything a card shows. measurements: of both sides at every shape, in the order of the shapes."""

    task: str
    dense: Side
    compressed: Side
    measurements: list[Measurement]
    machine: dict[str, Any]

    def rows_of(self, side: Side) -> list[Measurement]:
        return [row for row in self.measurements if row.name == side.name]

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """Shapes by who is faster; level is where half of the rounds do not agree."""
        found: dict[str, list[str]] = {"faster": [], "level": [], "slower": []}
        for row in self.rows_of(self.compressed):
            low, high = row.speedup_quartiles
            found["faster" if low > 1 else "slower" if high < 1 else "level"].append(f"{row.batch}x{row.tokens}")
        return found


def parse_numbers(text: str) -> list[int]:
    """`1,4,16` as increasing numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and SMALLEST <= int(part) <= LARGEST for part in parts):
        raise ValueError(f"expected numbers from {SMALLEST} to {LARGEST} such as 1,4,16, got {text!r}")
    return sorted({int(part) for part in parts})


def read_card(folder: Path) -> dict[str, Any]:
    """What the compressor wrote into a folder's card.json; nothing where there is none."""
    file = folder / "card.json"
    if not file.exists():
        return {}
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartError(f"{file} is no JSON: {error}.") from None
    if not isinstance(card, dict):
        raise StartError(f"{file} holds no JSON object.")
    return card


def sides(models: Sequence[OnnxModel], names: Sequence[str], alones: Sequence[Footprint]) -> tuple[Side, Side]:
    """The pair. The dense model's factorized bytes are those of the same matrices in float32."""
    dense, compressed = (read_card(model.artifact.path) for model in models)
    sizes = compressed.get("sizes", {})
    return (
        Side(
            names[0],
            dense.get("metrics") or compressed.get("dense", {}).get("metrics", {}),
            1.0,
            sizes.get("factorized_float32_bytes"),
            models[0].file_bytes,
            alones[0],
        ),
        Side(
            names[1],
            compressed.get("metrics", {}),
            sizes.get("compression_ratio"),
            sizes.get("factorized_bytes"),
            models[1].file_bytes,
            alones[1],
        ),
    )


def make(options: Options) -> Card:
    if len(options.folders) != 2:
        raise StartError(f"A card is of two folders, the dense and the compressed one; got {len(options.folders)}.")
    models = [OnnxModel(artifact.read(folder), options.threads) for folder in options.folders]
    tasks = [model.artifact.task for model in models]
    if tasks[0] != tasks[1]:
        raise StartError(f"A card is of two folders of one task, not of {tasks[0]} and {tasks[1]}.")
    limit = min(model.max_length for model in models)
    lengths = parse_numbers(options.lengths)
    if lengths[-1] > limit:
        raise StartError(f"--lengths has {lengths[-1]} tokens, more than the models take, which is {limit}.")
    shapes = [(batch, tokens) for batch in parse_numbers(options.batches) for tokens in lengths]
    facts = machine(options.threads)
    contenders = of_folders(models)
    names = [one.name for one in contenders]
    alones = footprints(models, names, options.threads, shapes[0], options.loads)
    vocabulary = 1 + min(model.tokenizer.max_id for model in models)
    found = measure(contenders, shapes, vocabulary, options.rounds, options.warm_up)
    told = [read_card(model.artifact.path).get("task") for model in models]
    return Card(str(told[1] or told[0] or tasks[0]), *sides(models, names, alones), found, facts)


def markdown(card: Card) -> str:
    """The card for people."""
    one, two = card.dense, card.compressed
    dense, compressed = card.rows_of(one), card.rows_of(two)
    lines = [f"# {two.name} beside {one.name}", "", verdict(card), ""]
    lines += [f"| {card.task} | {one.name} | {two.name} |", "|---|---|---|"]
    for name in two.metrics:
        if name in one.metrics:
            lines.append(f"| {name.replace('_', ' ')} | {one.metrics[name]:.2f} | {two.metrics[name]:.2f} |")
    both = [
        ("compression by eq. 11", one.compression_ratio, two.compression_ratio, "{:.3g}"),
        ("factorized matrices, float32 against as stored", one.factorized_bytes, two.factorized_bytes, "MB"),
        ("`model.onnx`", one.file_bytes, two.file_bytes, "MB"),
        ("peak memory of a process", one.footprint.peak_megabytes, two.footprint.peak_megabytes, "{:.0f} MB"),
        ("loads in", one.footprint.load_seconds, two.footprint.load_seconds, "{:.2f} s"),
    ]
    for title, first, second, form in both:
        lines.append(f"| {title} | {shown(first, form)} | {shown(second, form)} |")
    tokens = {row.name: row.batch * row.tokens / row.milliseconds for row in (best(dense), best(compressed))}
    lines.append(f"| most tokens a second | {1000 * tokens[one.name]:,.0f} | {1000 * tokens[two.name]:,.0f} |")
    lines += ["", f"Times as fast as {one.name}, median (quartiles) of {len(dense)} shapes, batch by tokens:", ""]
    lines += grid(
        compressed, lambda row: f"{row.speedup:.2f} ({row.speedup_quartiles[0]:.2f} to {row.speedup_quartiles[1]:.2f})"
    )
    lines += ["", f"Milliseconds of one run, {one.name} / {two.name}:", ""]
    other = {(row.batch, row.tokens): row for row in dense}
    lines += grid(compressed, lambda row: f"{other[row.batch, row.tokens].milliseconds:.1f} / {row.milliseconds:.1f}")
    described = ", ".join(f"{name} {value}" for name, value in card.machine.items() if name != "isa_reason")
    return "\n".join([*lines, "", f"Measured on {described}.", ""])


def verdict(card: Card) -> str:
    """One sentence: where compression wins, and where not."""
    found, rows = card.verdicts, card.rows_of(card.compressed)
    low, high = min(row.speedup for row in rows), max(row.speedup for row in rows)
    words = [f"{kind} at {len(found[kind])} ({', '.join(found[kind])})" for kind in ("level", "slower") if found[kind]]
    rest = f"; {' and '.join(words)}" if words else ""
    return (
        f"{card.compressed.name} is faster at {len(found['faster'])} of {len(rows)} shapes{rest}. Its speed-up is "
        f"{low:.2f} to {high:.2f}."
    )


def best(rows: Sequence[Measurement]) -> Measurement:
    """Where most tokens are done in a second."""
    return max(rows, key=lambda row: row.batch * row.tokens / row.milliseconds)


def shown(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.1f} MB" if form == "MB" else form.format(value)


def grid(rows: Sequence[Measurement], cell: Any) -> list[str]:
    """A Markdown table, a line a batch, a column a length."""
    batches, lengths = (sorted({getattr(row, name) for row in rows}) for name in ("batch", "tokens"))
    lines = [f"| | {' | '.join(f'{tokens} tokens' for tokens in lengths)} |", "|" + "---|" * (1 + len(lengths))]
    by_shape = {(row.batch, row.tokens): row for row in rows}
    for batch in batches:
        cells = [cell(by_shape[batch, tokens]) for tokens in lengths]
        lines.append(f"| {batch} {'text' if batch == 1 else 'texts'} | {' | '.join(cells)} |")
    return lines


def as_json(card: Card) -> Mapping[str, Any]:
    return {**asdict(card), "verdicts": card.verdicts}


def run(options: Options) -> None:
    plots.require_matplotlib()
    options.output.mkdir(parents=True, exist_ok=True)
    card = make(options)
    text = markdown(card)
    (options.output / "card.md").write_text(text, encoding="utf-8")
    # A model folder has a card.json of its own, of how it was made.
    write_json(options.output / "card.json", as_json(card))
    plots.card(card, options.output / "card.png")
    print(text, end="")


main = command(Options, run)


if __name__ == "__main__":
    main()
