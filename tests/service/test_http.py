"""Bad input of every kind: a sentence, the right status, and the next request is still answered."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.admission import Admission, Ticket
from service.app import create_app
from service.errors import BackendFailed, StartError
from service.model import OnnxModel
from service.settings import Settings

JSON = {"content-type": "application/json"}
QA = {"question": "Where does Clara live?", "context": "Clara lives in Berkeley."}


@pytest.fixture(autouse=True)
def still_answers(client: TestClient) -> Iterator[None]:
    yield
    assert client.post("/classify", json={"inputs": "the film is good"}).status_code == 200
    assert client.post("/qa", json={"inputs": QA}).json()["answer"]


def check_error(response: Any, status: int, error_type: str, words: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type", "request_id", "detail"}
    assert body["error_type"] == error_type
    assert body["request_id"] == response.headers["x-request-id"]
    assert words in body["error"]
    assert body["error"][-1] in ".)"
    assert all(set(item) == {"field", "message"} for item in body["detail"])
    return body


@pytest.mark.parametrize("path", ["/classify", "/qa", "/variants/dense/classify", "/variants/dense/qa"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{bad", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b'{"inputs": "caf\xe9"}', "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"inputs":' * 50_000, "nested too deeply"),
        (b"1" * 10_000, "not valid JSON"),
        (b'{"inputs": []}', "the batch is empty"),
    ],
)
def test_malformed_bodies(client: TestClient, path: str, content: bytes, words: str) -> None:
    check_error(client.post(path, content=content, headers=JSON), 400, "malformed", words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "The body: expected a JSON object"),
        ("text", "The body: expected a JSON object"),
        ({}, "inputs: this field is required"),
        ({"input": "a"}, "inputs: this field is required"),
        ({"inputs": None}, "inputs: expected a text"),
        ({"inputs": 3}, "inputs: expected a text"),
        ({"inputs": ["a", 3]}, "inputs[1]: expected a text"),
        ({"inputs": [["a"]]}, "inputs[0]: expected a text"),
        ({"inputs": ""}, "inputs: the text is empty"),
        ({"inputs": " \t\n\u3000"}, "inputs: the text is empty"),
        ({"inputs": ["good", ""]}, "inputs[1]: the text is empty"),
        ({"inputs": {"text": "a", "text_pair": " "}}, "inputs.text_pair: the text is empty"),
        ({"inputs": {"text": "a", "pair": "b"}}, "inputs.pair: there is no such field"),
        ({"inputs": "\0"}, "inputs[0]: the tokenizer finds no word"),
        ({"inputs": "\u200b\u0301"}, "inputs[0]: the tokenizer finds no word"),
        ({"inputs": "a", "parameters": {"topk": 1}}, "parameters.topk: there is no such field"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"top_k": True}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"top_k": "2"}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"truncation": "both"}}, "parameters.truncation"),
        ({"inputs": "a", "parameters": {"function_to_apply": "relu"}}, "parameters.function_to_apply"),
        ({"inputs": "a", "extra": 1}, "extra: there is no such field"),
        ({"inputs": ["a"] * 65}, "65 inputs in one request; at most 64"),
    ],
)
def test_wrong_fields_of_classify(client: TestClient, body: object, words: str) -> None:
    response = client.post("/classify", json=body)
    check_error(response, 422, "validation", words)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("Where?", "inputs: expected an object"),
        ({"question": "Where?"}, "inputs.context: this field is required"),
        ({"question": "", "context": "a"}, "inputs.question: the text is empty"),
        ({"question": "Where?", "context": " \n "}, "inputs.context: the text is empty"),
        ({"question": "Where?", "context": "\0\0"}, "inputs[0].context: the tokenizer finds no word"),
        ([QA, {"question": "\0", "context": "a"}], "inputs[1].question: the tokenizer finds no word"),
        ([QA, 7], "inputs[1]: "),
        ([QA] * 65, "65 inputs in one request"),
    ],
)
def test_wrong_fields_of_qa(client: TestClient, inputs: object, words: str) -> None:
    check_error(client.post("/qa", json={"inputs": inputs}), 422, "validation", words)


@pytest.mark.parametrize("field", ["top_k", "doc_stride", "max_answer_len", "max_seq_len", "max_question_len"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, [1]])
def test_wrong_numbers_of_qa(client: TestClient, field: str, value: object) -> None:
    body = json.dumps({"inputs": QA, "parameters": {field: value}})
    check_error(client.post("/qa", content=body, headers=JSON), 422, "validation")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", rb'{"inputs": ["good", "bad \ud800"]}'),
        ("/qa", rb'{"inputs": {"question": "\udfff", "context": "a"}}'),
        ("/classify", rb'{"inputs": "good", "\ud800": 1}'),
    ],
)
def test_lone_surrogates(client: TestClient, path: str, body: bytes) -> None:
    check_error(client.post(path, content=body, headers=JSON), 400, "malformed", "hex escape")


def test_nul_among_words_is_no_word(client: TestClient) -> None:
    with_nul = client.post("/classify", json={"inputs": "the film\0 is good"})
    assert with_nul.json() == client.post("/classify", json={"inputs": "the film is good"}).json()
    context = "Clara\0 lives\0 in Berkeley"
    answer = client.post("/qa", json={"inputs": {"question": "Where?", "context": context}}).json()
    assert context[answer["start"] : answer["end"]] == answer["answer"]


def test_a_megabyte_of_text(client: TestClient) -> None:
    text = "the film is good " * 60_000
    check_error(client.post("/classify", json={"inputs": text}), 422, "too_long")
    cut = client.post("/classify", json={"inputs": text, "parameters": {"truncation": "right"}})
    assert (cut.status_code, cut.headers["x-truncated"]) == (200, "1")
    check_error(client.post("/qa", json={"inputs": {"question": "Where?", "context": text}}), 422, "too_long")
    word = client.post("/classify", json={"inputs": "x" * 1_000_000})
    assert word.status_code == 200  # one word, unknown to the vocabulary


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml"])
def test_only_json_is_taken(client: TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = client.post("/classify", content=b'{"inputs": "good"}', headers=headers)
    check_error(response, 415, "media_type", "application/json")


def test_a_charset_may_follow_the_media_type(client: TestClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/classify", content=b'{"inputs": "good"}', headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_cap(models: Path, make_client: Callable[..., TestClient], chunked: bool) -> None:
    with make_client(models, max_body_bytes=1000) as small:
        fits = json.dumps({"inputs": "a" * 980}).encode()
        assert len(fits) <= 1000
        assert small.post("/classify", content=fits, headers=JSON).status_code == 200
        for size in (1001, 7000, 20_000):
            body = (b" " * 100 for _ in range(size // 100 + 1)) if chunked else b" " * size
            check_error(small.post("/classify", content=body, headers=JSON), 413, "payload_too_large", "1000 bytes")
        # Not JSON either, but size is looked at first.
        check_error(small.post("/classify", content=b"{" * 2000, headers=JSON), 413, "payload_too_large")


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("Deflate", zlib.compress)])
def test_compressed_bodies(client: TestClient, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    headers = {**JSON, "content-encoding": encoding}
    packed = pack(json.dumps({"inputs": "the film is good"}).encode())
    answer = client.post("/classify", content=packed, headers=headers)
    assert answer.json() == client.post("/classify", json={"inputs": "the film is good"}).json()
    check_error(client.post("/classify", content=packed[:-3], headers=headers), 400, "malformed", "cut off")
    check_error(client.post("/classify", content=packed + b"x", headers=headers), 400, "malformed", "follows")
    check_error(client.post("/classify", content=b"{}", headers=headers), 400, "malformed", "Content-Encoding")
    check_error(client.post("/classify", content=pack(b" "), headers=headers), 400, "malformed", "empty")
    bomb = pack(b" " * 100_000_000)
    assert len(bomb) < 200_000
    check_error(client.post("/classify", content=bomb, headers=headers), 413, "payload_too_large", "decompressed")


def test_an_unknown_encoding(client: TestClient) -> None:
    headers = {**JSON, "content-encoding": "br"}
    check_error(client.post("/classify", content=b"{}", headers=headers), 415, "media_type", "gzip")


def test_a_text_over_the_cap(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models / "tiny-qa-dense", max_text_chars=100) as small:
        assert small.post("/qa", json={"inputs": {"question": "a" * 100, "context": "a"}}).status_code == 200
        response = small.post("/qa", json={"inputs": [QA, {"question": "a", "context": "a" * 101}]})
        check_error(response, 422, "too_long", "inputs[1].context has 101 characters; at most 100")


def test_only_who_has_a_key_is_answered(
    models: Path, tmp_path: Path, make_client: Callable[..., TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = "first-secret-key-1", "second-secret-key-2"
    (tmp_path / "keys").write_text(f"# of the tests\n{other}\n")
    with (
        caplog.at_level(logging.DEBUG),
        make_client(models / "tiny-qa-dense", api_key=one, api_key_file=tmp_path / "keys") as client,
    ):
        for key in (one, other):
            headers = {"authorization": f"Bearer {key}"}
            assert client.post("/qa", json={"inputs": QA}, headers=headers).status_code == 200
        for sent in ({}, {"authorization": f"Basic {one}"}, {"authorization": "Bearer wrong"}, {"authorization": one}):
            refused = client.post("/qa", json={"inputs": QA}, headers=sent)
            check_error(refused, 401, "unauthorized", "Bearer")
            assert refused.headers["www-authenticate"] == "Bearer"
        for open_to_all in ("/livez", "/readyz", "/health", "/metrics", "/info"):
            answer = client.get(open_to_all)
            assert answer.status_code == 200
            assert "secret-key" not in answer.text
    assert "secret-key" not in caplog.text
    assert all("secret-key" not in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", None])
def test_a_file_of_keys_that_is_none(models: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(StartError, match="API key"):
        create_app(Settings(models=models / "tiny-qa-dense", threads=1, api_key_file=tmp_path / "keys"))


def test_full(client: TestClient) -> None:
    admission = client.app.state.service.admission
    with Ticket(admission, 10 * admission.limit_tokens):
        for inputs in ("good", ["good"] * 3):
            response = client.post("/classify", json={"inputs": inputs})
            check_error(response, 429, "overloaded", "full")
            assert 1 <= int(response.headers["retry-after"]) <= 60


def test_who_waits_at_the_door_gets_in_when_there_is_room(client: TestClient) -> None:
    admission = client.app.state.service.admission
    ticket = Ticket(admission, 10 * admission.limit_tokens)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/classify", json={"inputs": "good"})
        time.sleep(0.2)
        assert not waiting.done()
        client.portal.call(ticket.leave)
        assert waiting.result().status_code == 200
    assert (admission.requests, admission.tokens) == (0, 0)


def test_a_crowded_door_refuses_before_the_body_is_read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "crowded", True)
    for content in (b"not JSON", b"x" * 10_000_000):
        response = client.post("/classify", content=content, headers=JSON)
        check_error(response, 429, "overloaded", "full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
    monkeypatch.undo()


def test_refusals_are_held_back_when_they_are_too_many() -> None:
    admission = Admission(1, lambda: 0.0)
    holds = [admission.hold_seconds() for _ in range(1000)]
    assert holds[100] == 0
    assert 0.5 < holds[-1] <= 1


def test_too_late(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxModel.run
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(OnnxModel, "run", lambda self, rows: (time.sleep(0.5), real(self, rows))[1])
        first = pool.submit(client.post, "/classify", json={"inputs": "good"})
        time.sleep(0.1)
        late = client.post("/classify", json={"inputs": "bad"}, headers={"x-request-timeout": "0.1"})
        check_error(late, 504, "deadline")
        assert first.result().status_code == 200


@pytest.mark.parametrize("sent", ["soon", "0", "-1", "nan", ""])
def test_a_deadline_that_is_none(client: TestClient, sent: str) -> None:
    response = client.post("/classify", json={"inputs": "good"}, headers={"x-request-timeout": sent})
    check_error(response, 422, "validation", "X-Request-Timeout")


def test_unknown_routes_verbs_and_variants(client: TestClient) -> None:
    check_error(client.get("/nope"), 404, "not_found")
    check_error(client.post("/classify/", json={"inputs": "a"}, follow_redirects=False), 404, "not_found")
    response = client.get("/classify")
    check_error(response, 405, "method")
    assert response.headers["allow"] == "POST"
    check_error(client.post("/livez"), 405, "method")
    check_error(client.post("/variants/int4/classify", json={"inputs": "a"}), 404, "not_found", "dense, dsformer")
    check_error(client.post("/qa", json={"inputs": QA, "parameters": {"variant": "int4"}}), 404, "not_found")
    body = {"inputs": "a", "parameters": {"variant": "dense"}}
    check_error(client.post("/variants/dsformer/classify", json=body), 422, "validation", "differs")
    assert client.post("/variants/dense/classify", json=body).status_code == 200


def test_a_task_without_a_model(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models / "tiny-qa-dense") as client:
        check_error(client.post("/classify", json={"inputs": "a"}), 424, "task_unavailable")
        assert client.post("/qa", json={"inputs": QA}).headers["x-model-variant"] == "dense"
        assert client.get("/info").json()["default_variants"] == {"qa": "dense"}
        check_error(client.post("/variants/dsformer/qa", json={"inputs": QA}), 404, "not_found")


def test_the_variant_is_chosen(client: TestClient) -> None:
    variants = {}
    for name, path, parameters in [
        ("default", "/classify", {}),
        ("body", "/classify", {"variant": "dense"}),
        ("path", "/variants/dense/classify", {}),
    ]:
        response = client.post(path, json={"inputs": "good", "parameters": parameters})
        variants[name] = response.headers["x-model-variant"]
    assert variants == {"default": "dsformer", "body": "dense", "path": "dense"}


def test_old_clients_options_are_ignored(client: TestClient) -> None:
    body = {"inputs": "good", "options": {"wait_for_model": True}}
    assert client.post("/classify", json=body).status_code == 200


def test_request_id(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, 'a"b'):
        fresh = client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", fresh)
    assert client.get("/livez").headers["x-request-id"] != client.get("/livez").headers["x-request-id"]


def test_timing_headers(client: TestClient) -> None:
    headers = client.post("/classify", json={"inputs": ["the film", "is good"]}).headers
    parts = dict(re.fullmatch(r"(\w+);dur=([\d.]+)", part).groups() for part in headers["server-timing"].split(", "))
    assert list(parts) == ["tok", "queue", "infer", "post", "total"]
    assert float(parts["infer"]) > 0
    total = float(parts.pop("total"))
    assert total >= sum(float(value) for value in parts.values())
    assert headers["x-compute-tokens"] == "8"
    assert abs(int(headers["x-total-time"]) - total) <= 0.5
    for name in ("x-tokenization-time", "x-queue-time", "x-inference-time"):
        assert 0 <= int(headers[name]) <= total + 0.5
    assert re.fullmatch("[0-9a-f]{12}", headers["x-model-revision"])


@pytest.mark.parametrize(
    "failure", [BackendFailed("The model tiny failed: out of memory."), RuntimeError("secret text of a user")]
)
def test_a_failing_model_is_a_500_without_user_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG, logger="service"):
        patched.setattr(OnnxModel, "run", fail)
        response = client.post("/classify", json={"inputs": "secret text of a user"})
    body = check_error(response, 500, "backend" if isinstance(failure, BackendFailed) else "internal")
    assert "secret" not in response.text
    (record,) = [r for r in caplog.records if r.message == "request failed"]
    assert record.request_id == body["request_id"]
    assert record.kind == type(failure).__name__
    assert all("secret" not in str(vars(r)) for r in caplog.records if r.name.startswith("service"))


def test_nan_logits_are_a_500(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt:
        def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(feed["input_ids"]), 2), np.nan, dtype=np.float32)]

    model = client.app.state.service.models.get("classify", "dense")
    with monkeypatch.context() as patched:
        patched.setattr(model, "_session", Spoilt())
        response = client.post("/variants/dense/classify", json={"inputs": "good"})
    check_error(response, 500, "backend", "NaN")


def test_probes_and_docs(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == client.get("/health").json() == {"status": "ready"}
    assert "swagger" in client.get("/docs").text
    schema = client.get("/openapi.json").json()
    for path in ("/classify", "/qa", "/variants/{variant}/classify", "/variants/{variant}/qa"):
        operation = schema["paths"][path]["post"]
        assert {"200", "400", "404", "413", "415", "422", "424", "429", "500", "503", "504"} <= set(
            operation["responses"]
        )
        error = operation["responses"]["422"]["content"]["application/json"]["schema"]
        assert error["$ref"].endswith("/ErrorBody")


def test_info(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info["default_variants"] == {"classify": "dsformer", "qa": "dsformer"}
    assert {(m["task"], m["variant"]) for m in info["models"]} == {
        (task, variant) for task in ("classify", "qa") for variant in ("dense", "dsformer")
    }
    assert info["limits"]["max_batch_items"] == 64
    assert info["truncation"] == "error"
    assert info["runtime"]["isa"] in ("scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16")
    assert info["runtime"]["isa_reason"]
    (model,) = [m for m in info["models"] if (m["task"], m["variant"]) == ("classify", "dsformer")]
    assert (model["preset"], model["labels"], model["max_length"]) == ("2.8x", ["NEGATIVE", "POSITIVE"], 128)


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
request_like = st.fixed_dictionaries(
    {"inputs": json_value | st.fixed_dictionaries({"question": json_value, "context": json_value})},
    optional={"parameters": st.dictionaries(st.sampled_from(["top_k", "doc_stride", "variant", "x"]), json_value)},
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/classify", "/qa", "/variants/dense/qa"]), body=json_value | request_like)
def test_no_json_breaks_the_service(client: TestClient, path: str, body: object) -> None:
    response = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code in (200, 400, 404, 422), response.text
    if response.status_code != 200:
        check_error(response, response.status_code, response.json()["error_type"])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=200))
def test_any_text_is_answered_or_refused_with_a_sentence(client: TestClient, text: str) -> None:
    body = json.dumps({"inputs": {"question": "where", "context": text}, "parameters": {"top_k": 5}}).encode()
    response = client.post("/qa", content=body, headers=JSON)
    if response.status_code == 200:
        for answer in response.json():
            assert text[answer["start"] : answer["end"]] == answer["answer"]
    else:
        check_error(response, 422, "validation")
