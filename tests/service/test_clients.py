"""Clients made for others: Hugging Face's in JavaScript, Text Embeddings Inference, the Open Inference Protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from harness import Served

from service.errors import NotReady

TEXT = "the film is good"


def javascript_client() -> str:
    """The package's entry, or why there is none."""
    if shutil.which("node") is None:
        pytest.skip("there is no node on this computer")
    roots = [os.environ.get("NODE_PATH", ""), str(Path(__file__).parents[2] / "node_modules")]
    for root in filter(None, roots):
        for entry in ("dist/esm/index.js", "dist/index.js"):
            if (path := Path(root) / "@huggingface" / "inference" / entry).is_file():
                return path.as_uri()
    pytest.skip("@huggingface/inference is not installed: `npm install @huggingface/inference`, or set NODE_PATH")


def test_hugging_faces_javascript_client_works_unchanged(models: Path) -> None:
    entry = javascript_client()
    script = Path(__file__).with_name("hugging_face.mjs")
    with Served(models) as service:
        for variant in ("dense", "dsformer"):
            url = f"http://127.0.0.1:{service.port}/variants/{variant}"
            done = subprocess.run(["node", script, entry, url], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert [found["classify"]] == httpx.post(f"{url}/classify", json={"inputs": TEXT}).json()
            question = {"question": "Where does Clara live?", "context": "Clara lives in Berkeley."}
            assert found["qa"] == httpx.post(f"{url}/qa", json={"inputs": question}).json()


def test_predict_answers_as_text_embeddings_inference_does(client: TestClient) -> None:
    (single,) = client.post("/classify", json={"inputs": TEXT}).json()
    pair = client.post("/classify", json={"inputs": {"text": "good", "text_pair": "bad"}}).json()[0]
    for inputs, expected in (
        (TEXT, single),
        ([TEXT], single),
        (["good", "bad"], pair),
        ([[TEXT], ["good", "bad"]], [single, pair]),
        ([[TEXT]], [single]),
    ):
        answer = client.post("/predict", json={"inputs": inputs})
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected
    assert answer.headers["x-compute-tokens"] == "6"
    raw = client.post("/predict", json={"inputs": TEXT, "raw_scores": True}).json()
    logits = client.post("/classify", json={"inputs": TEXT, "parameters": {"function_to_apply": "none"}}).json()
    assert [raw] == logits
    long = "film " * 500
    cut = client.post("/predict", json={"inputs": long, "truncate": True, "truncation_direction": "Left"})
    assert (cut.status_code, cut.headers["x-truncated"]) == (200, "1")
    assert client.post("/predict", json={"inputs": long, "truncate": False}).json()["error_type"] == "too_long"


@pytest.mark.parametrize("inputs", [["a", "b", "c"], [[]], [["a", "b", "c"]], [["a"], "b"], {"text": "a"}, 3, [""], ""])
def test_predict_refuses_with_a_sentence(client: TestClient, inputs: object) -> None:
    refused = client.post("/predict", json={"inputs": inputs})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert refused.json()["error"].endswith((".", ".)"))
    assert client.post("/predict", json={"inputs": []}).status_code == 422


def test_health_and_metadata_by_the_open_inference_protocol(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["name"] == "dsformer"
    model = client.get("/v2/models/tiny-classify-dense").json()
    assert [each["name"] for each in model["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
    assert [each["shape"] for each in client.get("/v2/models/tiny-qa-dense").json()["outputs"]] == [[-1, -1]] * 2
    assert client.get("/v2/models/tiny-qa-dense/ready").json() == {"name": "tiny-qa-dense", "ready": True}
    for path in ("/v2/models/nope", "/v2/models/nope/ready"):
        assert client.get(path).json()["error_type"] == "not_found"

    def refuse() -> None:
        raise NotReady("Not now.")

    monkeypatch.setattr(client.app.state.service.lifecycle, "check_ready", refuse)
    for path in ("/v2/health/ready", "/v2/models/tiny-qa-dense/ready"):
        assert client.get(path).status_code == 503
