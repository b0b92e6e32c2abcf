"""The pictures of `dsformer-bench`, each in its own function; matplotlib is asked for only where one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import StartError

if TYPE_CHECKING:
    from service.bench import Measurement
    from service.bench_card import Card


def require_matplotlib() -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise StartError("A picture needs matplotlib: pip install matplotlib.")


def speedups(found: Sequence[Measurement], facts: Mapping[str, Any], file: Path) -> None:
    """Bars of the median speed-up with its quartiles, a group for each shape; the first contender is the line at 1.

    Below 1 is slower.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row.batch, row.tokens) for row in found))
    first, *names = dict.fromkeys(row.name for row in found)
    figure = Figure(figsize=(3 + (0.8 + 0.2 * len(names)) * len(shapes), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        rows = [next(row for row in found if (row.name, row.batch, row.tokens) == (name, *shape)) for shape in shapes]
        heights = [row.speedup for row in rows]
        spread = [
            [height - row.speedup_quartiles[0] for height, row in zip(heights, rows, strict=True)],
            [row.speedup_quartiles[1] - height for height, row in zip(heights, rows, strict=True)],
        ]
        places = [place - 0.4 + (i + 0.5) * width for place in range(len(shapes))]
        bars = axes.bar(places, heights, width, label=name, yerr=spread, error_kw={"linewidth": 0.8})
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"{batch}x{tokens}" for batch, tokens in shapes])
    axes.set_xlabel("batch x tokens")
    axes.set_ylabel(f"times as fast as {first}")
    axes.set_title(f"{facts['cpu']}, {facts['threads']} threads, tier {facts['isa']}", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file)


def distributions(times: Mapping[tuple[str, str], Sequence[float]], facts: Mapping[str, Any], file: Path) -> None:
    """How many of the requests were answered within so many milliseconds: a panel a task, a line a variant.

    times : milliseconds of every answered request, by task and variant
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    tasks = list(dict.fromkeys(task for task, _ in times))
    figure = Figure(figsize=(1.5 + 4 * len(tasks), 3.6), layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), place + 1)
        for (_, variant), values in ((key, value) for key, value in times.items() if key[0] == task and value):
            axes.ecdf(values, label=variant)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("milliseconds")
        if place == 0:
            axes.set_ylabel("share of requests answered within")
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(", ".join(f"{name} {facts[name]}" for name in ("load", "clients", "isa", "threads")), fontsize=8)
    figure.savefig(file, dpi=150)


def card(card: Card, file: Path) -> None:
    """The break-even map beside bars of what the compressed model has of the dense one's.

    Blue is faster, red is slower, white is level; a cell whose quartiles lie on both sides of 1 is in brackets.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    one, two = card.dense, card.compressed
    rows = card.rows_of(two)
    batches, lengths = sorted({row.batch for row in rows}), sorted({row.tokens for row in rows})
    by_shape = {(row.batch, row.tokens): row for row in rows}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(1.25, 1))

    speedups = [[by_shape[batch, tokens].speedup for tokens in lengths] for batch in batches]
    most = max(4.0, *(max(value, 1 / value) for line in speedups for value in line))
    axes.imshow(speedups, cmap="RdBu", norm=LogNorm(1 / most, most), aspect="auto", origin="lower")
    for i, batch in enumerate(batches):
        for j, tokens in enumerate(lengths):
            row = by_shape[batch, tokens]
            level = row.speedup_quartiles[0] <= 1 <= row.speedup_quartiles[1]
            dark = max(row.speedup, 1 / row.speedup) > most**0.6
            words = f"({row.speedup:.2f})" if level else f"{row.speedup:.2f}"
            axes.text(j, i, words, ha="center", va="center", fontsize=10, color="white" if dark else "black")
    axes.set_xticks(range(len(lengths)), [str(tokens) for tokens in lengths])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("tokens of each text")
    axes.set_ylabel("texts of one run")
    note = "; in brackets: level" if card.verdicts["level"] else ""
    axes.set_title(f"times as fast as {one.name}{note}", fontsize=10)

    pairs: list[tuple[str, float, float, str]] = [
        (name.replace("_", " "), one.metrics[name], two.metrics[name], "{:.2f}")
        for name in two.metrics
        if one.metrics.get(name)
    ]
    if one.factorized_bytes and two.factorized_bytes:
        pairs.append(("factorized matrices", one.factorized_bytes / 1e6, two.factorized_bytes / 1e6, "{:.1f} MB"))
    pairs += [
        ("model.onnx", one.file_bytes / 1e6, two.file_bytes / 1e6, "{:.1f} MB"),
        ("peak memory", one.footprint.peak_megabytes, two.footprint.peak_megabytes, "{:.0f} MB"),
        ("loads in", one.footprint.load_seconds, two.footprint.load_seconds, "{:.2f} s"),
    ]
    shares = [100 * second / first for _, first, second, _ in pairs]
    drawn = bars.barh([title for title, *_ in pairs], shares, color="tab:blue", height=0.6)
    labels = [f"{form.format(second)} of {form.format(first)}" for _, first, second, form in pairs]
    bars.axvline(100, color="black", linewidth=0.8)
    bars.bar_label(drawn, labels, fontsize=8, padding=4, bbox={"color": "white", "pad": 1})
    bars.set_xlim(0, max(160.0, 1.5 * max(shares)))
    bars.invert_yaxis()
    bars.set_xlabel(f"percent of {one.name}'s")
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title(f"{card.task}, compression by eq. 11: {two.compression_ratio or 1:.2f}", fontsize=10)

    facts = card.machine
    described = f"{facts['cpu']}, {facts['threads']} threads, tier {facts['isa']}, onnxruntime {facts['onnxruntime']}"
    figure.suptitle(f"{two.name} beside {one.name}: {described}", fontsize=9)
    figure.savefig(file, dpi=150)
