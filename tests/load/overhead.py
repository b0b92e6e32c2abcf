"""What HTTP adds to a bare session for a request of one sentence, and the throughput under 8 clients.

    python tests/load/overhead.py deploy/models/sst2-dsformer [--threads 2]

Requests and runs of the session take turns, so that both see the same machine. The throughput is compared with that of
naive_app.py: the same model, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import statistics
import time
from pathlib import Path

from harness import Served, cpu_seconds, encode, read_answer

from service import artifact, classify
from service.model import OnnxModel
from service.schemas import TextPair

TEXT = "A charming and often affecting journey."
ROUNDS, PER_ROUND, WARM_UP = 20, 25, 50
CLIENTS, REQUESTS = 8, 100
REQUEST = encode("/classify", {"inputs": TEXT}, keep=True)


def timed_request(connection: socket.socket) -> tuple[float, dict[str, float]]:
    """Milliseconds of one request, and of its stages by Server-Timing. The client itself does next to nothing."""
    began = time.perf_counter()
    connection.sendall(REQUEST)
    answer = connection.recv(65536)
    while b"]]" not in answer and answer[-1:] != b"]":
        answer += connection.recv(65536)
    took = 1000 * (time.perf_counter() - began)
    assert b" 200 " in answer[:20], answer
    parts = re.findall(r"(\w+);dur=([\d.]+)", answer.decode())
    return took, {name: float(value) for name, value in parts}


def overhead(folder: Path, threads: int) -> dict[str, float]:
    """Milliseconds: medians of a request, the bare session, their difference and the stages; processor time, mean."""
    model = OnnxModel(artifact.read(folder), threads)
    rows, _ = classify.prepare(model.tokenizer, [TextPair(text=TEXT)], "error", model.max_length)
    over, bare, stages = [], [], []
    with Served(folder, threads=threads) as service:
        connection = socket.create_connection(("127.0.0.1", service.port))
        for _ in range(WARM_UP):
            timed_request(connection)
            model.run(rows)
        spent = cpu_seconds(service.process.pid)
        for _ in range(ROUNDS):
            for _ in range(PER_ROUND):
                took, parts = timed_request(connection)
                over.append(took)
                stages.append(parts)
            for _ in range(PER_ROUND):
                began = time.perf_counter()
                model.run(rows)
                bare.append(1000 * (time.perf_counter() - began))
        cpu_ms = 1000 * (cpu_seconds(service.process.pid) - spent) / len(over)
        connection.close()
    http_ms, bare_ms = statistics.median(over), statistics.median(bare)
    found = {"http": http_ms, "bare": bare_ms, "overhead": http_ms - bare_ms, "cpu": cpu_ms}
    return found | {name: statistics.median(stage[name] for stage in stages) for name in stages[0]}


async def throughput(port: int, clients: int = CLIENTS, requests: int = REQUESTS) -> float:
    """Requests a second, each client asking one after another over one connection."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests):
            writer.write(encode("/classify", {"inputs": TEXT}, keep=True))
            assert (await read_answer(reader))[0] == 200
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return clients * requests / (time.perf_counter() - began)


def compare(folder: Path, threads: int) -> tuple[float, float]:
    """Requests a second of the service and of the naive app."""
    speeds = []
    for module in ("service", "naive_app"):
        service = Served(folder, module=module, threads=threads).start()
        try:
            speeds.append(asyncio.run(throughput(service.port)))
        finally:
            service.end()
    return speeds[0], speeds[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(" ".join(f"{name} {value:.2f} ms" for name, value in overhead(options.folder, options.threads).items()))
    ours, naive = compare(options.folder, options.threads)
    print(f"{CLIENTS} clients: {ours:.0f} requests/s, naive app {naive:.0f}, ratio {ours / naive:.2f}")
