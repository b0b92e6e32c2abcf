"""`dsformer-bench http` against a service in a process of its own; its arithmetic on replies made here."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import Served

from service import bench_http, bench_main
from service.bench_http import Turn, summarize, take_turn
from service.client import NO_ANSWER, Client, Reply, look
from service.errors import StartError
from service.settings import read_options


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with Served(models) as service:
        yield service


def url_of(service: Served) -> str:
    return f"http://127.0.0.1:{service.port}"


def test_both_tasks_and_variants_in_a_closed_loop(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, report = tmp_path / "plot.png", tmp_path / "report.json"
    options = ["--requests", "12", "--rounds", "3", "--warm-up", "1", "--clients", "3"]
    before = {v: served.metric("dsformer_requests_total", outcome="ok", variant=v) for v in ("dense", "dsformer")}
    bench_main.main(["http", "--url", url_of(served), *options, "--plot", str(plot), "--json", str(report)])
    told = json.loads(report.read_text())
    assert [(row["task"], row["variant"]) for row in told["loads"]] == [
        (task, variant) for task in ("classify", "qa") for variant in ("dense", "dsformer")
    ]
    for row in told["loads"]:
        assert (row["requests"], row["errors"]) == (36, {})
        assert row["requests_per_second"] > 0
        for times in (row["client"], row["service"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
            assert times["speedup_quartiles"][0] <= times["speedup"] <= times["speedup_quartiles"][1]
        assert all(row["service"][name] < row["client"][name] for name in ("p50", "p90", "p99", "mean"))
        assert row["agrees"] == 1 if row["variant"] == "dense" else 0 <= row["agrees"] <= 1
    assert [row["client"]["speedup"] for row in told["loads"] if row["variant"] == "dense"] == [1, 1]
    for variant, count in before.items():  # the service itself saw as many: warm-up and rounds of both tasks
        assert served.metric("dsformer_requests_total", outcome="ok", variant=variant) - count == 2 * 4 * 12
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("0 of 36") == 4


def test_texts_and_questions_of_ones_own(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("the film is good\n\nthe film is bad\n")
    (tmp_path / "questions.jsonl").write_text(
        '{"question": "who lives in berkeley", "context": "clara lives in berkeley", "id": 7}\n'
    )
    files = ["--texts", str(tmp_path / "texts.txt"), "--questions", str(tmp_path / "questions.jsonl")]
    options = read_options(bench_http.Options, files)
    assert sorted(json.loads(b)["inputs"] for b in bench_http.bodies_of("classify", options)) == [
        "the film is bad",
        "the film is good",
    ]
    (body,) = bench_http.bodies_of("qa", options)
    assert json.loads(body)["inputs"] == {"question": "who lives in berkeley", "context": "clara lives in berkeley"}
    small = ["--requests", "2", "--rounds", "1", "--warm-up", "0", "--variants", "dsformer"]
    bench_main.main(["http", "--url", url_of(served), *files, *small, "--compare", "0"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| qa | dsformer |"))
    assert line.endswith("|  |"), "nothing was compared"


def test_an_open_loop_keeps_to_its_rate(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--requests", "20", "--rounds", "1", "--warm-up", "0", "--tasks", "classify", "--variants", "dense"]
    began = time.monotonic()
    bench_main.main(["http", "--url", url_of(served), *small, "--rate", "40", "--clients", "8"])
    assert time.monotonic() - began > 0.25  # 20 requests at 40 a second: half a second, by chance a little less
    assert "load open loop, 40 requests/s" in capsys.readouterr().out


class Slow(BaseHTTPRequestHandler):
    """Answers 200 after 50 ms, and every third request 429 at once; one connection at a time is busy."""

    protocol_version = "HTTP/1.1"
    count = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Slow.count += 1
        refused = Slow.count % 3 == 0
        if not refused:
            time.sleep(0.05)
        self.send_response(429 if refused else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[str]:
    Slow.count = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_open_loop_counts_the_wait_for_a_connection(slow: str) -> None:
    """Four requests due at once over one connection: the last one of them has waited for the others."""
    turn = take_turn([Client(slow)], "/x", [b"{}"] * 4, [1e-6] * 4, lambda: None)
    assert [reply.status for reply in turn.replies] == [200, 200, 429, 200]
    assert turn.milliseconds[-1] >= 150
    assert sum(reply.seconds for reply in turn.replies) > turn.seconds
    closed = take_turn([Client(slow)], "/x", [b"{}"] * 4, [0.0] * 4, lambda: None)
    assert sum(reply.seconds for reply in closed.replies) <= closed.seconds  # one after another, and nothing else


def test_refusals_are_errors_and_not_times(slow: str) -> None:
    turns = [take_turn([Client(slow)], "/x", [b"{}"] * 3, [0.0] * 3, lambda: None) for _ in range(2)]
    (row,) = summarize("classify", {"dense": turns})
    assert (row.requests, row.errors) == (6, {"429": 2})
    assert row.client is not None
    assert row.client.p50 >= 50
    assert row.service is None, "it does not say"


def test_a_kept_connection_that_was_closed_meanwhile_is_opened_again(slow: str) -> None:
    client = Client(slow)
    assert client.get("/").ok
    assert client._connection.sock is not None
    client._connection.sock.shutdown(socket.SHUT_RDWR)
    assert client.get("/").ok


def test_what_answers_is_no_service_of_ours(slow: str) -> None:
    with pytest.raises(StartError, match="is no DSFormer service"):
        look(Client(slow), slow)


def test_percentiles_and_ratios_are_of_one_round() -> None:
    """The second round is twice as slow for both, which leaves the ratio alone."""

    def turn(*milliseconds: float) -> Turn:
        return Turn(0.5, [Reply(200, ms / 1000, service_seconds=ms / 1000 - 0.004) for ms in milliseconds])

    failed = Turn(0.5, [Reply(NO_ANSWER, 0.1), Reply(500, 0.1)])
    first, second, third = summarize(
        "qa",
        {
            "dense": [turn(10, 20, 30), turn(20, 40, 60)],
            "dsformer": [turn(5, 10, 15), turn(10, 20, 30)],
            "nm": [failed, failed],
        },
    )
    assert first.client is not None
    assert second.client is not None
    assert second.service is not None
    assert second.client.speedup == pytest.approx(2)
    assert second.client.speedup_quartiles == pytest.approx((2, 2))
    assert (first.client.p50, first.client.p90, first.client.p99, first.client.mean) == pytest.approx((25, 50, 59, 30))
    assert first.requests_per_second == pytest.approx(6)
    assert (third.client, third.service, third.errors) == (None, None, {"no answer": 2, "500": 2})
    # 16 over 6 and 36 over 16: what the clients add to both makes the ratio smaller
    assert second.service.speedup == pytest.approx((16 / 6 + 36 / 16) / 2)
    assert "2 x no answer, 2 x 500 of 4" in bench_http.table([first, second, third], {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://there"], "--url expects an address such as http://127.0.0.1:8000, got 'ftp://there'"),
        (["--url", "http://127.0.0.1:1"], "No DSFormer service answers at http://127.0.0.1:1"),
        (["--tasks", "ner"], "no model for the task 'ner'; it has classify, qa"),
        (["--variants", "nm"], "no variant 'nm' for classify; it has dense, dsformer"),
        (["--questions", "FILE"], "line 1: expected a JSON object such as"),
        (["--texts", "EMPTY"], "holds no text"),
        (["--api-key-file", "EMPTY"], "holds no API key"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(
    served: Served, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text('{"question": "who"}\n')
    (tmp_path / "EMPTY").write_text("\n")
    flags = [str(tmp_path / word) if word in ("FILE", "EMPTY") else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        bench_main.main(["http", *(() if "--url" in flags else ("--url", url_of(served))), *flags])
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err


def test_an_api_key_is_sent(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\na-key-of-sixteen-letters\n")
    small = ["--requests", "2", "--rounds", "1", "--warm-up", "0"]
    with Served(models / "tiny-classify-dense", api_key_file=keys) as service:
        bench_main.main(["http", "--url", url_of(service), *small])
        assert "2 x 401 of 2" in capsys.readouterr().out
        bench_main.main(["http", "--url", url_of(service), *small, "--api-key-file", str(keys)])
    assert "0 of 2" in capsys.readouterr().out


def test_the_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    bench_main.main([])
    said = capsys.readouterr().out
    assert all(f"dsformer-bench {command}" in said for command in bench_main.MODULES)
    with pytest.raises(SystemExit):
        bench_main.main(["folders", "nowhere"])
    first = capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_main.main(["nowhere"])
    assert capsys.readouterr().err == first != ""
