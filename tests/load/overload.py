"""Far more clients than the queue takes: only 200, 429 and 504, singles and batches refused alike, hardly less done.

    python tests/load/overload.py MODELS [--clients 500] [--rounds 5] [--seconds 3] [--rude]

The calm speed is that of as many clients as the limit lets in: one where it is 1 to 8 tokens, for then a request is
over the limit unless it is alone, and 8 where it is a usual one. A polite client that is refused comes back no sooner
than Retry-After says; a rude one comes back at once. The first second of a round, in which all clients connect, is not
counted. The clients run on the same processors as the service; what they take of them is printed.
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
SETTLE_SECONDS = 1.0


@dataclass
class Seen:
    """What all clients of a run were told: statuses of single and of batch requests, and the texts answered."""

    statuses: tuple[collections.Counter[int], ...] = field(
        default_factory=lambda: (collections.Counter(), collections.Counter())
    )
    texts: int = 0
    done: bool = False


class Client(asyncio.Protocol):
    """Asks one request after another over one connection. Reads no more of an answer than it must: the clients of a
    load test live on the processors that the service needs."""

    def __init__(self, number: int, polite: bool, seen: Seen) -> None:
        self._kind = number % 2
        self._polite = polite
        self._seen = seen
        self._received = b""
        self._ask: asyncio.TimerHandle | None = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(BODIES[self._kind])

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < int(header(head, b"content-length")):
            return
        self._received = b""
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
        if b"connection: close" in head.lower():
            self.transport.close()
        elif pause:
            self._ask = asyncio.get_running_loop().call_later(pause, self.transport.write, BODIES[self._kind])
        else:
            self.transport.write(BODIES[self._kind])

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ask:
            self._ask.cancel()
        if not self._seen.done:
            self._seen.statuses[self._kind][-1] += 1
        self.lost.set_result(None)


def header(head: bytes, name: bytes) -> bytes:
    head = head.lower()
    at = head.index(b"\r\n" + name + b":") + len(name) + 3
    return head[at : head.find(b"\r\n", at) if head.find(b"\r\n", at) > 0 else None].strip()


async def press(port: int, clients: int, seconds: float, polite: bool = True) -> Seen:
    """All clients at once, for so long."""
    loop, seen = asyncio.get_running_loop(), Seen()
    made = []
    for number in range(clients):
        _, client = await loop.create_connection(lambda number=number: Client(number, polite, seen), "127.0.0.1", port)
        made.append(client)
    await asyncio.sleep(SETTLE_SECONDS)
    for count in seen.statuses:
        count.clear()
    seen.texts = 0
    await asyncio.sleep(seconds)
    seen.done = True
    for client in made:
        client.transport.close()
    await asyncio.gather(*(client.lost for client in made))
    return seen


@dataclass
class Share:
    """Texts answered, and the processor time that the service and the clients took, in all rounds."""

    texts: int = 0
    service: float = 0.0
    clients: float = 0.0


def check(models: Path, limit: int, clients: int, seconds: float, polite: bool = True, rounds: int = 1) -> float:
    """Goodput under overload, as a share of the calm one. They take turns, so that both see the same machine."""
    calm_clients = 1 if limit <= 8 else CALM_CLIENTS
    calm, busy = Share(), Share()
    statuses = Seen().statuses
    with Served(models, max_queue_tokens=limit) as service:

        def run(count: int, share: Share) -> Seen:
            spent, own = cpu_seconds(service.process.pid), time.process_time()
            seen = asyncio.run(press(service.port, count, seconds, polite))
            share.service += cpu_seconds(service.process.pid) - spent
            share.clients += time.process_time() - own
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
