"""Classification against the tokenizers library and ONNX Runtime used directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer as HfTokenizer

from service.artifact import Config
from service.classify import function_of, scores

VARIANTS = ("dense", "dsformer")
TEXTS = ["the film is good", "bad", "Clara lives in Berkeley, where the film is bad.", "東京 🎬"]


@pytest.fixture(scope="module")
def reference(models: Path) -> Callable[..., np.ndarray]:
    """Logits of one input, by the dense model, with the library's own truncation."""
    folder = models / "tiny-classify-dense"
    tokenizer = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def logits(text: str, pair: str | None = None, direction: str = "right") -> np.ndarray:
        tokenizer.enable_truncation(128, direction=direction)
        e = tokenizer.encode(text, pair)
        names = ("input_ids", "attention_mask", "token_type_ids")
        feed = {
            n: np.array([v], dtype=np.int64) for n, v in zip(names, (e.ids, e.attention_mask, e.type_ids), strict=True)
        }
        return session.run(None, feed)[0][0].astype(np.float64)

    return logits


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def by_label(answer: list[dict[str, object]]) -> list[float]:
    table = {item["label"]: item["score"] for item in answer}
    return [table["NEGATIVE"], table["POSITIVE"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_many_lengths(client: TestClient, reference: Callable[..., np.ndarray], variant: str) -> None:
    response = client.post(f"/variants/{variant}/classify", json={"inputs": TEXTS * 5})
    assert response.status_code == 200
    assert response.headers["x-model-variant"] == variant
    assert len(response.json()) == len(TEXTS) * 5
    for text, answer in zip(TEXTS * 5, response.json(), strict=True):
        # float32 sums in another order; the variants hold the same matrix.
        np.testing.assert_allclose(by_label(answer), softmax(reference(text)), atol=1e-5)
        assert answer[0]["score"] >= answer[1]["score"]


@pytest.mark.parametrize(
    "inputs", ["the film is good", ["the film is good"], {"text": "the film is good"}, [{"text": "the film is good"}]]
)
def test_one_input_in_any_form_gives_a_nested_list(client: TestClient, inputs: object) -> None:
    body = client.post("/classify", json={"inputs": inputs}).json()
    assert len(body) == 1
    assert [set(item) for item in body[0]] == [{"label", "score"}] * 2
    assert body == client.post("/classify", json={"inputs": "the film is good"}).json()


def test_pairs_and_texts_in_one_batch(client: TestClient, reference: Callable[..., np.ndarray]) -> None:
    inputs = [{"text": "the film", "text_pair": "is good"}, "bad", {"text": "where", "text_pair": "in berkeley"}]
    answers = client.post("/classify", json={"inputs": inputs}).json()
    expected = [reference("the film", "is good"), reference("bad"), reference("where", "in berkeley")]
    np.testing.assert_allclose([by_label(a) for a in answers], [softmax(x) for x in expected], atol=1e-5)


def test_top_k(client: TestClient) -> None:
    (answer,) = client.post("/classify", json={"inputs": "bad", "parameters": {"top_k": 1}}).json()
    (whole,) = client.post("/classify", json={"inputs": "bad"}).json()
    assert answer == whole[:1]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_function_to_apply(client: TestClient, reference: Callable[..., np.ndarray], function: str) -> None:
    request = {"inputs": "bad", "parameters": {"function_to_apply": function, "variant": "dense"}}
    (answer,) = client.post("/classify", json=request).json()
    logits = reference("bad")
    expected = {"softmax": softmax(logits), "sigmoid": 1 / (1 + np.exp(-logits)), "none": logits}[function]
    np.testing.assert_allclose(by_label(answer), expected, atol=1e-5)


LONG = "the film is good " * 40 + "bad"
LONG_PAIR = {"text": "the film is good " * 5, "text_pair": "clara lives in berkeley " * 40}


def test_a_long_text_is_refused_unless_told_otherwise(client: TestClient) -> None:
    response = client.post("/classify", json={"inputs": ["bad", LONG]})
    assert response.status_code == 422
    assert response.json()["error_type"] == "too_long"
    assert "inputs[1] has 163 tokens and the model takes 128" in response.json()["error"]


@pytest.mark.parametrize("direction", ["right", "left"])
def test_truncation_is_the_librarys_and_is_reported(
    client: TestClient, reference: Callable[..., np.ndarray], direction: str
) -> None:
    request = {"inputs": [LONG, "bad", LONG_PAIR], "parameters": {"truncation": direction}}
    response = client.post("/classify", json=request)
    assert response.headers["x-truncated"] == "2"
    expected = [
        reference(LONG, direction=direction),
        reference("bad"),
        reference(*LONG_PAIR.values(), direction=direction),
    ]
    np.testing.assert_allclose([by_label(a) for a in response.json()], [softmax(x) for x in expected], atol=1e-5)


def test_the_servers_truncation_is_the_default(models: Path, make_client: Callable[..., TestClient]) -> None:
    with make_client(models, truncation="right") as client:
        assert client.get("/info").json()["truncation"] == "right"
        response = client.post("/classify", json={"inputs": LONG})
        assert (response.status_code, response.headers["x-truncated"]) == (200, "1")


@pytest.mark.parametrize(
    ("problem_type", "labels", "function"),
    [
        ("single_label_classification", 2, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "none"),
        (None, 3, "softmax"),
        (None, 1, "sigmoid"),
    ],
)
def test_the_default_function_follows_the_model(problem_type: str | None, labels: int, function: str) -> None:
    section = {"task": "classify", "variant": "dense", "sha256": "0" * 64}
    config = Config.model_validate(
        {
            "dsformer": section,
            "max_position_embeddings": 512,
            "problem_type": problem_type,
            "id2label": {str(i): str(i) for i in range(labels)},
        }
    )
    assert function_of(config) == function


def test_a_regression_model_gives_its_raw_value(
    tmp_path: Path, write_folder: Callable[..., Path], make_client: Callable[..., TestClient]
) -> None:
    write_folder(tmp_path / "stsb", "classify", "dense", labels=("LABEL_0",), problem_type="regression")
    with make_client(tmp_path) as client:
        ((raw,),) = client.post("/classify", json={"inputs": {"text": "good", "text_pair": "bad"}}).json()
        request = {"inputs": {"text": "good", "text_pair": "bad"}, "parameters": {"function_to_apply": "none"}}
        assert ((raw,),) == tuple(map(tuple, client.post("/classify", json=request).json()))
        (default,) = client.get("/info").json()["models"]
        assert default["function_to_apply"] == "none"


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_extreme_logits_do_not_overflow(function: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        values = scores(np.array([-3e38, 0, 3e38], dtype=np.float32), function)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[[0, 2]], [0, 1])
