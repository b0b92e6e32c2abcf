"""Scores against known libraries and the rules of the official SQuAD scripts, corner by corner."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from compressor import metrics
from compressor.data import QAExample
from compressor.metrics import classify_scores, decode_qa, normalize_answer, squad_scores
from compressor.tasks import find_task


def question(*golds: str, id: str = "q", impossible: bool = False) -> QAExample:
    return QAExample(id, "?", " ".join(golds), tuple((0, gold) for gold in golds), impossible)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_matthews_and_f1_equal_scikit_learn(n_classes: int) -> None:
    random = np.random.default_rng(n_classes)
    labels = random.integers(n_classes, size=500)
    predictions = np.where(random.random(500) < 0.6, labels, random.integers(n_classes, size=500))
    assert metrics.matthews(predictions, labels) == pytest.approx(100 * matthews_corrcoef(labels, predictions))
    ones = 100 * f1_score(labels == 1, predictions == 1)
    assert metrics.f1(predictions, labels) == pytest.approx(ones)


def test_undefined_scores_are_zero() -> None:
    zeros, mixed = np.zeros(4, int), np.array([0, 1, 0, 1])
    assert metrics.matthews(zeros, mixed) == 0
    assert metrics.f1(zeros, zeros) == 0
    assert metrics.pearson(zeros.astype(float), mixed.astype(float)) == 0
    assert metrics.spearman(zeros.astype(float), mixed.astype(float)) == 0


def test_each_task_gets_its_own_metrics() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    assert classify_scores(find_task("sst2"), logits, [0, 1, 1, 1]) == {"accuracy": 75.0}
    assert set(classify_scores(find_task("mrpc"), logits, [0, 1, 1, 1])) == {"f1", "accuracy"}
    assert set(classify_scores(find_task("cola"), logits, [0, 1, 1, 1])) == {"matthews", "accuracy"}
    # The same order but not on a line: the ranks agree fully, the values do not.
    scores = classify_scores(find_task("stsb"), np.array([[0.1], [0.2], [0.3], [9.0]]), [1.0, 2.0, 3.0, 4.0])
    assert scores["spearman"] == pytest.approx(100)
    assert 0 < scores["pearson"] < 90


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's,\ta\nhat.", "cats hat"),
        ("9 a.m.", "9 am"),  # punctuation goes before articles: "a.m." holds none
        ("the-end", "theend"),
        ("An apple, theory and Athens", "apple theory and athens"),
        ("A", ""),
        ("!?", ""),
        ("“Hi” – 1990–2000", "“hi” – 1990–2000"),  # only ASCII punctuation counts
        ("ÉCOLE", "école"),
        ("a_b", "ab"),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("the Denver Broncos!", ["Denver Broncos", "Broncos"], 100, 100),
        ("Broncos of Denver", ["Denver Broncos", "nothing"], 0, 80),  # two of three against two of two
        ("new york new york", ["New York"], 0, 200 / 3),  # a repeated token counts as often as in the gold
        ("york york", ["york york york"], 0, 80),
        ("Paris", ["Rome"], 0, 0),
        ("U.S.", ["US"], 100, 100),
    ],
)
@pytest.mark.parametrize("unanswerable", [False, True])
def test_squad_scores(prediction: str, golds: list[str], exact: float, f1: float, unanswerable: bool) -> None:
    scores = squad_scores({"q": prediction}, [question(*golds)], unanswerable)
    assert scores["exact_match"] == pytest.approx(exact)
    assert scores["f1"] == pytest.approx(f1)


def test_the_two_versions_differ_on_answers_that_normalize_to_nothing() -> None:
    first = squad_scores({"q": "a"}, [question("the")], unanswerable=False)
    assert (first["exact_match"], first["f1"]) == (100, 0)
    second = squad_scores({"q": "a"}, [question("the")], unanswerable=True)
    assert (second["exact_match"], second["f1"]) == (100, 100)
    # In v2.0 the empty gold does not count beside a real one; in v1.1 it does.
    assert squad_scores({"q": ""}, [question("the", "king")], unanswerable=True)["exact_match"] == 0
    assert squad_scores({"q": ""}, [question("the", "king")], unanswerable=False)["exact_match"] == 100


def test_unanswerable_questions_are_scored_apart() -> None:
    examples = [
        question("king", id="has"),
        question("queen", id="wrong"),
        question(id="none", impossible=True),
        question(id="invented", impossible=True),
    ]
    predictions = {"has": "the king", "wrong": "", "none": "", "invented": "river"}
    assert squad_scores(predictions, examples, unanswerable=True) == {
        "exact_match": 50,
        "f1": 50,
        "has_answer_exact_match": 50,
        "has_answer_f1": 50,
        "no_answer_exact_match": 50,
        "no_answer_f1": 50,
    }


def test_missing_predictions() -> None:
    assert squad_scores({}, [question("king")], unanswerable=False) == {"exact_match": 0, "f1": 0}
    with pytest.raises(ValueError, match="no prediction for question q"):
        squad_scores({}, [question("king")], unanswerable=True)


# --- decoding -----------------------------------------------------------------------------------------------

CONTEXT = "Zoë 🎉 won the cup in Paris"  # words as tokens
WORDS = [(0, 3), (4, 5), (6, 9), (10, 13), (14, 17), (18, 20), (21, 26)]


def window(words: list[tuple[int, int]], example_index: int = 0) -> dict[str, Any]:
    """[CLS] question [SEP] words [SEP]"""
    offsets = np.array([(-1, -1)] * 3 + words + [(-1, -1)], dtype=np.int32)
    return {"example_index": example_index, "offsets": offsets, "input_ids": np.zeros(len(offsets))}


def logits(length: int, **peaks: float) -> np.ndarray:
    values = np.zeros(length, dtype=np.float32)
    for place, value in peaks.items():
        values[int(place[1:])] = value
    return values


def decode(starts: np.ndarray, ends: np.ndarray, **options: Any) -> str:
    example = QAExample("q", "?", CONTEXT)
    return decode_qa([window(WORDS)], [starts], [ends], [example], **options)["q"]


def test_offsets_count_code_points() -> None:
    assert decode(logits(11, _3=5), logits(11, _4=5)) == "Zoë 🎉"


def test_spans_stay_inside_the_context_and_in_order() -> None:
    # The highest logits lie on the question, behind the context, and end before start.
    starts, ends = logits(11, _1=99, _8=6, _5=5), logits(11, _1=99, _10=99, _3=6, _7=5)
    assert decode(starts, ends) == "won the cup"


def test_the_longest_answer_is_limited() -> None:
    starts, ends = logits(11, _3=9), logits(11, _9=9, _5=4)
    assert decode(starts, ends, max_answer_length=7) == CONTEXT
    assert decode(starts, ends, max_answer_length=6) == "Zoë 🎉 won"


def test_the_best_window_of_each_question_answers() -> None:
    features = [window(WORDS[:4]), window(WORDS[3:]), window(WORDS[:1], example_index=1)]
    example = QAExample("q", "?", CONTEXT)
    starts = [logits(8, _3=4), logits(8, _6=5), logits(5, _3=99)]
    ends = [logits(8, _5=4), logits(8, _6=5), logits(5, _3=99)]
    answers = decode_qa(features, starts, ends, [example, replace(example, id="other")])
    assert answers == {"q": "Paris", "other": "Zoë"}


def test_no_answer_needs_every_window_to_say_so() -> None:
    features, example = [window(WORDS[:4]), window(WORDS[3:])], QAExample("q", "?", CONTEXT)
    starts = [logits(8, _0=9, _3=4), logits(8, _0=9, _3=1)]
    ends = [logits(8, _0=9, _4=4), logits(8, _0=9, _3=1)]
    assert decode_qa(features, starts, ends, [example], null_allowed=True)["q"] == ""
    assert decode_qa(features, starts, ends, [example], null_allowed=False)["q"] == "Zoë 🎉"
    starts[1][0] = ends[1][0] = 0  # the second window is sure of nothing: the lower of the two counts
    assert decode_qa(features, starts, ends, [example], null_allowed=True)["q"] == "Zoë 🎉"


def test_padding_behind_a_window_is_never_read() -> None:
    starts, ends = np.append(logits(11, _9=5), [99, 99]), np.append(logits(11, _9=5), [99, 99])
    assert decode(starts, ends) == "Paris"
