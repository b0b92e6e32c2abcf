"""Every kind of head against Transformers, on tiny random models that our compressor exports: the same scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny import make_config, make_tokenizer  # noqa: E402

from compressor.export import export  # noqa: E402

# (labels, problem_type)
HEADS = {
    "single": (3, "single_label_classification"),
    "unsaid": (2, None),
    "multi": (4, "multi_label_classification"),
    "regression": (1, "regression"),
    "one": (1, None),
    "regressions": (3, "regression"),
}
TEXTS = ["the film was very good .", "a bad plot", "story"]
PAIRS = [{"text": "the film was good", "text_pair": "a great movie"}, {"text": "bad", "text_pair": "the actor"}]
FUNCTIONS = ["default", "softmax", "sigmoid", "none"]
TOLERANCE = 2e-5


def entry(task: str) -> dict[str, Any]:
    return {"task": task, "variant": "dense"}


@pytest.fixture(scope="module", params=HEADS)
def head(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_client: Callable[..., TestClient]
) -> Any:
    """The pipeline of Transformers, and a client of the service with the same model."""
    labels, problem = HEADS[request.param]
    torch.manual_seed(3)
    names = {i: f"label {i}" for i in range(labels)}
    model = transformers.BertForSequenceClassification(make_config(num_labels=labels, id2label=names))
    # Larger than at random, so that scores differ from one another.
    model.classifier.weight.data.mul_(20)
    model.config.problem_type = problem
    folder = tmp_path_factory.mktemp("heads") / request.param
    export(model, make_tokenizer(), None, folder, config_entry=entry("classify"), storage="float32")
    oracle = transformers.pipeline("text-classification", model=model.eval(), tokenizer=make_tokenizer(), device="cpu")
    with make_client(folder) as client:
        yield oracle, client


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("inputs", [TEXTS, PAIRS], ids=["texts", "pairs"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_scores_are_those_of_transformers(head: Any, inputs: list[Any], function: str, top_k: int | None) -> None:
    oracle, client = head
    options = {} if function == "default" else {"function_to_apply": function}
    # Like the service, the pipeline gives a list for each input; padding off, one by one.
    expected = [oracle([each], top_k=top_k, **options)[0] for each in inputs]
    found = client.post(
        "/classify", json={"inputs": inputs, "parameters": {"function_to_apply": function, "top_k": top_k}}
    ).json()
    assert [len(each) for each in found] == [len(each) for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [each["label"] for each in ours] == [each["label"] for each in theirs]
        np.testing.assert_allclose(
            [each["score"] for each in ours], [each["score"] for each in theirs], rtol=0, atol=TOLERANCE
        )


def test_the_answer_is_the_best_span_of_the_models_own_logits(
    tmp_path: Path, make_client: Callable[..., TestClient]
) -> None:
    torch.manual_seed(5)
    model = transformers.BertForQuestionAnswering(make_config()).eval()
    model.qa_outputs.weight.data.mul_(20)
    tokenizer = make_tokenizer()
    export(model, tokenizer, None, tmp_path / "qa", config_entry=entry("qa"), storage="float32")
    question, longest = "the film", 4
    contexts = ["the film was very good .", "a bad movie and a great actor", "the plot was awful but the story fine"]
    with make_client(tmp_path / "qa") as client:
        for context in contexts:
            encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
            offsets = encoded.pop("offset_mapping")[0].tolist()
            with torch.no_grad():
                logits = model(**encoded)
            start, end = logits.start_logits[0].numpy(), logits.end_logits[0].numpy()
            inside = [i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence == 1]
            spans = [(i, j) for i in inside for j in inside if i <= j < i + longest]
            i, j = max(spans, key=lambda span: start[span[0]] + end[span[1]])
            body = {
                "inputs": {"question": question, "context": context},
                "parameters": {"max_answer_len": longest},
            }
            found = client.post("/qa", json=body).json()
            assert (found["start"], found["end"]) == (offsets[i][0], offsets[j][1])
            assert 0 <= found["score"] <= 1
