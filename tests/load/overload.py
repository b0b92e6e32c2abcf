"""Far more clients than the queue takes: only 200, 429 and 504, singles and batches refused alike, hardly less done.

    python tests/load/overload.py MODELS [--clients 500] [--rounds 5] [--seconds 3] [--rude]

The calm speed is that of as many clients as the limit lets in: one where it is 1 to 8 tokens, for then a request is
over the limit unless it is alone, and 8 where it is a usual one. A polite client that is refused comes back no sooner
than Retry-After says; a rude one comes back at once. Goodput is measured once all have connected and the first
wave of refusals is over. The clients run on the same processors as the service; what they take of them is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import Served, cpu_seconds, encode

TEXT = "the film is good and clara lives in berkeley " * 4
TEXTS = (1, 3)
BODIES = [encode("/classify", {"inputs": [TEXT] * count if count > 1 else TEXT}, keep=True) for count in TEXTS]
ALLOWED = {200, 429, 504}
CALM_CLIENTS = 8
USUAL_LIMIT = 4096
SETTLE_SECONDS = 4.0


@dataclass
class Seen:
    """What all clients of a run were told: statuses of single and of batch requests. Once all had settled: the texts
    answered, and the processor time that the service and the clients took."""

    statuses: tuple[collections.Counter[int], ...] = field(
        default_factory=lambda: (collections.Counter(), collections.Counter())
    )
    texts: int = 0
    service: float = 0.0  # processor seconds
    clients: float = 0.0
    done: bool = False


class Client(asyncio.Protocol):
    """Asks one request after another over one connection. Reads no more of an answer than it must: the clients of a
    load test live on the processors that the service needs."""

    def __init__(self, port: int, number: int, polite: bool, seen: Seen) -> None:
        self._port = port
        self._kind = number % 2
        self._polite = polite
        self._seen = seen
        self._received = b""
        self._waits = False  # for an answer
        self._later: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def ask(self) -> None:
        """Over the old connection, or a new one where the service has closed it meanwhile."""
        if self._transport is None:
            loop = asyncio.get_running_loop()
            self._connecting = loop.create_task(loop.create_connection(lambda: self, "127.0.0.1", self._port))
        elif not self._seen.done:
            self._waits = True
            self._transport.write(BODIES[self._kind])

    def close(self) -> None:
        if self._later:
            self._later.cancel()
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.ask()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < int(header(head, b"content-length")):
            return
        self._received, self._waits = b"", False
        status = int(head[9:12])
        seen = self._seen
        if seen.done:
            return
        seen.statuses[self._kind][status] += 1
        pause = 0.0
        if status == 200:
            seen.texts += TEXTS[self._kind]
        elif status == 429 and self._polite:
            # Not all in step, and none too early.
            pause = int(header(head, b"retry-after")) * random.uniform(1.0, 1.5)
        if pause:
            self._later = asyncio.get_running_loop().call_later(pause, self.ask)
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._waits and not self._seen.done:
            self._seen.statuses[self._kind][-1] += 1


def header(head: bytes, name: bytes) -> bytes:
    head = head.lower()
    at = head.index(b"\r\n" + name + b":") + len(name) + 3
    return head[at : head.find(b"\r\n", at) if head.find(b"\r\n", at) > 0 else None].strip()


async def press(port: int, pid: int, clients: int, seconds: float, polite: bool, settle: float) -> Seen:
    """All clients at once, for so long."""
    seen = Seen()
    made = [Client(port, number, polite, seen) for number in range(clients)]
    for client in made:
        client.ask()
    await asyncio.sleep(settle)
    before = cpu_seconds(pid), time.process_time()
    seen.texts = 0
    await asyncio.sleep(seconds)
    seen.done = True
    seen.service, seen.clients = cpu_seconds(pid) - before[0], time.process_time() - before[1]
    for client in made:
        client.close()
    await asyncio.sleep(0.1)
    return seen


@dataclass
class Share:
    """Texts answered, and the processor time that the service and the clients took, in all rounds."""

    texts: int = 0
    service: float = 0.0
    clients: float = 0.0


def check(
    models: Path,
    limit: int,
    clients: int,
    seconds: float,
    polite: bool = True,
    rounds: int = 1,
    settle: float = SETTLE_SECONDS,
) -> float:
    """Goodput under overload, as a share of the calm one. They take turns, so that both see the same machine."""
    calm_clients = 1 if limit <= 8 else CALM_CLIENTS
    calm, busy = Share(), Share()
    statuses = Seen().statuses
    with Served(models, max_queue_tokens=limit) as service:

        def run(count: int, share: Share) -> Seen:
            seen = asyncio.run(press(service.port, service.process.pid, count, seconds, polite, settle))
            share.service += seen.service
            share.clients += seen.clients
            share.texts += seen.texts
            return seen

        run(calm_clients, Share())
        run(calm_clients, calm)
        for _ in range(rounds):
            for count, more in zip(statuses, run(clients, busy).statuses, strict=True):
                count.update(more)
            run(calm_clients, calm)
    calm_speed, busy_speed = calm.texts / (seconds * (rounds + 1)), busy.texts / (seconds * rounds)
    single, batch = (dict(sorted(count.items())) for count in statuses)
    print(
        f"limit {limit}, {clients} {'polite' if polite else 'rude'} clients: single {single} batch {batch}; "
        f"texts/s {busy_speed:.0f}, calm {calm_speed:.0f} ({calm_clients} clients): {busy_speed / calm_speed:.2f}; "
        f"texts per processor second of the service {busy.texts / busy.service:.0f}, calm "
        f"{calm.texts / calm.service:.0f}; processors: service {busy.service / seconds / rounds:.2f}, clients "
        f"{busy.clients / seconds / rounds:.2f}",
        flush=True,
    )
    for count in statuses:
        assert set(count) <= ALLOWED, count
        assert count[429]
    return busy_speed / calm_speed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limits", type=int, nargs="*", default=[1, 2, 4, 8, USUAL_LIMIT])
    parser.add_argument("--rude", action="store_true")
    options = parser.parse_args()
    for limit in options.limits:
        check(options.models, limit, options.clients, options.seconds, not options.rude, options.rounds)
