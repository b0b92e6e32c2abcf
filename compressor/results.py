"""A study's rows as one Markdown page with its plots: the paper's tables and figures in the study's own setting."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from compressor.config import ConfigError
from compressor.files import replace_file
from compressor.study import read_row
from compressor.tasks import find_task

Row: TypeAlias = dict[str, Any]
# Method's label and its size: what one line of a table is about.
Place: TypeAlias = tuple[str, str]

_UNTRAINED = "ft-f"


def write_report(study: Path, report: Path) -> None:
    """Tables of all rows in the folder ``study`` into ``report`` (Markdown); plots into the folder of its stem.

    Folders within ``study`` may hold studies of other bases, each of which gets a section of its own. What its
    ``notes.md`` says of the numbers, if there is one, stands before them.
    """
    rows = read_rows(study)
    others = [read_rows(path.parent) for path in sorted(study.glob("*/rows"))]
    plots = report.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    weights = {
        path.stem.removeprefix("weights-"): json.loads(path.read_text()) for path in study.glob("weights-*.json")
    }
    steps = [json.loads(path.read_text()) for path in sorted(study.glob("steps-*.json"))]
    chosen = _best_recipes(rows)
    everything = [*rows, *(row for found in others for row in found)]
    notes = study / "notes.md"
    sections = [
        _introduction(everything),
        notes.read_text().strip() if notes.is_file() else "",
        _accuracy(chosen, _tried(rows)),
        _frontier(chosen, plots),
        _untrained(rows),
        _agreement(chosen),
        _stored(chosen),
        _pieces(rows),
        _schedules(chosen, plots),
        *(_steps(rows, timed) for timed in steps),
        *(_other_base(_best_recipes(found)) for found in others),
        _weight_errors(weights, plots),
        _all_runs(everything),
    ]
    replace_file(report, ("\n\n".join(filter(None, sections)) + "\n").encode())


def read_rows(study: Path) -> list[Row]:
    """All rows of a study, by name; raises :class:`ConfigError` where there are none."""
    rows = [read_row(path) for path in sorted((study / "rows").glob("*.json"))]
    if not rows:
        raise ConfigError(f"{study} holds no rows; run the study first")
    return rows


# --- sections ------------------------------------------------------------------------------------------------------


def _introduction(rows: Sequence[Row]) -> str:
    cpus = ", ".join(sorted({row["cpu"] for row in rows}))
    minutes = sum(row["minutes"] for row in rows)
    return "\n".join(
        [
            "# Results",
            "",
            f"{len(rows)} runs on {cpus}, {minutes / 60:.1f} hours of training in all; they and the commands that made "
            "them are listed at the end.",
            "",
            "Scores are of the dev sets, in points: Matthews correlation for CoLA, F1 for MRPC, QQP and SQuAD, "
            "Spearman correlation for STS-B, accuracy for the others. Each is measured once, on the last weights, in "
            "PyTorch; where there are several seeds, mean ± standard deviation. The dense reference is the best of a "
            "small grid of learning rates, and so is a method that was run at several rates or numbers of steps. Every "
            "compressed model starts from the dense one of its own seed, which is also its teacher; all methods are "
            "trained alike. CR is by eq. 11 of the paper, indices included.",
        ]
    )


def _accuracy(rows: Sequence[Row], tried: Collection[Place]) -> str:
    """The paper's tables 1 and 3, by size; a cell is empty where a method was not run on the task."""
    trained = [row for row in rows if row["method"] != "dense" and row["stage"] != _UNTRAINED]
    if not trained:
        return ""
    tasks = _tasks(trained)  # a task that was fine-tuned, but compressed only without training, has no place here
    reference = [row for row in _reference(rows) if row["task"] in tasks]
    return f"## Accuracy after training\n\n{_score_tables([*reference, *trained], tried)}"


def _other_base(rows: Sequence[Row]) -> str:
    """Its table 2, what compresses what another method made: the scores of one base, trained and not, and as stored."""
    compressed = [row for row in rows if row["method"] != "dense"]
    scores = _score_tables([*_reference(rows), *compressed])
    return "\n\n".join(filter(None, [f"## On {_base(rows[0])}", scores, _storage_table(compressed)]))


def _base(row: Row) -> str:
    """The base of a study in words."""
    reference = row["settings"]["reference"]
    if reference["fake_quantize"]:
        return f"{row['base_model']}, fine-tuned on an 8-bit grid"
    if reference["finetuned"]:
        return f"{row['base_model']}, fine-tuned before"
    return str(row["base_model"])


def _frontier(rows: Sequence[Row], plots: Path) -> str:
    points = _mean_drops(rows)
    title = "Points lost against compression, mean over the tasks"
    return _figure(plots, "frontier.svg", title, lambda axes: draw_frontier(axes, points)) if points else ""


def _untrained(rows: Sequence[Row]) -> str:
    untrained = [row for row in rows if row["stage"] == _UNTRAINED]
    if not untrained:
        return ""
    text = (
        "Factorized, and measured as it is: methods that look at data have read 256 rows of the training data, or as "
        "many as their name says; sequential ones have read them behind the layers that were factorized before."
    )
    return f"## Without any training\n\n{text}\n\n{_score_tables(untrained)}"


def _score_tables(rows: Sequence[Row], tried: Collection[Place] = ()) -> str:
    """A table for each group of tasks. What was ``tried`` on some of a group's tasks, to see what an option does, has
    tables of its own."""
    tables = []
    groups = {group: [row for row in rows if _group(row["task"]) == group] for group in _GROUPS}
    groups = {group: found for group, found in groups.items() if any(row["method"] != "dense" for row in found)}
    for group, found in groups.items():
        tasks = _tasks(found)
        places = {
            place: own
            for place, own in _by_place(found).items()
            if {row["task"] for row in own} == set(tasks) or not (place in tried or _sets_delta(place[0]))
        }
        table = _score_table(places, tasks)
        tables.append(f"### {group}\n\n{table}" if len(groups) > 1 else table)
    return "\n\n".join(tables)


_GROUPS = "GLUE", "GLUE, tasks with a part of their training data", "SQuAD"


def _group(task: str) -> str:
    found = find_task(task)
    in_part = any("subset" in file for file in found.train_files)
    return _GROUPS[2 if found.kind == "qa" else int(in_part)]


def _score_table(places: Mapping[Place, Sequence[Row]], tasks: Sequence[str]) -> str:
    """A line for each method and size: its score on each task, their mean, and the mean drop."""
    lines = []
    for (method, _), found in sorted(places.items(), key=_by_ratio):
        cells = [_cell([row["score"] for row in found if row["task"] == task]) for task in tasks]
        by_task = [[row for row in found if row["task"] == task] for task in tasks]
        drops = [statistics.fmean(row["drop"] for row in group) for group in by_task if group]
        scores = [statistics.fmean(row["score"] for row in group) for group in by_task if group]
        whole = len(drops) == len(tasks)
        means = [f"{statistics.fmean(scores):.2f}", f"{statistics.fmean(drops):.2f}", f"{max(drops):.2f}"]
        lines.append([method, f"{_ratio(found):.2f}", *cells, *(means if whole else ["", "", ""])])
    return _table(["method", "CR", *tasks, "mean", "mean drop", "worst drop"], lines)


def _agreement(rows: Sequence[Row]) -> str:
    """A line for each method and size: how far its answers are the dense model's, where that was measured."""
    rows = [row for row in rows if "agreement" in row]
    if not rows:
        return ""
    tasks = _tasks(rows)
    lines = []
    for (method, _), found in sorted(_by_place(rows).items(), key=_by_ratio):
        cells = [_cell([row["agreement"] for row in found if row["task"] == task]) for task in tasks]
        lines.append([method, f"{_ratio(found):.2f}", *cells])
    text = (
        "How many of its answers a compressed model has in common with its own dense one, right or wrong, in percent "
        "of the dev set; of STS-B's numbers the correlation. A score moves with the few answers that happen to become "
        "right or wrong, this with all that change."
    )
    return f"## Answers kept\n\n{text}\n\n" + _table(["method", "CR", *tasks], lines)


def _stored(rows: Sequence[Row]) -> str:
    table = _storage_table(rows)
    text = (
        "The exported `model.onnx`, embeddings and all, against the dense weights in float32; and the points that it "
        "loses to the same model in PyTorch, measured through ONNX Runtime."
    )
    return table and f"## Whole files\n\n{text}\n\n{table}"


def _storage_table(rows: Sequence[Row]) -> str:
    """What is left of a whole file, embeddings included, and what storing it smaller takes from the score."""
    lines = []
    places: dict[tuple[str, ...], list[tuple[Row, Row]]] = defaultdict(list)
    for row in rows:
        for storage, as_stored in row.get("stored", {}).items():
            places[storage, row["method"], row["size"]].append((row, as_stored))
    tasks = sorted({row["task"] for found in places.values() for row, _ in found})
    for (storage, method, _), found in sorted(places.items(), key=lambda item: (_ratio([item[1][0][0]]), item[0])):
        lost = {
            task: [row["score"] - as_stored["score"] for row, as_stored in found if row["task"] == task]
            for task in tasks
        }
        whole = statistics.fmean(as_stored["float32_bytes"] / as_stored["file_bytes"] for _, as_stored in found)
        mean = statistics.fmean(statistics.fmean(losses) for losses in lost.values() if losses)
        cells = [_cell(losses) for losses in lost.values()]
        lines.append([method, f"{_ratio([found[0][0]]):.2f}", storage, f"{whole:.2f}", *cells, f"{mean:.2f}"])
    if not lines:
        return ""
    return _table(["method", "CR", "storage", "file, times smaller", *tasks, "mean"], lines)


def _pieces(rows: Sequence[Row]) -> str:
    """What each word of a ds variant moves, against the variant of the same task, seed and size without it."""
    lines = [
        [
            *key,
            ", ".join(sorted({row["task"] for row, _ in found})),
            _cell([row["score"] - twin["score"] for row, twin in found], "+.2f"),
        ]
        for key, found in sorted(_pairs(rows).items())
    ]
    if not lines:
        return ""
    text = "Points that one option moves, against the same without it, of the same task, seed and size."
    return f"## Each piece alone\n\n{text}\n\n" + _table(["piece", "added to", "size", "tasks", "points"], lines)


def _pairs(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[tuple[Row, Row]]]:
    """By word, variant without it and size: the trained ds rows with that word, each beside its twin without."""
    known = {(_words(row["method"]), row["task"], row["seed"], row["size"]): row for row in _trained_ds(rows)}
    pairs: dict[tuple[str, str, str], list[tuple[Row, Row]]] = defaultdict(list)
    for (words, *place), row in known.items():
        for word in words:
            if twin := known.get((words - {word}, *place)):
                pairs[word, twin["method"], row["size"]].append((row, twin))
    return pairs


def _tried(rows: Sequence[Row]) -> set[Place]:
    """What was run to see what an option does."""
    return {(row["method"], row["size"]) for found in _pairs(rows).values() for row, _ in found}


def _trained_ds(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["method"].partition(":")[0] == "ds" and row["stage"] != _UNTRAINED]


def _words(label: str) -> frozenset[str]:
    """The options of a variant, in no order."""
    return frozenset(label.split(":")[1:])


def _schedules(rows: Sequence[Row], plots: Path) -> str:
    """Figure 4: STF against fine-tuning on frozen supports where few nonzeros make the start inexact.

    Of variants that name δ; a preset's is one of them where its γ is theirs.
    """
    drawn = {_curve(row) for row in rows if _sets_delta(row["method"])}
    series: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["stage"] in ("ft-f-stf", "ft-f-ft") and _curve(row) in drawn:
            about = row["compression"]
            nonzeros = round(about["delta"] * about["block_size"])
            task, method, *_ = _curve(row)
            series[task, method, row["stage"]][nonzeros].append(row["score"])
    if not series:
        return ""
    nonzeros = sorted({number for found in series.values() for number in found})
    lines = [
        [*place, *(_cell(found.get(number, [])) for number in nonzeros)] for place, found in sorted(series.items())
    ]
    figure = _figure(plots, "schedules.svg", "STF against FT-F-FT by S", lambda axes: draw_schedules(axes, series))
    table = _table(["task", "method", "schedule", *(f"S = {number}" for number in nonzeros)], lines)
    return f"## STF against fine-tuning on frozen supports\n\n{table}\n\n{figure}"


def _steps(rows: Sequence[Row], timed: Row) -> str:
    """What a training step costs, as tests/bench/training.py timed it, and what such steps led to at that size."""
    reached: dict[tuple[str, str], dict[tuple[str, int | None], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _trained_ds(rows):
        if row["size"] == timed["preset"]:
            interval = row["settings"]["train"]["omp_interval"] if row["stage"] == "ft-f-stf" else None
            place = _label_without(row, "omp-interval=", "schedule="), row["task"]
            reached[place][row["stage"], interval].append(row["score"])
    # Two intervals at least, or there is nothing to compare.
    reached = {place: found for place, found in reached.items() if sum(stage == "ft-f-stf" for stage, _ in found) > 1}
    lines = [
        [
            name,
            f"{step['ms']:.0f}",
            "{:.2f} ({:.2f} to {:.2f})".format(step["ratio"], *step["quartiles"]),
            *(_cell(found.get((step["stage"], step["omp_interval"]), [])) for found in reached.values()),
        ]
        for name, step in timed["steps"].items()
    ]
    text = (
        f"{timed['model']} at {timed['preset']}, {timed['rows']} rows of {timed['tokens']} tokens, {timed['cpu']}, "
        f"{timed['threads']} threads{', with a teacher' if timed['distilled'] else ''}; medians of {timed['rounds']} "
        f"rounds, and ratios with their quartiles. Beside them the scores of the runs that were trained so."
    )
    scores = [f"{task}, {method}" for method, task in reached]
    header = ["step", "ms", "of plain fine-tuning", *scores]
    return f"## What a step costs\n\n{text}\n\n{_table(header, lines)}"


def _sets_delta(label: str) -> bool:
    return any(word.startswith("delta=") for word in _words(label))


def _curve(row: Row) -> tuple[Any, ...]:
    """What is the same along a curve of δ: task, variant without δ and schedule, γ of each kind of matrix (if any)."""
    gamma = (row["compression"] or {}).get("gamma", {})
    return row["task"], _label_without(row, "delta=", "schedule="), *gamma.values()


def _label_without(row: Row, *words: str) -> str:
    """The label of a row's variant, without the words that begin so."""
    return ":".join(word for word in row["method"].split(":") if not word.startswith(words))


def _weight_errors(weights: Mapping[str, Sequence[Row]], plots: Path) -> str:
    """Figure 1: relative errors of the matrices themselves."""
    if not weights:
        return ""
    lines = []
    for size in sorted(weights, key=lambda name: float(name.removesuffix("x"))):
        roles: dict[str, list[Row]] = defaultdict(list)
        for row in weights[size]:
            roles[_role(row)].append(row)
        for role, found in roles.items():
            means = [statistics.fmean(row[name] for row in found) for name in ("CR", "SVD", "DS")]
            ahead = sum(row["DS"] < row["SVD"] for row in found)
            lines.append([size, role, *(f"{mean:.3f}" for mean in means), f"{ahead} of {len(found)}"])
    table = _table(["size", "matrix", "CR", "SVD", "DS", "DS below SVD"], lines)
    figure = _figure(plots, "weights.svg", "Relative error by layer", lambda axes: draw_weights(axes, weights))
    text = "‖W − W'‖ / ‖W‖ of the base model's matrices at equal CR, mean over the layers."
    return f"## Errors of the weights\n\n{text}\n\n{table}\n\n{figure}"


def _all_runs(rows: Sequence[Row]) -> str:
    commands = sorted({row["command"] for row in rows})
    lines = [
        [
            _base(row),
            row["task"],
            str(row["seed"]),
            _name(row),
            f"{_ratio([row]):.2f}",
            f"{row['score']:.2f}",
            *("" if row[name] is None else str(row[name]) for name in ("train_rows", "steps")),
            f"{row['minutes']:.1f}",
            str(1 + commands.index(row["command"])),
        ]
        for row in rows
    ]
    header = ["base", "task", "seed", "method", "CR", "score", "rows", "steps", "minutes", "command"]
    listed = "\n".join(f"{number}. `{command}`" for number, command in enumerate(commands, start=1))
    return f"## Every run\n\n{_table(header, lines)}\n\n## Commands\n\n{listed}"


def _name(row: Row) -> str:
    """The method's label; of a dense reference from a grid, its learning rate too."""
    from_grid = row["method"] == "dense" and not row["settings"]["reference"]["finetuned"]
    return f"dense, {row['settings']['train']['learning_rate']:g}" if from_grid else str(row["method"])


# --- numbers -------------------------------------------------------------------------------------------------------


def _reference(rows: Sequence[Row]) -> list[Row]:
    """The dense rows that the others were compared with: of a task and seed, the best of the grid."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        place = row["task"], row["seed"]
        if row["method"] == "dense" and (place not in best or row["score"] > best[place]["score"]):
            best[place] = row
    return list(best.values())


def _best_recipes(rows: Sequence[Row]) -> list[Row]:
    """Of compressed rows that differ in how long or how fast they learn the best, under the label that they share."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["method"] != "dense":
            label = _label_without(row, "learning-rate=", "max-steps=")
            place = row["task"], row["seed"], row["size"], label
            if place not in best or row["score"] > best[place]["score"]:
                best[place] = {**row, "method": label}
    return [*(row for row in rows if row["method"] == "dense"), *best.values()]


def _by_place(rows: Iterable[Row]) -> dict[Place, list[Row]]:
    places: dict[Place, list[Row]] = defaultdict(list)
    for row in rows:
        places[row["method"], row["size"]].append(row)
    return places


def _mean_drops(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(CR, mean drop) of each trained method at each size at which it was run on all tasks."""
    first = min(map(_GROUPS.index, {_group(row["task"]) for row in rows}))
    rows = [row for row in rows if _group(row["task"]) == _GROUPS[first]]
    tasks = set(_tasks(rows))
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), found in _by_place(rows).items():
        if method == "dense" or found[0]["stage"] == _UNTRAINED or {row["task"] for row in found} != tasks:
            continue
        drops = [statistics.fmean(row["drop"] for row in found if row["task"] == task) for task in tasks]
        points[method].append((_ratio(found), statistics.fmean(drops)))
    return points


def _ratio(rows: Sequence[Row]) -> float:
    return float((rows[0]["compression"] or {}).get("ratio_eq11", 1.0))


def _by_ratio(item: tuple[Place, Sequence[Row]]) -> tuple[float, Place]:
    """Where a line stands in its table."""
    place, rows = item
    return _ratio(rows), place


def _tasks(rows: Sequence[Row]) -> list[str]:
    return sorted({row["task"] for row in rows})


def _cell(values: Sequence[float], form: str = ".2f") -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --- plots ---------------------------------------------------------------------------------------------------------


def _figure(folder: Path, name: str, title: str, draw: Callable[[Any], None]) -> str:
    """Draw and save one plot; returns the Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "dsformer", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        draw(axes)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(folder / name, metadata={"Date": None})  # the same rows make the same bytes
        pyplot.close(figure)
    return f"![{title}]({folder.name}/{name})"


def draw_frontier(axes: Any, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for method in sorted(points):
        line = sorted(points[method])
        axes.plot([ratio for ratio, _ in line], [drop for _, drop in line], marker="o", label=method)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("compression by eq. 11")
    axes.set_ylabel("points lost")
    axes.legend(frameon=False)


def draw_schedules(axes: Any, series: Mapping[tuple[str, str, str], Mapping[int, Sequence[float]]]) -> None:
    """A colour for each task and method; STF drawn through, FT-F-FT dashed."""
    colors = {place: f"C{i}" for i, place in enumerate(sorted({place[:2] for place in series}))}
    for (task, method, stage), found in sorted(series.items()):
        numbers = sorted(found)
        means = [statistics.fmean(found[number]) for number in numbers]
        style = "-" if stage == "ft-f-stf" else "--"
        axes.plot(numbers, means, style, marker="o", color=colors[task, method], label=f"{task}, {method}, {stage}")
    axes.set_xlabel("nonzeros of a row in a block, S")
    axes.set_ylabel("score")
    axes.legend(frameon=False)


def draw_weights(axes: Any, weights: Mapping[str, Sequence[Row]]) -> None:
    """Mean error over the layers, of each kind of matrix and both factorizations."""
    errors: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for rows in weights.values() for row in rows):
        for name in ("SVD", "DS"):
            errors[_role(row), name][round(row["CR"], 3)].append(row[name])
    colors = {role: f"C{i}" for i, role in enumerate(dict.fromkeys(role for role, _ in errors))}
    for (role, name), found in errors.items():
        ratios = sorted(found)
        means = [statistics.fmean(found[ratio]) for ratio in ratios]
        axes.plot(ratios, means, "-" if name == "DS" else "--", marker="o", color=colors[role], label=f"{role}, {name}")
    axes.set_xlabel("compression by eq. 11")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False, ncols=2)


def _role(row: Row) -> str:
    """What the matrix does, without its layer's number: ``ffn1`` of ``4.ffn1``."""
    return str(row["matrix"]).rpartition(".")[2]
