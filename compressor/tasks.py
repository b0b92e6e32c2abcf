"""The tasks the compressor knows: where their data lies, what their labels are called, how they are scored.

A task is a value. `find_task` looks one up by name; the two open ones, `classify` and `qa`, describe a
user's own files, and `compressor.data.complete_task` fills in their labels from the training file.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classify", "qa"]
ProblemType = Literal["single_label_classification", "regression"]


class UnknownTaskError(ValueError):
    """The name is no task of ours; the message lists those that are."""


@dataclass(frozen=True)
class Hub:
    """One data set of the Hugging Face hub."""

    path: str
    config: str | None = None
    text_columns: tuple[str, ...] = ()
    validation_split: str = "validation"


@dataclass(frozen=True)
class Task:
    """One task.

    text_columns: the one or two text columns of its data files, the first sentence first.
    label_names: by class number; None until they are read from a user's training file; empty for regression
        and for question answering.
    metric_names: the first one is the headline, all of them keys of what `compressor.metrics` returns.
    train_files, validation_files: below the data folder, read one after the other.
    unanswerable: questions may have no answer (SQuAD v2).
    """

    name: str
    kind: Kind
    metric_names: tuple[str, ...]
    text_columns: tuple[str, ...] = ()
    label_names: tuple[str, ...] | None = ()
    problem_type: ProblemType | None = None
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    hub: Hub | None = None
    unanswerable: bool = False

    @property
    def n_labels(self) -> int:
        """Width of the classifier's output: 1 for regression."""
        if self.label_names is None:
            raise ValueError(f"The labels of task {self.name!r} come from a training file that was not read yet.")
        return max(1, len(self.label_names))


def _glue(
    name: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    hub_columns: tuple[str, ...],
    train: tuple[str, ...] = ("train",),
    validation: str = "dev",
    hub_validation: str = "validation",
) -> Task:
    return Task(
        name=name,
        kind="classify",
        metric_names=metrics,
        text_columns=("sentence",) if len(hub_columns) == 1 else ("sentence1", "sentence2"),
        label_names=labels,
        problem_type="single_label_classification" if labels else "regression",
        train_files=tuple(f"{name}/{stem}.tsv.gz" for stem in train),
        validation_files=(f"{name}/{validation}.tsv.gz",),
        hub=Hub("nyu-mll/glue", name, hub_columns, hub_validation),
    )


def _squad(name: str, folder: str, unanswerable: bool) -> Task:
    return Task(
        name=name,
        kind="qa",
        metric_names=("f1", "exact_match"),
        train_files=(f"{folder}/train.json.gz",),
        validation_files=(f"{folder}/dev.json.gz",),
        hub=Hub(f"rajpurkar/{name}"),
        unanswerable=unanswerable,
    )


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("unacceptable", "acceptable"), ("matthews", "accuracy"), ("sentence",)),
        _glue("sst2", ("NEGATIVE", "POSITIVE"), ("accuracy",), ("sentence",)),
        _glue("mrpc", ("not_equivalent", "equivalent"), ("f1", "accuracy"), _PAIR),
        _glue("stsb", (), ("spearman", "pearson"), _PAIR),
        _glue("rte", _ENTAILMENT, ("accuracy",), _PAIR),
        # The second training file is rebuilt from SQuAD, so name both files beside a score trained on it.
        _glue(
            "qnli",
            _ENTAILMENT,
            ("accuracy",),
            ("question", "sentence"),
            train=("train_subset", "train_rebuilt"),
        ),
        _glue(
            "qqp",
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            ("question1", "question2"),
            train=("train_subset",),
        ),
        _glue(
            "mnli",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("premise", "hypothesis"),
            train=("train_subset",),
            validation="dev_matched",
            hub_validation="validation_matched",
        ),
        _squad("squad", "squad_v1.1", unanswerable=False),
        _squad("squad_v2", "squad_v2.0", unanswerable=True),
        Task("classify", "classify", ("accuracy",), label_names=None),
        Task("qa", "qa", ("f1", "exact_match"), unanswerable=True),
    )
}


def find_task(name: str) -> Task:
    """The task of that name; `UnknownTaskError` names all of them otherwise."""
    try:
        return TASKS[name]
    except KeyError:
        raise UnknownTaskError(f"Unknown task {name!r}; the known ones are {', '.join(TASKS)}.") from None
