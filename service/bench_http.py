"""`dsformer-bench http`: load on a running service, and what its variants make of the same requests.

Variants take turns, and a turn is the same few requests for each: forwards in one round, backwards in the next, so
that noise hits whoever happens to run. A speed-up is of two turns of one round.

- closed loop (default): so many clients, each sends its next request when it has its answer. What is measured is the
  service at the speed of its clients.
- open loop (`--rate`): requests come at random times of that rate, whether or not there are answers, as from many
  independent users. A request's time runs from the moment it was due, so waiting for a free connection counts.

Afterwards /compare is asked how many of the texts get the same answer from all variants.

Beside the clients' times stand the service's own, from the header Server-Timing of each answer. They leave out what
client and network add to both variants alike, which makes their ratio smaller, and are what a dashboard shows.
"""

from __future__ import annotations

import json
import queue
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from service import plots
from service.bench import quartiles
from service.bench_options import Flags, command, progress, write_json
from service.client import NO_ANSWER, Client, Reply, choose_variants, look, read_key
from service.errors import StartError
from service.sentences import QUESTIONS, SENTENCES


class Options(Flags):
    """Put load on a running service: latency, throughput and errors of its variants, in turns."""

    model_config = SettingsConfigDict(cli_prog_name="dsformer-bench http")

    url: str = Field(default="http://127.0.0.1:8000", description="Where the service is.")
    api_key_file: Path | None = Field(default=None, description="File with an API key, where the service wants one.")
    tasks: str = Field(default="", description="classify, qa, or both; default: all that the service has.")
    variants: str = Field(default="", description="dense,dsformer,...; default: all. Ratios are to the first.")
    texts: Path | None = Field(default=None, description="Texts of your own to classify, one a line.")
    questions: Path | None = Field(
        default=None, description='Questions of your own, one JSON object a line: {"question": ..., "context": ...}.'
    )
    clients: int = Field(default=4, ge=1, le=1024, description="Connections: clients, or with --rate most in flight.")
    rate: float | None = Field(default=None, gt=0, description="Open loop: requests a second, at random times.")
    requests: int = Field(default=50, ge=1, description="Requests of one turn.")
    rounds: int = Field(default=10, ge=1, description="Turns of each variant, for each task.")
    warm_up: int = Field(default=1, ge=0, description="Turns of each variant that are not counted.")
    compare: int = Field(default=20, ge=0, description="Texts of a task that all variants answer, to see who agrees.")
    seed: int = Field(default=0, ge=0, description="Of the times of an open loop, and of the order of the texts.")
    plot: Path | None = Field(default=None, description="Draw the times' distributions into this file, .svg or .png.")
    json_file: Path | None = Field(default=None, alias="json", description="Write every number here as JSON.")


@dataclass(frozen=True)
class Turn:
    """What one variant made of the requests of a turn. seconds: of the whole turn."""

    seconds: float
    replies: list[Reply]

    @property
    def milliseconds(self) -> list[float]:
        return [1000 * reply.seconds for reply in self.replies if reply.ok]

    @property
    def service_milliseconds(self) -> list[float]:
        return [1000 * reply.service_seconds for reply in self.replies if reply.ok and reply.service_seconds]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one variant's requests, and its speed-up: the first variant's median over this one's, round by
    round, median and quartiles (None where no round has both)."""

    p50: float
    p90: float
    p99: float
    mean: float
    speedup: float | None
    speedup_quartiles: tuple[float, float] | None


@dataclass(frozen=True)
class Load:
    """One variant under load, all rounds together.

    errors: requests by status ("no answer" where the connection failed). client: as the clients saw them; service: from
    a request's arrival to its answer, as the service says. None where no request was answered, or it does not say.
    agrees: share of the compared texts that get the dense variant's answer (None: nothing was compared).
    """

    task: str
    variant: str
    requests: int
    errors: dict[str, int]
    requests_per_second: float
    client: Times | None
    service: Times | None
    agrees: float | None = None


def bodies_of(task: str, options: Options) -> list[bytes]:
    """The requests' bodies: of the user's file, or the built-in texts; in a random order."""
    inputs: list[Any]
    if task == "classify":
        inputs = list(SENTENCES) if options.texts is None else read_texts(options.texts)
    else:
        pairs = [{"question": question, "context": context} for question, context in QUESTIONS]
        inputs = pairs if options.questions is None else read_questions(options.questions)
    random.Random(options.seed).shuffle(inputs)
    # Models that take fewer tokens are measured at their limit.
    parameters = {"truncation": "right"} if task == "classify" else {}
    return [json.dumps({"inputs": each, "parameters": parameters}).encode() for each in inputs]


def read_texts(file: Path) -> list[str]:
    texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise StartError(f"{file} holds no text; expected one a line.")
    return texts


def read_questions(file: Path) -> list[dict[str, str]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append({name: str(row[name]) for name in ("question", "context")})
        except (ValueError, KeyError, TypeError):
            raise StartError(
                f'{file}, line {number}: expected a JSON object such as {{"question": "...", "context": "..."}}.'
            ) from None
    if not found:
        raise StartError(f"{file} holds no question.")
    return found


def take_turn(
    clients: Sequence[Client], path: str, bodies: Iterable[bytes], gaps: Iterable[float], done: Callable[[], object]
) -> Turn:
    """Send the bodies over the clients' connections, each as soon as it is due and a connection is free.

    gaps : seconds between one request's due time and the next; zeros make a closed loop
    """
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
    due = began = time.perf_counter()
    closed = True
    for gap, body in zip(gaps, bodies, strict=False):
        due += gap
        closed = closed and gap == 0
        waiting.put((due, body))
    replies: list[Reply] = []

    def send(client: Client) -> None:
        while True:
            try:
                due, body = waiting.get_nowait()
            except queue.Empty:
                return
            if not closed:
                time.sleep(max(0.0, due - time.perf_counter()))
            reply = client.post(path, body)
            seconds = reply.seconds if closed else time.perf_counter() - due
            replies.append(replace(reply, seconds=seconds, content=b""))
            done()

    threads = [threading.Thread(target=send, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        drain(waiting)
        raise
    return Turn(time.perf_counter() - began, replies)


def drain(waiting: queue.SimpleQueue[Any]) -> None:
    """Leave nothing to be sent."""
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        return


def measure(
    clients: Sequence[Client], task: str, variants: Sequence[str], bodies: Sequence[bytes], options: Options, bar: Any
) -> dict[str, list[Turn]]:
    """The turns of every variant, warm-up left out."""
    turns: dict[str, list[Turn]] = {variant: [] for variant in variants}
    endless = cycle(bodies)
    gaps = random.Random(options.seed)
    for number in range(options.warm_up + options.rounds):
        chosen = list(islice(endless, options.requests))  # the same for all variants of a round
        times = [gaps.expovariate(options.rate) if options.rate else 0.0 for _ in chosen]
        for variant in variants[:: -1 if number % 2 else 1]:
            bar.set_description(f"{task} {variant}", refresh=False)
            turn = take_turn(clients, f"/variants/{variant}/{task}", chosen, times, bar.update)
            if number >= options.warm_up:
                turns[variant].append(turn)
            elif all(reply.status == NO_ANSWER for reply in turn.replies):
                raise StartError("The service has stopped answering.")
    return turns


def agreement(client: Client, task: str, bodies: Sequence[bytes], done: Callable[[], object]) -> dict[str, float]:
    """By variant, the share of the bodies' inputs to which it gives the dense variant's answer."""
    same: dict[str, list[bool]] = {}
    for body in bodies:
        asked = {"task": task, "inputs": json.loads(body)["inputs"], "parameters": {"repeats": 1}}
        reply = client.post("/compare", json.dumps(asked).encode())
        if reply.ok:  # a text that is too long for a model is refused, and says nothing
            for told in reply.json()["variants"]:
                if told["agrees"] is not None:
                    same.setdefault(told["variant"], []).append(told["agrees"])
        done()
    return {variant: statistics.fmean(found) for variant, found in same.items()}


def summarize(task: str, turns: Mapping[str, Sequence[Turn]]) -> list[Load]:
    """One line a variant; ratios are to the first."""
    first = next(iter(turns.values()))
    found = []
    for variant, own in turns.items():
        statuses = [reply.status for turn in own for reply in turn.replies if not reply.ok]
        answered = sum(len(turn.replies) for turn in own) - len(statuses)
        found.append(
            Load(
                task,
                variant,
                sum(len(turn.replies) for turn in own),
                dict(Counter("no answer" if status == NO_ANSWER else str(status) for status in statuses)),
                answered / sum(turn.seconds for turn in own),
                times_of([turn.milliseconds for turn in first], [turn.milliseconds for turn in own]),
                times_of([turn.service_milliseconds for turn in first], [turn.service_milliseconds for turn in own]),
            )
        )
    return found


def times_of(first: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> Times | None:
    """Of milliseconds by round, the first variant's and this one's."""
    ordered = sorted(chain.from_iterable(own))
    if not ordered:
        return None
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(first, own, strict=True) if a and b]
    return Times(
        percentile(ordered, 0.5),
        percentile(ordered, 0.9),
        percentile(ordered, 0.99),
        statistics.fmean(ordered),
        statistics.median(ratios) if ratios else None,
        quartiles(ratios) if ratios else None,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, as NumPy has it."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def table(found: Sequence[Load], facts: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    titles = ["task", "variant", "p50, ms", "p90", "p99", "mean", "requests/s", "errors", "times as fast (quartiles)"]
    titles += ["p50 in the service, ms", "times as fast in the service", "same answers"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in found:
        client, service = row.client, row.service
        times = [f"{ms:.2f}" for ms in (client.p50, client.p90, client.p99, client.mean)] if client else [""] * 4
        errors = ", ".join(f"{count} x {status}" for status, count in row.errors.items()) or "0"
        cells = [row.task, row.variant, *times, f"{row.requests_per_second:.1f}", f"{errors} of {row.requests}"]
        cells += [ratio(client), f"{service.p50:.2f}" if service else "", ratio(service)]
        cells.append("" if row.agrees is None else f"{row.agrees:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    described = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join([*lines, "", described])


def ratio(times: Times | None) -> str:
    if times is None or times.speedup is None or times.speedup_quartiles is None:
        return ""
    return f"{times.speedup:.2f} ({times.speedup_quartiles[0]:.2f} to {times.speedup_quartiles[1]:.2f})"


def run(options: Options) -> None:
    if options.plot:
        plots.require_matplotlib()
    key = read_key(options.api_key_file)
    server = look(Client(options.url, key), options.url)
    tasks = list(filter(None, (part.strip() for part in options.tasks.split(",")))) or server.tasks
    for task in tasks:
        if task not in server.tasks:
            raise StartError(f"The service has no model for the task {task!r}; it has {', '.join(server.tasks)}.")
    chosen = {task: (choose_variants(server, task, options.variants), bodies_of(task, options)) for task in tasks}
    clients = [Client(options.url, key) for _ in range(options.clients)]
    compared = {
        task: bodies[: options.compare] for task, (_, bodies) in chosen.items() if len(server.variants(task)) > 1
    }
    total = (options.warm_up + options.rounds) * options.requests * sum(len(each) for each, _ in chosen.values())
    turns, same = {}, {}
    with progress(total + sum(map(len, compared.values())), "request") as bar:
        for task, (variants, bodies) in chosen.items():
            turns[task] = measure(clients, task, variants, bodies, options, bar)
        for task, bodies in compared.items():
            bar.set_description(f"{task} compared", refresh=False)
            same[task] = agreement(clients[0], task, bodies, bar.update)
    for client in clients:
        client.close()
    found = [
        replace(row, agrees=same.get(task, {}).get(row.variant))
        for task in tasks
        for row in summarize(task, turns[task])
    ]
    facts = {
        "load": f"open loop, {options.rate:g} requests/s" if options.rate else "closed loop",
        "clients": options.clients,
        "turns": f"{options.rounds} of {options.requests} requests",
        "isa": server.runtime["isa"] or "-",
        "threads": server.runtime["threads"],
        "onnxruntime": server.runtime["onnxruntime"],
        "dsformer": server.version,
    }
    print(table(found, facts))
    if options.plot:
        times = {
            (task, v): [ms for turn in own for ms in turn.milliseconds]
            for task in tasks
            for v, own in turns[task].items()
        }
        plots.distributions(times, facts, options.plot)
    if options.json_file:
        write_json(options.json_file, {"url": options.url, "facts": facts, "loads": [asdict(row) for row in found]})


main = command(Options, run)


if __name__ == "__main__":
    main()
