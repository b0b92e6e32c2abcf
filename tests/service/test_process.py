"""The real process: started by its command, asked over HTTP, ended by a signal."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.server import make_no_more

ROOT = Path(__file__).parents[2]
QA = {"question": "Where does Clara live?", "context": "Clara lives in Berkeley. " * 40}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DSFORMER_")}
    return kept | variables


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and log file of a service told by flags and by variables."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "service.log"
    command = [sys.executable, "-m", "service", "--models", str(models), "--port", str(port), "--threads", "1"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=file,
            env=environment(DSFORMER_MAX_BODY_BYTES="500000", DSFORMER_SERVICE_HOST="10.0.0.1"),
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url, log
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the service did not get ready; exit code {process.poll()}")


def test_both_tasks_and_variants_answer(server: tuple[str, Path]) -> None:
    url, _ = server
    for variant in ("dense", "dsformer"):
        (answer,) = httpx.post(f"{url}/variants/{variant}/classify", json={"inputs": "the film is good"}).json()
        assert {item["label"] for item in answer} == {"POSITIVE", "NEGATIVE"}
        found = httpx.post(f"{url}/variants/{variant}/qa", json={"inputs": QA}, timeout=60).json()
        assert QA["context"][found["start"] : found["end"]] == found["answer"] != ""
    metrics = httpx.get(url + "/metrics").text
    for task in ("classify", "qa"):
        for variant in ("dense", "dsformer"):
            pattern = rf'dsformer_request_duration_seconds_count{{task="{task}",variant="{variant}"}} 1\.0'
            assert re.search(pattern, metrics), pattern


def test_a_body_over_the_cap_gets_its_answer(server: tuple[str, Path]) -> None:
    url, _ = server
    headers = {"content-type": "application/json"}
    for size in (500_001, 3_000_000):
        whole = httpx.post(url + "/classify", content=b"x" * size, headers=headers)
        chunked = httpx.post(
            url + "/classify", content=(b"x" * 10_000 for _ in range(size // 10_000 + 1)), headers=headers
        )
        assert (whole.status_code, chunked.status_code) == (413, 413)
        assert whole.json()["error_type"] == chunked.json()["error_type"] == "payload_too_large"
    assert httpx.post(url + "/classify", json={"inputs": "good"}).status_code == 200


def test_a_client_that_asks_first_is_refused_before_it_sends(server: tuple[str, Path]) -> None:
    url, _ = server
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/classify")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "900000"), ("Expect", "100-continue")):
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()  # no byte of the body was sent
    assert response.status == 413
    assert json.loads(response.read())["error_type"] == "payload_too_large"
    connection.close()


def test_a_connection_outlasts_the_wait_of_a_refused_client(server: tuple[str, Path]) -> None:
    """uvicorn's own five seconds would end it just when a client comes back after Retry-After."""
    url, _ = server
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.auto_open = False  # a connection that was closed is an error here, and no reason to make another
    connection.connect()
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/livez")
        response = connection.getresponse()
        assert response.status == 200
        response.read()
    connection.close()


def test_garbage_on_the_socket_does_not_stop_the_service(server: tuple[str, Path]) -> None:
    url, _ = server
    host, port = url.removeprefix("http://").split(":")
    for garbage in (b"\x00\xff\x00\xff\r\n\r\n", b"POST /classify HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET"):
        with socket.create_connection((host, int(port)), timeout=10) as s:
            s.sendall(garbage)
    assert httpx.get(url + "/livez").status_code == 200


def test_a_client_that_leaves_in_its_body_is_counted(server: tuple[str, Path]) -> None:
    url, _ = server
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /qa HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(head)
    counted = 'dsformer_requests_total{outcome="cancelled",task="qa",variant="none"} 1.0'
    deadline = time.monotonic() + 20
    while counted not in httpx.get(url + "/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_clients_get_their_own_answers(server: tuple[str, Path]) -> None:
    url, _ = server
    texts = [f"film {i} is {'good' if i % 3 else 'bad'}" for i in range(40)]
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda t: client.post("/classify", json={"inputs": t}).json(), texts))
        alone = [client.post("/classify", json={"inputs": t}).json() for t in texts]
    assert together == alone
    assert len({json.dumps(a) for a in alone}) > 20


def test_the_probe_answers_while_a_long_text_is_tokenized(server: tuple[str, Path]) -> None:
    url, _ = server
    body = {"inputs": "the film is good " * 28_000, "parameters": {"truncation": "right"}}
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, url + "/classify", json=body, timeout=60)
        slowest = 0.0
        while not busy.done():
            began = time.perf_counter()
            assert httpx.get(url + "/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - began)
    answer = busy.result()
    assert answer.status_code == 200
    tokenizing = float(re.search(r"tok;dur=([\d.]+)", answer.headers["server-timing"])[1]) / 1000
    # Holding the interpreter lock, the probe would wait for all of it. 0.25 s forgives a busy machine.
    assert slowest < max(0.25, tokenizing / 2), (slowest, tokenizing)


def test_the_log_says_what_runs_and_repeats_no_text(server: tuple[str, Path]) -> None:
    url, log = server
    httpx.post(url + "/classify?q=queried", json={"inputs": "supercalifragilistic"})
    httpx.post(url + "/classify", json={"inputs": ["supercalifragilistic", ""]})
    httpx.get(url + "/supercalifragilistic")
    text = log.read_text()
    assert "max_body_bytes=500000" in text
    assert re.search(r"isa=(scalar|avx2|avx512|avx512vnni|avx512vbmi|avx512bf16) isa_reason=", text)
    assert re.search(r"request request_id=\w+ route=/classify method=POST status=422", text)
    assert "supercali" not in text
    assert "queried" not in text


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_broken_folder_ends_the_start_with_a_sentence(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "mine", "qa", "dense")
    (folder / "tokenizer.json").unlink()
    ended = run("--models", str(tmp_path))
    assert ended.returncode == 1
    assert f"Model folder {folder}: tokenizer.json is missing." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_impossible_isa_ends_the_start_with_a_sentence(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    write_folder(tmp_path / "mine", "qa", "dsformer")
    ended = run("--models", str(tmp_path), DSFORMER_ISA="altivec")
    assert ended.returncode == 1
    assert "mine" in ended.stderr
    assert "altivec" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments", [["--port", "http"], ["--threads", "0"], ["--default-variant", "int4"], ["--nope"]]
)
def test_wrong_options_are_exit_code_2(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert arguments[0].lstrip("-") in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_misspelt_variable_is_refused() -> None:
    ended = run(DSFORMER_THREAD="1", DSFORMER_TYPO="2")
    assert ended.returncode == 2
    assert "no option for DSFORMER_THREAD, DSFORMER_TYPO" in ended.stderr


def test_options_that_contradict_each_other_are_refused() -> None:
    ended = run("--hang-seconds", "1", "--stall-seconds", "2")
    assert ended.returncode == 2
    assert ended.stderr.strip() == "hang_seconds 1 must be more than stall_seconds 2."


def test_the_options_in_force_can_be_seen_but_no_key() -> None:
    ended = run("--print-config", "--port", "9", DSFORMER_MAX_BATCH_ITEMS="3", DSFORMER_API_KEY="a-very-secret-key")
    assert ended.returncode == 0
    shown = json.loads(ended.stdout)
    assert (shown["port"], shown["max_batch_items"]) == (9, 3)
    assert "secret" not in ended.stdout.replace("api_key", "")


def test_the_doctor(models: Path, tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    well = run("doctor", "--models", str(models), "--port", str(free_port()))
    assert well.returncode == 0, well.stdout + well.stderr
    for words in ("cpu", "kernels", "onnxruntime", "tiny-qa-dsformer: qa, dsformer, sha256", "is free"):
        assert words in well.stdout
    assert "FAIL" not in well.stdout
    folder = write_folder(tmp_path / "mine", "qa", "dense")
    (folder / "tokenizer.json").unlink()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ill = run("doctor", "--models", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert ill.returncode == 1
    failures = [line for line in ill.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 2
    assert "tokenizer.json is missing" in failures[0]
    assert "cannot be listened on" in failures[1]


def test_hugging_faces_client_works_unchanged(server: tuple[str, Path]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    url, _ = server
    for variant in ("dense", "dsformer"):
        client = hub.InferenceClient()
        labels = client.text_classification("the film is good", model=f"{url}/variants/{variant}/classify")
        asked = httpx.post(f"{url}/variants/{variant}/classify", json={"inputs": "the film is good"}).json()
        assert [{"label": each.label, "score": each.score} for each in labels] == asked[0]
        (top,) = client.text_classification("bad", model=f"{url}/variants/{variant}/classify", top_k=1)
        assert top.label in ("POSITIVE", "NEGATIVE")
        found = client.question_answering(
            question=QA["question"], context=QA["context"], model=f"{url}/variants/{variant}/qa"
        )
        assert QA["context"][found.start : found.end] == found.answer != ""


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")
def test_a_socket_that_makes_no_more_connections_still_hands_over_those_it_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as early:
            make_no_more(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            accepted, _ = listener.accept()
            with accepted:
                early.sendall(b"asked")
                assert accepted.recv(5) == b"asked"
                accepted.sendall(b"told")
                assert early.recv(4) == b"told"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_help_shows_every_flag() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for flag in ("--models", "--host", "--port", "--threads", "--max-body-bytes", "--truncation"):
        assert flag in ended.stdout


def test_no_training_library_is_loaded() -> None:
    code = "import sys, service.__main__; print(*{'torch', 'transformers', 'onnx', 'compressor'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""
