"""What the load tests share: a service in a process of its own, and a client light enough to bring it to its limits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Served:
    """`with Served(models, max_queue_tokens=8) as service:` runs from ready to ended."""

    def __init__(self, models: Path, module: str = "service", **options: object) -> None:
        self.port = free_port()
        self._options = {"models": models, "port": self.port, "threads": 1, "log_level": "warning", **options}
        self._module = module
        self.log = ""

    def start(self, until: str = "/readyz") -> Served:
        """Returns when the probe answers 200."""
        flags = [part for k, v in self._options.items() for part in ("--" + k.replace("_", "-"), str(v))]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DSFORMER_")}
        kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "load"), kept.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", self._module, *flags], cwd=ROOT, env=kept, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + START_SECONDS
        while self.get(until)[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the service did not get ready: {self.process.communicate()[1]}")
            time.sleep(0.05)
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))

    def end(self, seconds: float = 60) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.log = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode

    def __enter__(self) -> Served:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            status = self.end()
        finally:
            if self.process.poll() is None:
                self.process.kill()
        if kind is None:
            assert status == 0, self.log


def resident_megabytes(pid: int | str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1000


def cpu_seconds(pid: int) -> float:
    """What the processor has done for a process. Unlike a clock's time it bears a busy machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Answer:
    status: int  # 0: no connection could be made; -1: it was made, and broke before the answer
    seconds: float
    headers: dict[str, str]
    body: Any = None


def encode(path: str, body: object, headers: dict[str, str] | None = None, keep: bool = False) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Host": "t", "Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
    head["Connection"] = "keep-alive" if keep else "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    content = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(first.split()[1]), headers, json.loads(content) if content else None


async def ask(
    port: int, path: str, body: object, headers: dict[str, str] | None = None, seconds: float = 120
) -> Answer:
    """One request over a connection of its own."""
    began = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Answer(0, time.perf_counter() - began, {})
    try:
        writer.write(encode(path, body, headers))
        status, answered, content = await asyncio.wait_for(read_answer(reader), seconds)
        return Answer(status, time.perf_counter() - began, answered, content)
    except (OSError, asyncio.IncompleteReadError):
        return Answer(-1, time.perf_counter() - began, {})
    finally:
        writer.close()
