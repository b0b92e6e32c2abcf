"""Whatever comes over the socket: an answer with a documented status, or a closed connection; and the service goes on.

    python tests/load/fuzz.py MODELS [--raw 20000] [--schema 100]

Two fuzzers. `raw` writes requests that are broken in their bytes, their headers, their encoding or their JSON.
`schema` is schemathesis, which reads /openapi.json and runs all its checks on what it makes up of it.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gzip
import json
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

from harness import Served, ask

PATHS = [
    *("/classify", "/qa", "/predict", "/variants/dense/classify", "/variants/dsformer/qa", "/variants/%00/qa"),
    *("/nope", "/", "/livez", "/metrics", "/v2/models/x", "/variants/" + "v" * 5000 + "/qa", "/%ff%fe", "/a//b", "*"),
    "/compare",
]
TASKS = PATHS[:5]
METHODS = ["GET", "PUT", "HEAD", "OPTIONS", "DELETE", "BREW", "post", ""]
# What a task may answer by /openapi.json; and 400 is also the HTTP library's own word for what is no HTTP at all.
DOCUMENTED = {200, 400, 401, 404, 405, 413, 415, 422, 424, 429, 503, 504}
CONFIG = Path(__file__).with_name("schemathesis.toml")
CONNECTIONS = 64
# Longer than any answer; a request that is cut short waits for its rest, and gets none.
SECONDS = 8
SURROGATES = ["\ud800", "\udfff"]
ODD = ["\0", "\u202e", "\ufeff", "\U0010ffff", "e\u0301", "\u200b", "🎬", "東京", "\r\n", "\x1b[2J"]
FIELDS = ["inputs", "parameters", "options", "question", "context", "text", "text_pair", "top_k", "truncation"]


def text(draw: random.Random) -> str:
    kind = draw.randrange(12)
    if kind == 0:
        return "".join(draw.choices(ODD + SURROGATES * (draw.random() < 0.2), k=draw.randrange(1, 20)))
    if kind == 1:
        return "".join(chr(draw.randrange(0xD800)) for _ in range(draw.randrange(30)))
    if kind == 2:
        return "x" * (1_000_000 if draw.random() < 0.05 else draw.choice([1, 100, 10_000]))
    return " ".join(draw.choices(["the", "film", "is", "good", *ODD], k=draw.randrange(1, 30)))


def value(draw: random.Random, depth: int = 0) -> object:
    kind = draw.randrange(10 if depth < 4 else 7)
    simple = [
        None,
        True,
        draw.randrange(-(2**70), 2**70),
        draw.choice([0, -1, 1e308, 1e-320, 2**31]),
        text(draw),
        "",
        -1,
    ]
    if kind < 7:
        return simple[kind]
    if kind == 7:
        return [value(draw, depth + 1) for _ in range(draw.randrange(5))]
    return {draw.choice([*FIELDS, text(draw)]): value(draw, depth + 1) for _ in range(draw.randrange(5))}


def near(draw: random.Random) -> object:
    """A body that is nearly, or wholly, what the service expects."""
    question = {"question": text(draw), "context": text(draw)}
    inputs = draw.choice([text(draw), [text(draw), text(draw)], question, [question] * draw.randrange(4), value(draw)])
    body: dict[str, object] = {"inputs": inputs}
    if draw.random() < 0.4:
        names = ["top_k", "truncation", "variant", "doc_stride", "max_seq_len", "max_answer_len", "function_to_apply"]
        good = [1, 2, "right", "left", "dense", 16, 32, "sigmoid", "none", value(draw)]
        body["parameters"] = {name: draw.choice(good) for name in draw.sample(names, draw.randrange(4))}
    if draw.random() < 0.1:
        body["task"] = draw.choice(["classify", "qa", value(draw)])
    return body


def content(draw: random.Random) -> bytes:
    kind = draw.randrange(20)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        return draw.choice([b"[", b'{"inputs":', b'[{"a":']) * draw.choice([10, 1000, 100_000])
    if kind == 2:
        # Lone surrogates and NUL as they are in bytes, not escaped.
        return json.dumps(near(draw), ensure_ascii=False).encode("utf-8", "surrogatepass")
    if kind == 3:
        return draw.choice(
            [b"", b" ", b"NaN", b'{"inputs": NaN}', b"1" * 5000, b'{"inputs":"a","inputs":3}', b"\xef\xbb\xbf{}"]
        )
    made = bytearray(json.dumps(near(draw)).encode())
    if kind == 4 and made:
        for _ in range(draw.randrange(1, 5)):
            made[draw.randrange(len(made))] = draw.randrange(256)
    if kind == 5:
        return bytes(made[: draw.randrange(len(made) + 1)])
    return bytes(made)


def request(draw: random.Random) -> bytes:
    body = content(draw)
    headers: list[tuple[str, str]] = [("Host", "t"), ("Content-Type", "application/json")]
    if draw.random() < 0.1:
        headers[1] = (
            "Content-Type",
            draw.choice(["text/plain", "", "application/json;" + "x" * 5000, "\x01", "multipart/a"]),
        )
    if draw.random() < 0.1:
        name, pack = draw.choice([("gzip", gzip.compress), ("deflate", zlib.compress), ("br", bytes), ("gzip", bytes)])
        if draw.random() < 0.02:
            body = b" " * 50_000_000
        body = pack(body)
        headers.append(("Content-Encoding", name))
    length = str(len(body))
    if draw.random() < 0.05:
        length = draw.choice(["-1", "0", "x", "99999999999999999999", "1e3", str(len(body) + 5), " ", "+3", "4,4"])
    if draw.random() < 0.1:
        headers.append(("Transfer-Encoding", draw.choice(["chunked", "gzip, chunked", "identity", "CHUNKED"])))
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if draw.random() < 0.8 else body
    if "Transfer-Encoding" not in dict(headers) or draw.random() < 0.1:
        headers.append(("Content-Length", length))
    if draw.random() < 0.1:
        odd = [
            ("X-Request-Timeout", draw.choice(["0.001", "nan", "inf", "-1", "1e400", "x"])),
            ("X-Request-Id", text(draw)),
            ("Authorization", draw.choice(["", "Bearer", "Bearer " + "x" * 9000])),
            ("Expect", draw.choice(["100-continue", "200"])),
            ("Accept", "\x7f"),
            ("Upgrade", "websocket"),
            ("Connection", draw.choice(["upgrade", "keep-alive, x"])),
            ("X", "y" * draw.choice([10, 70_000])),
            ("a b", "c"),
        ]
        headers.append(draw.choice(odd))
    version = draw.choice(["HTTP/1.1"] * 20 + ["HTTP/1.0", "HTTP/2.0", "HTTP/9", ""])
    method = "POST" if draw.random() < 0.8 else draw.choice(METHODS)
    path = draw.choice(TASKS if draw.random() < 0.8 else PATHS) + ("?q=" + text(draw) if draw.random() < 0.05 else "")
    line = f"{method} {path} {version}\r\n"
    head = line + "".join(f"{name}: {content}\r\n" for name, content in headers) + "\r\n"
    made = bytearray(head.encode("utf-8", "surrogatepass") + body)
    if draw.random() < 0.03:
        del made[draw.randrange(len(made)) :]
    if draw.random() < 0.03:
        at = draw.randrange(min(len(made), 200) or 1)
        made[at:at] = draw.randbytes(draw.randrange(1, 30))
    return bytes(made)


async def send(port: int, made: bytes) -> int:
    """The status of the answer; 0 where there is none, for the request never ended or is no HTTP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(made)
        await writer.drain()
        line = await asyncio.wait_for(reader.readline(), SECONDS)
        while line.startswith(b"HTTP/1.1 100"):
            await reader.readline()
            line = await asyncio.wait_for(reader.readline(), SECONDS)
        found = re.match(rb"HTTP/1\.[01] (\d{3}) ", line)
        return int(found[1]) if found else 0
    except (OSError, ValueError):
        return 0
    finally:
        writer.close()


async def raw(service: Served, count: int, seed: int = 0) -> collections.Counter[int]:
    seen = collections.Counter[int]()
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            made = request(random.Random(f"{seed}-{number}"))
            status = await send(service.port, made)
            seen[status] += 1
            assert status in DOCUMENTED | {0}, (status, number, made[:300])

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return seen


def check_raw(models: Path, count: int, seed: int = 0) -> None:
    with Served(models, log_level="error") as service:
        seen = asyncio.run(raw(service, count, seed))
        answer = asyncio.run(ask(service.port, "/classify", {"inputs": "the film is good"}))
        assert answer.status == 200
        assert service.get("/readyz")[0] == 200
        errors = service.metric("dsformer_requests_total", outcome="error")
    print(f"{count} raw requests: {dict(sorted(seen.items()))}; counted as the service's own fault: {errors:.0f}")
    assert errors == 0
    assert "request failed" not in service.log, service.log[:3000]
    assert seen[200] > count / 50


def check_schema(models: Path, examples: int) -> str:
    """Schemathesis' own last lines."""
    with Served(models, log_level="error") as service:
        command = [
            *(
                sys.executable,
                "-m",
                "schemathesis.cli",
                "--config-file",
                str(CONFIG),
                "run",
                f"http://127.0.0.1:{service.port}/openapi.json",
            ),
            *("--max-examples", str(examples), "--checks", "all", "--phases", "examples,coverage,fuzzing"),
            *("--seed", "1", "--no-color", "--continue-on-failure"),
            # Of /variants/{variant}, as of the names under /v2, few are loaded.
            *("--warnings", "off"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert service.get("/readyz")[0] == 200
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "request failed" not in service.log, service.log[:3000]
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--raw", type=int, default=20_000)
    parser.add_argument("--schema", type=int, default=100)
    options = parser.parse_args()
    if options.raw:
        check_raw(options.models, options.raw)
    if options.schema:
        check_schema(options.models, options.schema)
