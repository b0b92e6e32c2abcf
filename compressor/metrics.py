"""The tasks' own scores, and the step from span logits to answer texts.

Every score is in points, 0 to 100 (correlations -100 to 100). The SQuAD scores follow the rules of the
official evaluation scripts, v1.1 and v2.0, which differ: see `squad_scores`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.data import Feature, QAExample
from compressor.tasks import Task

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# Tokens of the longest answer that is looked at.
MAX_ANSWER_LENGTH = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classify_scores(task: Task, logits: Floats, labels: Sequence[int | float]) -> dict[str, float]:
    """The task's metrics of logits (examples, labels) against the true labels."""
    if task.problem_type == "regression":
        predictions, truth = logits[:, 0], np.asarray(labels, dtype=np.float64)
    else:
        predictions, truth = logits.argmax(axis=1), np.asarray(labels, dtype=np.int64)
    return {name: _METRICS[name](predictions, truth) for name in task.metric_names}


def accuracy(predictions: Ints, labels: Ints) -> float:
    """Share of equal class numbers."""
    return 100 * float(np.mean(predictions == labels))


def matthews(predictions: Ints, labels: Ints) -> float:
    """Matthews correlation of class numbers, for any number of classes; 0 where it is undefined."""
    n_classes = int(max(predictions.max(), labels.max())) + 1
    confusion = np.zeros((n_classes, n_classes))
    np.add.at(confusion, (labels, predictions), 1)
    true, predicted, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = np.trace(confusion) * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return 100 * float(covariance / np.sqrt(variances)) if variances else 0.0


def f1(predictions: Ints, labels: Ints) -> float:
    """F1 of class 1 against the rest, as GLUE takes it for MRPC and QQP; 0 without a single class 1."""
    hits = np.sum((predictions == 1) & (labels == 1))
    total = np.sum(predictions == 1) + np.sum(labels == 1)
    return 100 * float(2 * hits / total) if total else 0.0


def pearson(predictions: Floats, labels: Floats) -> float:
    """Linear correlation; 0 if either side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    from scipy import stats

    return 100 * float(stats.pearsonr(predictions, labels).statistic)


def spearman(predictions: Floats, labels: Floats) -> float:
    """Rank correlation; 0 if either side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    from scipy import stats

    return 100 * float(stats.spearmanr(predictions, labels).statistic)


_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "pearson": pearson,
    "spearman": spearman,
}


# --- SQuAD --------------------------------------------------------------------------------------------------


def squad_scores(predictions: Mapping[str, str], examples: Sequence[QAExample], unanswerable: bool) -> dict[str, float]:
    """`exact_match` and `f1` of answer texts by question id, the best over each question's gold answers.

    SQuAD v1.1 (unanswerable False): a question without prediction scores 0, and two answers that both
    normalize to nothing share no token, so their F1 is 0.
    SQuAD v2.0: the empty text stands for "no answer"; gold answers that normalize to nothing do not count;
    F1 against an empty side is 1 only if both are empty; a question without prediction is an error. Adds
    `has_answer_*` and `no_answer_*`, each over its share of the questions.
    """
    if not examples:
        raise ValueError("There are no questions to score.")
    exact, overlap = [], []
    for example in examples:
        prediction = predictions.get(example.id)
        if prediction is None:
            if unanswerable:
                raise ValueError(f"There is no prediction for question {example.id}.")
            exact.append(0.0)
            overlap.append(0.0)
            continue
        golds = [text for _, text in example.answers]
        if unanswerable:
            golds = [text for text in golds if normalize_answer(text)] or [""]
        exact.append(max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in golds))
        overlap.append(max(_answer_f1(prediction, gold, unanswerable) for gold in golds))
    scores = {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}
    if unanswerable:
        answered = np.array([bool(example.answers) for example in examples])
        for prefix, chosen in (("has_answer", answered), ("no_answer", ~answered)):
            if chosen.any():
                scores[f"{prefix}_exact_match"] = 100 * float(np.mean(np.array(exact)[chosen]))
                scores[f"{prefix}_f1"] = 100 * float(np.mean(np.array(overlap)[chosen]))
    return scores


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without English articles, single spaces."""
    # The order matters: "a.m." becomes "am", not "m", and "the-end" becomes "theend".
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def _answer_f1(prediction: str, gold: str, empty_can_match: bool) -> float:
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if empty_can_match and not (predicted and wanted):
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def decode_qa(
    features: Sequence[Feature],
    start_logits: Sequence[Floats],
    end_logits: Sequence[Floats],
    examples: Sequence[QAExample],
    n_best: int = 20,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    null_allowed: bool = False,
) -> dict[str, str]:
    """The answer text of every example by question id: the span of the highest start + end logit.

    features: evaluation windows; start_logits, end_logits: one array (tokens,) a window, in the same order,
    padding at its end allowed. Spans combine the n_best starts and ends inside the context of one window and
    have at most max_answer_length tokens. null_allowed: the answer is "" if the lowest first-token score of
    an example's windows exceeds its best span; otherwise "" only stands for "no window held any context".
    """
    best = dict.fromkeys(range(len(examples)), (-np.inf, ""))
    null = dict.fromkeys(range(len(examples)), np.inf)
    for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
        index, offsets = feature["example_index"], feature["offsets"]
        null[index] = min(null[index], float(starts[0] + ends[0]))
        score, first, last = _best_span(starts, ends, offsets, n_best, max_answer_length)
        if score > best[index][0]:
            text = examples[index].context[offsets[first, 0] : offsets[last, 1]]
            best[index] = (score, text)
    return {
        example.id: "" if null_allowed and null[index] > best[index][0] else best[index][1]
        for index, example in enumerate(examples)
    }


def _best_span(
    starts: Floats, ends: Floats, offsets: Ints, n_best: int, max_answer_length: int
) -> tuple[float, int, int]:
    """(score, first token, last token), score -inf if the window has no span."""
    context = np.flatnonzero(offsets[:, 0] >= 0)
    if not context.size:
        return -np.inf, 0, 0
    firsts = context[np.argsort(-starts[context], kind="stable")[:n_best]]
    lasts = context[np.argsort(-ends[context], kind="stable")[:n_best]]
    length = lasts[None, :] - firsts[:, None] + 1  # (n_best, n_best)
    scores = starts[firsts].astype(np.float64)[:, None] + ends[lasts][None, :]
    scores[(length < 1) | (length > max_answer_length)] = -np.inf
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[row, column]), int(firsts[row]), int(lasts[column])
