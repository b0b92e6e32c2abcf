"""The pictures of `dsformer-bench`, each in its own function; matplotlib is asked for only where one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import StartError

if TYPE_CHECKING:
    from service.bench import Measurement


def require_matplotlib() -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise StartError("--plot needs matplotlib: pip install matplotlib.")


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
