"""Question answering: the decoder against brute force, windows and offsets against the tokenizers library."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from service.qa import EMPTY, best_spans, position, with_marks

VARIANTS = ("dense", "dsformer")
MAX_LENGTH = 128
Candidate = tuple[int, int, float]


def brute_force(
    windows: list[tuple[int, list[float], list[float]]],
    max_answer_len: int,
    null: tuple[float, float] | None,
) -> dict[tuple[int, int], float]:
    """Score of every span, straight from the definition: two softmaxes over all windows, best copy of a span."""
    starts = [x for _, s, _ in windows for x in s] + ([null[0]] if null else [])
    ends = [x for _, _, e in windows for x in e] + ([null[1]] if null else [])
    total_start, total_end = sum(map(math.exp, starts)), sum(map(math.exp, ends))
    found: dict[tuple[int, int], float] = {}
    for first, s, e in windows:
        for i in range(len(s)):
            for j in range(i, min(len(s), i + max_answer_len)):
                score = math.exp(s[i]) / total_start * math.exp(e[j]) / total_end
                span = (first + i, first + j)
                found[span] = max(score, found.get(span, 0.0))
    if null:
        found[EMPTY, EMPTY] = math.exp(null[0]) / total_start * math.exp(null[1]) / total_end
    return found


logit = st.floats(-15, 15, width=32)


@st.composite
def decodings(draw: st.DrawFn) -> tuple[list[tuple[int, list[float], list[float]]], int, int, Any]:
    context, size = draw(st.integers(1, 40)), draw(st.integers(1, 16))
    stride = draw(st.integers(0, size - 1))
    windows = []
    for first in range(0, max(1, context - stride), size - stride):
        n = min(size, context - first)
        windows.append(
            (first, draw(st.lists(logit, min_size=n, max_size=n)), draw(st.lists(logit, min_size=n, max_size=n)))
        )
    null = draw(st.none() | st.tuples(logit, logit))
    return windows, draw(st.integers(1, 20)), draw(st.integers(1, 12)), null


@settings(deadline=None, max_examples=200)
@given(decodings())
def test_decoder_equals_brute_force(case: tuple[Any, int, int, Any]) -> None:
    windows, max_answer_len, top_k, null = case
    expected = brute_force(windows, max_answer_len, null)
    spans = best_spans(
        [(first, np.array(s, dtype=np.float32)) for first, s, _ in windows],
        [np.array(e, dtype=np.float32) for _, _, e in windows],
        max_answer_len,
        top_k,
        null,
    )
    assert len(spans) == min(top_k, len(expected))
    assert len({(span.first, span.last) for span in spans}) == len(spans)
    best = sorted(expected.values(), reverse=True)[: len(spans)]
    np.testing.assert_allclose([span.score for span in spans], best, rtol=1e-9)
    for span in spans:  # the score belongs to that very span, whichever of equal ones was taken
        assert span.score == pytest.approx(expected[span.first, span.last], rel=1e-9)
        assert 0 <= span.score <= 1
    assert sum(span.score for span in spans) <= 1 + 1e-9


def test_huge_logits_do_not_overflow() -> None:
    big = np.array([3e38, -3e38], dtype=np.float32)
    with np.errstate(over="raise", invalid="raise"):
        (span,) = best_spans([(0, big)], [big], 2, 1)
    assert (span.first, span.last, span.score) == (0, 0, 1.0)


CONTEXTS = {
    "short": "Clara lives in Berkeley.",
    "emoji": "The film 🎬 is good. 🦄 Clara 👩‍👩‍👧 lives in Berkeley 🎬🎬. " * 3,
    "combining": "Cla\u0301ra li\u0308ves in Be\u0301rkeley\u0301. " * 3,
    "cjk": "東京は日本の首都です。" * 5,
    "long": "Clara lives in Berkeley where the film 🎬 is good. 東京は日本の首都です。 zoé\u0301 " * 60,
}
QUESTION = "Where does Clara live?"


@pytest.fixture(scope="module")
def reference(models: Path) -> Callable[..., list[Candidate]]:
    """All spans with scores, best first, with windows cut by the tokenizers library itself."""
    folder = models / "tiny-qa-dense"
    tokenizer = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def spans(
        question: str, context: str, stride: int, max_answer_len: int = 15, null: bool = False
    ) -> list[Candidate]:
        tokenizer.enable_truncation(MAX_LENGTH, stride=stride, strategy="only_second")
        first = tokenizer.encode(question, context)
        windows, offsets, nulls = [], [], []
        for e in [first, *first.overflowing]:
            names = ("input_ids", "attention_mask", "token_type_ids")
            values = (e.ids, e.attention_mask, e.type_ids)
            feed = {n: np.array([v], dtype=np.int64) for n, v in zip(names, values, strict=True)}
            start, end = (x[0] for x in session.run(["start_logits", "end_logits"], feed))
            inside = [t for t, s in enumerate(e.sequence_ids) if s == 1]
            at = len(offsets) - stride if offsets else 0
            offsets += [e.offsets[t] for t in inside][stride if offsets else 0 :]
            windows.append((at, [float(start[t]) for t in inside], [float(end[t]) for t in inside]))
            nulls.append((float(start[0]), float(end[0])))
        found = brute_force(windows, max_answer_len, min(nulls, key=sum) if null else None)
        return sorted(
            ((0, 0, s) if i == EMPTY else (offsets[i][0], offsets[j][1], s) for (i, j), s in found.items()),
            key=lambda c: -c[2],
        )

    return spans


def ask(client: TestClient, variant: str, context: str, **parameters: object) -> Any:
    body = {"inputs": {"question": QUESTION, "context": context}, "parameters": parameters}
    response = client.post(f"/variants/{variant}/qa", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("stride", [0, 16, 60])
def test_answers_equal_the_reference(
    client: TestClient, reference: Callable[..., list[Candidate]], variant: str, name: str, stride: int
) -> None:
    context = CONTEXTS[name]
    expected = reference(QUESTION, context, stride)
    answers = ask(client, variant, context, top_k=5, doc_stride=stride)
    np.testing.assert_allclose([a["score"] for a in answers], [s for _, _, s in expected[:5]], rtol=1e-3)
    start, end, _ = expected[0]
    assert answers[0]["start"] == start
    assert answers[0]["end"] == with_marks(context, end)
    for answer in answers:
        assert context[answer["start"] : answer["end"]] == answer["answer"]


def test_the_long_context_needs_many_windows(client: TestClient) -> None:
    before = windows_seen(client)
    ask(client, "dense", CONTEXTS["long"])
    assert windows_seen(client) - before > 10


def windows_seen(client: TestClient) -> float:
    (line,) = [x for x in client.get("/metrics").text.splitlines() if x.startswith("dsformer_qa_windows_sum")]
    return float(line.split()[-1])


@pytest.mark.parametrize("name", CONTEXTS)
def test_offsets_in_every_unit(client: TestClient, name: str) -> None:
    context = CONTEXTS[name]
    for answer in ask(client, "dense", context, top_k=20, offset_encoding="utf16"):
        units = context.encode("utf-16-le")[2 * answer["start"] : 2 * answer["end"]]
        assert units.decode("utf-16-le") == answer["answer"]
    for answer in ask(client, "dense", context, top_k=20, offset_encoding="byte"):
        assert context.encode()[answer["start"] : answer["end"]].decode() == answer["answer"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30), st.data())
def test_positions_in_other_units(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    assert text.encode("utf-16-le")[: 2 * position(text, at, "utf16")].decode("utf-16-le") == text[:at]
    assert text.encode()[: position(text, at, "byte")].decode() == text[:at]
    assert position(text, at, "codepoint") == at


def test_an_answer_keeps_the_accent_of_its_last_letter(client: TestClient) -> None:
    context = "Be\u0301rkeley\u0301\u0323 is good"
    answers = ask(client, "dense", context, top_k=50, max_answer_len=8)
    ends = {a["end"] for a in answers}
    assert len("Be\u0301rkeley\u0301\u0323") in ends
    assert not ends & {len("Be"), len("Be\u0301rkeley"), len("Be\u0301rkeley\u0301")}


@pytest.mark.parametrize("name", ["short", "long"])
def test_the_empty_answer(client: TestClient, reference: Callable[..., list[Candidate]], name: str) -> None:
    context = CONTEXTS[name]
    expected = reference(QUESTION, context, 16, null=True)
    answers = ask(client, "dense", context, top_k=100, doc_stride=16, handle_impossible_answer=True)
    np.testing.assert_allclose([a["score"] for a in answers], [s for _, _, s in expected[:100]], rtol=1e-3)
    score = next(s for start, end, s in expected if start == end == 0)
    empty = [a for a in answers if a["answer"] == ""]
    if score > expected[99:100][0][2] if len(expected) > 99 else True:
        assert [(a["start"], a["end"]) for a in empty] == [(0, 0)]
        assert empty[0]["score"] == pytest.approx(score, rel=1e-3)
    without = ask(client, "dense", context, top_k=100, doc_stride=16)
    assert all(a["answer"] for a in without)


def test_max_answer_len(client: TestClient, reference: Callable[..., list[Candidate]]) -> None:
    for length in (1, 3):
        (answer,) = ask(client, "dense", CONTEXTS["short"], top_k=1, max_answer_len=length)
        start, end, score = reference(QUESTION, CONTEXTS["short"], 16, max_answer_len=length)[0]
        assert (answer["start"], answer["end"]) == (start, end)
        assert answer["score"] == pytest.approx(score, rel=1e-3)


def test_shapes_of_the_answer(client: TestClient) -> None:
    one = {"question": QUESTION, "context": CONTEXTS["short"]}

    def post(inputs: object, **parameters: object) -> Any:
        return client.post("/qa", json={"inputs": inputs, "parameters": parameters}).json()

    single = post(one)
    assert set(single) == {"answer", "score", "start", "end"}
    assert post(one, top_k=1) == [single]
    assert post([one]) == [single]
    assert post([one, one], top_k=2) == [post(one, top_k=2)] * 2
    assert len(post(one, top_k=3)) == 3


def test_a_batch_gives_each_question_its_own_answer(client: TestClient) -> None:
    inputs = [{"question": QUESTION, "context": context} for context in CONTEXTS.values()]
    together = client.post("/qa", json={"inputs": inputs}).json()
    alone = [client.post("/qa", json={"inputs": one}).json() for one in inputs]
    assert [(a["start"], a["end"]) for a in together] == [(a["start"], a["end"]) for a in alone]
    np.testing.assert_allclose([a["score"] for a in together], [a["score"] for a in alone], rtol=1e-3)


def test_a_long_question_is_cut_and_that_is_reported(client: TestClient) -> None:
    body = {"inputs": {"question": "who lives in berkeley " * 30, "context": CONTEXTS["short"]}}
    response = client.post("/qa", json=body)
    assert (response.status_code, response.headers["x-truncated"]) == (200, "1")
    cut = {"inputs": {"question": "who lives in berkeley " * 16, "context": CONTEXTS["short"]}}
    assert client.post("/qa", json=cut).headers["x-truncated"] == "0"
    assert client.post("/qa", json=cut).json() == response.json()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"doc_stride": 127}, "parameters.doc_stride"),
        ({"max_seq_len": 8}, "no room for the context"),
    ],
)
def test_parameters_that_leave_no_window(client: TestClient, parameters: dict[str, int], words: str) -> None:
    body = {"inputs": {"question": QUESTION, "context": CONTEXTS["long"]}, "parameters": parameters}
    response = client.post("/qa", json=body)
    assert response.status_code == 422
    assert words in response.json()["error"]


def test_too_many_windows_are_refused(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models, max_windows=4) as client:
        body = {"inputs": [{"question": QUESTION, "context": "the film is good " * 60}] * 2}
        response = client.post("/qa", json=body)
        assert (response.status_code, response.json()["error_type"]) == (422, "too_long")
        assert "inputs[1].context" in response.json()["error"]
        assert client.post("/qa", json={"inputs": body["inputs"][0]}).status_code == 200
