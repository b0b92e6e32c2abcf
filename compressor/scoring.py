"""Examples to ask a served model, and the scores of what it answered: the compressor's half of `dsformer-bench eval`.

The service's half knows HTTP and this half knows the tasks' files and metrics, so an accuracy through the server and
one by `dsformer-compress evaluate` come from the same code. They talk in lines of JSON, each side one in turn:

    in    task, data, validation_file, rows; labels and problem_type of the served classifier, or null
    out   inputs of all requests, their parameters, labels in the order of scores, what would be right
    in    predictions by variant: scores (labels,) of each text, or the text of each answer
    out   metrics by variant, and which answers are the same as the first variant's

Needs no PyTorch. `{"error": sentence}` ends the conversation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data import ClassifyExample, DataError, Example, QAExample, load_examples
from compressor.metrics import MAX_ANSWER_LENGTH, classify_scores, normalize_answer, pearson, squad_scores
from compressor.tasks import Task, UnknownTaskError, find_task


def served_task(name: str, labels: Sequence[str] | None, problem_type: str | None) -> Task:
    """The task by name, with the served model's labels where it is an open one. Raises DataError where they differ."""
    task = find_task(name)
    if task.kind == "qa":
        return task
    if labels is None:
        raise DataError(f"The service has no model that classifies, which {name} needs.")
    regression = problem_type == "regression"
    if task.label_names is None:
        if regression:
            return replace(task, label_names=(), problem_type="regression", metric_names=("spearman", "pearson"))
        return replace(task, label_names=tuple(labels), problem_type="single_label_classification")
    if (task.problem_type == "regression") != regression or (not regression and {*labels} != {*task.label_names}):
        raise DataError(
            f"The served model's labels are {', '.join(labels)}, but {name} has "
            f"{', '.join(task.label_names) or 'a number'}: serve a model of {name}."
        )
    return task


def opening(task: Task, examples: Sequence[Example]) -> dict[str, Any]:
    """What the other half needs to ask: see the module's docstring."""
    if task.kind == "qa":
        questions = [example for example in examples if isinstance(example, QAExample)]
        return {
            "kind": task.kind,
            "inputs": [{"question": example.question, "context": example.context} for example in questions],
            "wanted": [[text for _, text in example.answers] for example in questions],
            "labels": [],
            "parameters": {"max_answer_len": MAX_ANSWER_LENGTH, "handle_impossible_answer": task.unanswerable},
        }
    rows = [example for example in examples if isinstance(example, ClassifyExample)]
    names = task.label_names or ()
    return {
        "kind": task.kind,
        "inputs": [{"text": row.text, "text_pair": row.text_pair} for row in rows],
        "wanted": [names[int(row.label)] if names else row.label for row in rows],
        "labels": list(names),
        "parameters": {"truncation": "right", "function_to_apply": "default" if names else "none"},
    }


def score(task: Task, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, float]:
    """The task's metrics, in points, of one variant's predictions in the order of the examples."""
    if task.kind == "qa":
        questions = [example for example in examples if isinstance(example, QAExample)]
        texts = {example.id: text for example, text in zip(questions, predictions, strict=True)}
        return squad_scores(texts, questions, task.unanswerable)
    labels = [example.label for example in examples if isinstance(example, ClassifyExample)]
    # Scores stand in for logits: no metric looks at more than their order, or, in a regression, at them.
    return classify_scores(task, np.asarray(predictions, dtype=np.float64), labels)


def same(task: Task, one: Sequence[Any], other: Sequence[Any]) -> list[bool] | None:
    """Which answers are the same: equal labels, or texts equal to SQuAD's metric. None: numbers never are."""
    if task.kind == "qa":
        return [normalize_answer(a) == normalize_answer(b) for a, b in zip(one, other, strict=True)]
    if task.problem_type == "regression":
        return None
    return [bool(equal) for equal in np.argmax(one, axis=1) == np.argmax(other, axis=1)]


def agreement(task: Task, one: Sequence[Any], other: Sequence[Any]) -> float:
    """How far two models answer alike, in points: the share of the same answers, or the correlation of numbers."""
    equal = same(task, one, other)
    if equal is not None:
        return 100 * float(np.mean(equal))
    return pearson(*(np.asarray(numbers, dtype=np.float64).ravel() for numbers in (one, other)))


def closing(task: Task, examples: Sequence[Example], predictions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    first = next(iter(predictions.values()))
    return {
        "metrics": {variant: score(task, examples, own) for variant, own in predictions.items()},
        "same": {variant: same(task, first, own) for variant, own in predictions.items()},
    }


def main() -> None:
    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    try:
        asked = json.loads(sys.stdin.readline())
        task = served_task(asked["task"], asked["labels"], asked["problem_type"])
        folder, own = (Path(asked[name]) if asked[name] else None for name in ("data", "validation_file"))
        examples = load_examples(task, "validation", folder, validation_file=own, rows=asked["rows"])
        say(opening(task, examples))
        line = sys.stdin.readline()
        if line:  # otherwise the other half has ended
            say(closing(task, examples, json.loads(line)))
    except (DataError, UnknownTaskError) as error:
        say({"error": str(error)})


if __name__ == "__main__":
    main()
