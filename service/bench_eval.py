"""`dsformer-bench eval`: the accuracy of a running service, and where its variants disagree.

Every example of a task's dev set is one request to each variant, a few in flight at a time. The files are read and
the answers scored by the compressor, in a program of its own (`compressor.scoring`), by the very functions that
measure a folder offline; this half only asks. With `--answers FILE` every answer is written as it comes, and the same
command goes on after an interruption.

A disagreement's gap is what the first variant's score of its answer loses in the other variant: 0.9 where the first
is sure of an answer that the other gives 0.1.
"""

from __future__ import annotations

import hashlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from service.bench_options import Flags, command, progress, write_json
from service.client import Client, Server, choose_variants, look, read_key
from service.errors import StartError

# Answers asked for of each question, so that one variant's answer is found among the other's.
TOP_ANSWERS = 5
# A service that is full or restarts is asked again, once a second.
PATIENCE_SECONDS = 60
TRY_AGAIN = (0, 429, 503, 504)
SHOWN_CHARS = 160


class Options(Flags):
    """Measure a running service on a whole dev set: metrics of each variant, agreement, disagreements."""

    model_config = SettingsConfigDict(cli_prog_name="dsformer-bench eval")

    task: str = Field(description="As for dsformer-compress: sst2, squad, ...; classify or qa for a file of your own.")
    data: Path | None = Field(
        default=None, description="Folder with the tasks' files; without it and without a file of your own, the hub."
    )
    validation_file: Path | None = Field(default=None, description="Your own TSV, CSV, JSONL or SQuAD JSON.")
    rows: int | None = Field(default=None, ge=1, description="Only the first so many examples.")
    url: str = Field(default="http://127.0.0.1:8000", description="Where the service is.")
    api_key_file: Path | None = Field(default=None, description="File with an API key, where the service wants one.")
    variants: str = Field(default="", description="dense,dsformer,...; default: all. Agreement is with the first.")
    clients: int = Field(default=4, ge=1, le=256, description="Most requests in flight.")
    show: int = Field(default=10, ge=0, description="Disagreements printed; the JSON has all.")
    answers: Path | None = Field(default=None, description="Keep the answers here, and go on from them.")
    json_file: Path | None = Field(default=None, alias="json", description="Write every number here as JSON.")


class Scorer:
    """The compressor's half, a program of its own: see `compressor.scoring`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "compressor.scoring"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            reason = self._process.stderr.read().strip().rpartition("\n")[2]
            raise StartError(f"The data could not be read or scored: {reason or 'the scorer ended without a word'}.")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise StartError(told["error"])
        return told

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Answer:
    """What a variant answered to one example: answers with scores, best first, and the request's time."""

    answers: list[tuple[str, float]]
    milliseconds: float

    def score_of(self, text: str) -> float:
        return next((score for own, score in self.answers if own == text), 0.0)


Answers = dict[tuple[str, int], Answer]  # by variant and example


def ask_all(
    clients: Sequence[Client], variants: Sequence[str], asked: Mapping[str, Any], answers: Answers, store: Store
) -> None:
    """Fill in the answers that are missing. Raises StartError at the first request that fails for good."""
    todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    total = len(asked["inputs"])
    for index in range(total):  # the variants take turns, so that noise hits both
        for variant in variants:
            if (variant, index) not in answers:
                todo.put((index, variant))
    failures: list[StartError] = []
    with progress(total * len(variants), "request", total * len(variants) - todo.qsize()) as bar:

        def work(client: Client) -> None:
            while not failures:
                try:
                    index, variant = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answer = ask(client, variant, asked, index)
                except StartError as error:
                    failures.append(error)
                    return
                answers[variant, index] = answer
                store.add(variant, index, answer)
                bar.update()

        threads = [threading.Thread(target=work, args=(client,), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            failures.append(StartError("interrupted"))  # ends the threads after their requests in flight
            for thread in threads:
                thread.join()
            raise
    if failures:
        raise failures[0]


def ask(client: Client, variant: str, asked: Mapping[str, Any], index: int) -> Answer:
    parameters = dict(asked["parameters"])
    if asked["kind"] == "qa":
        parameters["top_k"] = TOP_ANSWERS
    inputs = asked["inputs"][index]
    body = {"inputs": inputs if asked["kind"] == "qa" else [inputs], "parameters": parameters}
    content = json.dumps(body).encode()
    until = time.monotonic() + PATIENCE_SECONDS
    reply = client.post(f"/variants/{variant}/{asked['kind']}", content)
    while reply.status in TRY_AGAIN and time.monotonic() < until:
        time.sleep(1)
        reply = client.post(f"/variants/{variant}/{asked['kind']}", content)
    if not reply.ok:
        raise StartError(f"Example {index} was not answered by {variant}: {reply.reason}")
    told = reply.json()
    found = (
        [(a["answer"], a["score"]) for a in told]
        if asked["kind"] == "qa"
        else [(a["label"], a["score"]) for a in told[0]]
    )
    return Answer(found, 1000 * reply.seconds)


class Store:
    """The file of --answers: its first line says what they answer, then one line an answer."""

    def __init__(self, file: Path | None, what: Mapping[str, Any]) -> None:
        self._file = file
        self._what = dict(what)
        self._lock = threading.Lock()

    def read(self) -> Answers:
        """The answers that are there; the file is made where there is none."""
        if self._file is None:
            return {}
        if not self._file.exists():
            self._file.write_text(json.dumps(self._what) + "\n", encoding="utf-8")
            return {}
        first, *rest = self._file.read_text(encoding="utf-8").split("\n")
        if parse(first) != self._what:
            raise StartError(
                f"{self._file} holds answers to other examples or of other models: give another --answers."
            )
        # A line that a kill cut off is asked again, and starts anew.
        rows = [row for row in map(parse, rest) if row]
        if rest and rest[-1]:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write("\n")
        return {(v, i): Answer([(text, score) for text, score in found], ms) for v, i, found, ms in rows}

    def add(self, variant: str, index: int, answer: Answer) -> None:
        if self._file is None:
            return
        line = json.dumps([variant, index, answer.answers, round(answer.milliseconds, 3)])
        with self._lock, self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def prediction(answer: Answer, asked: Mapping[str, Any]) -> Any:
    """As `compressor.scoring` wants it."""
    if asked["kind"] == "qa":
        return answer.answers[0][0]
    if not asked["labels"]:  # a regression's one number
        return [answer.answers[0][1]]
    return [answer.score_of(label) for label in asked["labels"]]


def disagreements(
    variants: Sequence[str], asked: Mapping[str, Any], answers: Answers, same: Mapping[str, list[bool] | None]
) -> list[dict[str, Any]]:
    """Where a variant does not answer what the first does, the widest gap first."""
    first = variants[0]
    found = []
    for other in variants[1:]:
        agreed = same[other]
        for index in range(len(asked["inputs"])):
            if agreed is not None and agreed[index]:
                continue
            one, two = answers[first, index], answers[other, index]
            (text, score), (other_text, other_score) = one.answers[0], two.answers[0]
            found.append(
                {
                    "example": index,
                    "input": asked["inputs"][index],
                    "wanted": asked["wanted"][index],
                    first: {"answer": text, "score": score},
                    other: {"answer": other_text, "score": other_score},
                    "gap": abs(score - (other_score if agreed is None else two.score_of(text))),
                }
            )
    return sorted(found, key=lambda one: -float(one["gap"]))


def report(
    variants: Sequence[str], asked: Mapping[str, Any], answers: Answers, scored: Mapping[str, Any], server: Server
) -> dict[str, Any]:
    total = len(asked["inputs"])
    agreements = {variant: own and 100 * sum(own) / total for variant, own in scored["same"].items()}
    return {
        "examples": total,
        "metrics": scored["metrics"],
        "agreement": agreements,
        "median_milliseconds": {
            variant: sorted(answers[variant, index].milliseconds for index in range(total))[total // 2]
            for variant in variants
        },
        "models": {variant: server.models[asked["kind"], variant]["sha256"] for variant in variants},
        "disagreements": disagreements(variants, asked, answers, scored["same"]),
    }


def table(told: Mapping[str, Any], variants: Sequence[str], task: str, show: int) -> str:
    """The report as Markdown."""
    names = list(next(iter(told["metrics"].values())))
    lines = [f"| {task}, {told['examples']} examples | {' | '.join(names)} | same answers as {variants[0]} |"]
    lines.append("|" + "---|" * (len(names) + 2))
    for variant in variants:
        agreed = told["agreement"][variant]
        numbers = [f"{told['metrics'][variant][name]:.2f}" for name in names]
        lines.append(f"| {variant} | {' | '.join(numbers)} | {'' if agreed is None else f'{agreed:.2f} %'} |")
    found = told["disagreements"][:show]
    if found:
        lines += ["", f"{len(told['disagreements'])} disagreements; the widest gaps:", ""]
    for one in found:
        words = one["input"].get("question") or " | ".join(filter(None, one["input"].values()))
        sides = [f"{v} {one[v]['answer']!r} ({one[v]['score']:.3f})" for v in variants if v in one]
        lines.append(
            f"- {one['gap']:.3f}: {shorten(words)}: {', '.join(sides)}, right is {shorten(right(one['wanted']))}"
        )
    return "\n".join(lines)


def right(wanted: Any) -> str:
    """The label, or the different gold answers."""
    return " or ".join(dict.fromkeys(map(str, wanted))) if isinstance(wanted, list) else str(wanted)


def shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARS else flat[: SHOWN_CHARS - 1] + "…"


def run(options: Options) -> None:
    key = read_key(options.api_key_file)
    server = look(Client(options.url, key), options.url)
    classifiers = [model for (task, _), model in server.models.items() if task == "classify"]
    with Scorer() as scorer:
        asked = scorer.ask(
            {
                "task": options.task,
                "data": options.data and str(options.data),
                "validation_file": options.validation_file and str(options.validation_file),
                "rows": options.rows,
                "labels": classifiers[0]["labels"] if classifiers else None,
                "problem_type": classifiers[0]["problem_type"] if classifiers else None,
            }
        )
        variants = choose_variants(server, asked["kind"], options.variants)
        if not variants:
            raise StartError(f"The service has no model for {options.task}, which is of the kind {asked['kind']}.")
        what = {
            "examples": hashlib.sha256(json.dumps([asked["inputs"], asked["parameters"]]).encode()).hexdigest(),
            "models": {variant: server.models[asked["kind"], variant]["sha256"] for variant in variants},
        }
        store = Store(options.answers, what)
        answers = store.read()
        clients = [Client(options.url, key) for _ in range(options.clients)]
        try:
            ask_all(clients, variants, asked, answers, store)
        except KeyboardInterrupt:
            if options.answers:
                print(f"{len(answers)} answers are in {options.answers}; the same command goes on.", file=sys.stderr)
            raise
        total = range(len(asked["inputs"]))
        scored = scorer.ask({v: [prediction(answers[v, index], asked) for index in total] for v in variants})
    told = report(variants, asked, answers, scored, server)
    print(table(told, variants, options.task, options.show))
    if options.json_file:
        write_json(options.json_file, {"task": options.task, "url": options.url, **told})


main = command(Options, run)


if __name__ == "__main__":
    main()
