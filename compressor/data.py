"""Examples from files or the hub, features from examples, batches from features.

Files are TSV, CSV, JSON Lines (see `compressor.tables`) or SQuAD JSON. Whatever is wrong with one becomes a
`DataError`: a sentence with file and line, or file and question.

Features hold one window each, unpadded; `collate` pads a batch to its own longest window, and
`length_bucketed_batches` keeps windows of like length together so that little of it is padding.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from compressor.config import QA_LENGTH, QA_STRIDE
from compressor.tables import DataError as DataError  # what load_examples raises
from compressor.tables import Row, read_json, read_rows
from compressor.tasks import Task

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
# A Hugging Face fast tokenizer; transformers ships no usable types for it.
Tokenizer: TypeAlias = Any
# One window: input_ids and perhaps token_type_ids (int32 arrays), plus its target or its place in the text.
Feature: TypeAlias = dict[str, Any]

TEXT_COLUMNS = ("text", "sentence", "sentence1")
PAIR_COLUMNS = ("text_pair", "sentence2")
LABEL_COLUMN = "label"

# Tokenizing everything in one call would hold every window as Python integers at once: gigabytes for SQuAD.
_CHUNK = 1024
# Windows of this many batches are sorted by length: wide enough to leave 5 % padding (SST-2, SQuAD;
# batches of 32), narrow enough to mix.
_BUCKET_BATCHES = 50


@dataclass(frozen=True)
class ClassifyExample:
    """label: class number, or the score itself for regression."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class QAExample:
    """answers: (start, text) pairs, start counted in code points of context; none if it is impossible."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[int, str], ...] = field(default=())
    is_impossible: bool = False


Example: TypeAlias = ClassifyExample | QAExample


# --- from the outside to examples ---------------------------------------------------------------------------


def load_examples(
    task: Task,
    split: Split,
    data_dir: Path | None = None,
    train_file: Path | None = None,
    validation_file: Path | None = None,
    rows: int | None = None,
    keep_inferred: bool = False,
) -> list[Example]:
    """The examples of one split, in file order.

    Sources, the first one given: the user's own file for this split, the task's files below data_dir, the
    hub. rows keeps only the first so many. Questions whose answer's place was inferred rather than annotated
    ("start_inferred") are dropped and counted in the log unless keep_inferred is set.
    """
    own_file = train_file if split == "train" else validation_file
    files = [own_file] if own_file else data_files(task, split, data_dir) if data_dir else []
    examples: list[Example] = []
    if task.kind == "qa":
        documents = [(str(file), read_json(file)) for file in files] or [_hub_squad(task, split)]
        for name, document in documents:
            examples += _qa_examples(document, name, keep_inferred or split == "validation")
    else:
        sources = [read_rows(file) for file in files] or [_hub_rows(task, split)]
        for source in sources:
            examples += (_classify_example(task, *row) for row in source)
    if not examples:
        where = ", ".join(map(str, files)) or f"the {split} split of {task.name} on the hub"
        raise DataError(f"There is no usable example in {where}.")
    return examples[:rows]


def data_files(task: Task, split: Split, data_dir: Path) -> list[Path]:
    """The task's files below data_dir, each as .gz or unpacked."""
    names = task.train_files if split == "train" else task.validation_files
    if not names:
        raise DataError(f"Task {task.name!r} has no files of its own: give --train-file and --validation-file.")
    files = []
    for name in names:
        candidates = [data_dir / name, data_dir / name.removesuffix(".gz")]
        found = next((file for file in candidates if file.exists()), None)
        if found is None:
            raise DataError(f"Task {task.name!r} needs {candidates[0]}, which does not exist.")
        files.append(found)
    return files


def complete_task(task: Task, train_file: Path | None) -> Task:
    """The task with its labels known: those of an open task are read from the user's training file.

    Labels that are all numbers, one of them not whole, make it a regression, scored by correlation;
    otherwise they are class names, sorted (numerically if they all are numbers).
    """
    if task.label_names is not None:
        return task
    if train_file is None:
        raise DataError(f"Task {task.name!r} takes its labels from your own data: give --train-file.")
    labels = {_label_text(where, row) for where, row in read_rows(train_file)}
    numbers = {label: number for label in labels if (number := _as_number(label)) is not None}
    all_numbers = len(numbers) == len(labels)
    if all_numbers and not all(number.is_integer() for number in numbers.values()):
        return replace(task, label_names=(), problem_type="regression", metric_names=("spearman", "pearson"))
    names = tuple(sorted(labels, key=lambda label: numbers[label]) if all_numbers else sorted(labels))
    if len(names) < 2:
        raise DataError(f"{train_file} has only the label {', '.join(names)}: training needs at least two.")
    return replace(task, label_names=names, problem_type="single_label_classification")


def _classify_example(task: Task, where: str, row: Mapping[str, Any]) -> ClassifyExample:
    if task.text_columns and all(column in row for column in task.text_columns):
        first, *pair = task.text_columns
    else:
        first = _first_present(where, row, TEXT_COLUMNS)
        pair = [column for column in PAIR_COLUMNS if column in row]
    text_pair = _text(where, row, pair[0]) if pair else None
    return ClassifyExample(_text(where, row, first), text_pair, _label(task, where, row))


def _first_present(where: str, row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(f"{where}: no column {' or '.join(names)}; there are {', '.join(row)}.")


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{where}: {column} is {text!r}, not a text.")
    return _checked_text(where, column, text)


def _checked_text(where: str, name: str, text: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: {name} is empty.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} holds half a surrogate pair at character {error.start}.") from None
    return text


def _label_text(where: str, row: Mapping[str, Any]) -> str:
    label = row.get(LABEL_COLUMN)
    if label is None:
        raise DataError(f"{where}: no column {LABEL_COLUMN}; there are {', '.join(row)}.")
    if not isinstance(label, str | int | float):
        raise DataError(f"{where}: the label is {label!r}, neither a text nor a number.")
    text = str(label).strip()
    if not text:
        raise DataError(f"{where}: the label is empty.")
    return text


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _label(task: Task, where: str, row: Mapping[str, Any]) -> int | float:
    text = _label_text(where, row)
    if task.label_names is None:
        raise ValueError(f"The labels of task {task.name!r} are not known yet: call complete_task first.")
    if task.problem_type == "regression":
        number = _as_number(text)
        if number is None:
            raise DataError(f"{where}: the label is {text!r}, but {task.name} needs a number.")
        return number
    if text in task.label_names:
        return task.label_names.index(text)
    if text.isdecimal() and int(text) < len(task.label_names):
        return int(text)
    advice = "" if task.train_files == () else " To train on labels of your own, use --task classify."
    raise DataError(f"{where}: the label {text!r} is none of {task.name}'s: {', '.join(task.label_names)}.{advice}")


def _qa_examples(document: Any, where: str, keep_inferred: bool) -> list[QAExample]:
    examples: list[QAExample] = []
    n_inferred = 0
    for question_where, context, qa in _squad_questions(document, where):
        answers = qa.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise DataError(f"{question_where}: answers is not a list of objects.")
        if not keep_inferred and any(answer.get("start_inferred") for answer in answers):
            n_inferred += 1
            continue
        examples.append(_qa_example(question_where, context, qa, answers))
    if n_inferred:
        logger.info("%s: left out %d questions whose answer's place is inferred", where, n_inferred)
    return examples


def _squad_questions(document: Any, where: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, context, question object) of every question of a SQuAD document."""
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise DataError(f'{where}: not in SQuAD layout, there is no list "data" at the top.')
    for article_number, article in enumerate(document["data"]):
        for paragraph_number, paragraph in enumerate(_objects(article, "paragraphs", where)):
            place = f"{where}, article {article_number}, paragraph {paragraph_number}"
            context = paragraph.get("context")
            if not isinstance(context, str):
                raise DataError(f"{place}: context is missing or not a text.")
            _checked_text(place, "context", context)
            for qa in _objects(paragraph, "qas", place):
                yield f"{where}, question {qa.get('id', '(without id)')}", context, qa


def _objects(parent: Any, name: str, where: str) -> list[dict[str, Any]]:
    children = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
        raise DataError(f"{where}: {name} is missing or not a list of objects.")
    return children


def _qa_example(where: str, context: str, qa: dict[str, Any], answers: list[dict[str, Any]]) -> QAExample:
    if not isinstance(qa.get("id"), str):
        raise DataError(f"{where}: the id is missing or not a text.")
    if not isinstance(qa.get("question"), str):
        raise DataError(f"{where}: question is missing or not a text.")
    question = _checked_text(where, "question", qa["question"])
    is_impossible = bool(qa.get("is_impossible", False))
    if bool(answers) == is_impossible:
        raise DataError(
            f"{where}: {'answers given, though it is' if answers else 'no answers, though it is not'}"
            " marked is_impossible."
        )
    pairs: list[tuple[int, str]] = []
    for answer in answers:
        start, text = answer.get("answer_start"), answer.get("text")
        if not isinstance(start, int) or not isinstance(text, str) or not text:
            raise DataError(f"{where}: an answer needs a text and a whole number answer_start.")
        if start < 0 or context[start : start + len(text)] != text:
            raise DataError(f"{where}: the answer {text!r} does not stand at its answer_start {start}.")
        pairs.append((start, text))
    return QAExample(qa["id"], question, context, tuple(pairs), is_impossible)


# --- the hub ------------------------------------------------------------------------------------------------


def _hub_split(task: Task, split: Split) -> tuple[str, Any]:
    """(name for messages, data set) of a task's split on the hub."""
    if task.hub is None:
        raise DataError(f"Task {task.name!r} is not on the hub: give --train-file and --validation-file.")
    # Imported here: only this path needs the package and the network.
    from datasets import load_dataset

    split_name = "train" if split == "train" else task.hub.validation_split
    where = f"{task.hub.path} ({task.hub.config or 'default'}), {split_name}"
    try:
        return where, load_dataset(task.hub.path, task.hub.config, split=split_name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where}: cannot be had from the hub ({error}); give --data with the files instead."
        ) from error


def _hub_rows(task: Task, split: Split) -> Iterator[Row]:
    where, rows = _hub_split(task, split)
    assert task.hub is not None
    for number, row in enumerate(rows):
        texts = zip(task.text_columns, task.hub.text_columns, strict=True)
        fields = {own: row[theirs].strip() for own, theirs in texts}
        yield f"{where}, row {number}", {**fields, LABEL_COLUMN: row["label"]}


def _hub_squad(task: Task, split: Split) -> tuple[str, Any]:
    """The hub's flat rows in SQuAD layout, so that one reader checks both."""
    where, rows = _hub_split(task, split)
    paragraphs = []
    for row in rows:
        found = zip(row["answers"]["answer_start"], row["answers"]["text"], strict=True)
        answers = [{"answer_start": start, "text": text} for start, text in found]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        qa["is_impossible"] = task.unanswerable and not answers
        paragraphs.append({"context": row["context"], "qas": [qa]})
    return where, {"data": [{"paragraphs": paragraphs}]}


# --- features -----------------------------------------------------------------------------------------------


def classify_features(examples: Sequence[ClassifyExample], tokenizer: Tokenizer, max_length: int) -> list[Feature]:
    """One window an example, cut to max_length tokens, with its `label`."""
    paired = any(example.text_pair is not None for example in examples)
    features: list[Feature] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer(
            [example.text for example in chunk],
            [example.text_pair or "" for example in chunk] if paired else None,
            truncation=True,
            max_length=max_length,
        )
        for row, example in enumerate(chunk):
            features.append({**_inputs(encoded, row, tokenizer), "label": example.label})
    return features


def qa_features(
    examples: Sequence[QAExample],
    tokenizer: Tokenizer,
    max_length: int = QA_LENGTH,
    doc_stride: int = QA_STRIDE,
    *,
    training: bool,
    max_question_length: int = 64,
    unanswerable: bool = False,
) -> list[Feature]:
    """Windows of at most max_length tokens over each context, two neighbours sharing doc_stride tokens.

    Training: `start_position` and `end_position`, the token positions of the first answer. A window without
    the whole answer is left out, or, if questions may be unanswerable, kept with both at 0 (the first token).
    Evaluation: `example_index` and `offsets`, an int32 array (tokens, 2) of each token's characters in the
    context, -1 outside of it.
    """
    overhead = max_question_length + tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= overhead + doc_stride:
        raise ValueError(
            f"max_length {max_length} leaves no room: question and special tokens may take {overhead} tokens "
            f"and the windows share {doc_stride}, so it must exceed {overhead + doc_stride}."
        )
    features: list[Feature] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer(
            _cut_questions(chunk, tokenizer, max_question_length),
            [example.context for example in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for row, chunk_index in enumerate(encoded["overflow_to_sample_mapping"]):
            offsets = np.asarray(encoded["offset_mapping"][row], dtype=np.int32)  # (tokens, 2)
            in_context = np.array([sequence == 1 for sequence in encoded.sequence_ids(row)])
            offsets[~in_context] = -1
            feature = _inputs(encoded, row, tokenizer)
            if not training:
                features.append({**feature, "example_index": start + chunk_index, "offsets": offsets})
                continue
            span = _answer_tokens(chunk[chunk_index], offsets)
            if span is None and not unanswerable:
                continue
            first, last = span or (0, 0)
            features.append({**feature, "start_position": first, "end_position": last})
    return features


def _inputs(encoded: Any, row: int, tokenizer: Tokenizer) -> Feature:
    # Arrays, not lists: a list of Python integers takes nine times the memory.
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    return {name: np.asarray(encoded[name][row], dtype=np.int32) for name in names}


def _cut_questions(examples: Sequence[QAExample], tokenizer: Tokenizer, max_question_length: int) -> list[str]:
    """The questions, each cut after its max_question_length-th token; only the context may be windowed."""
    # Some questions begin with many spaces, which byte-level tokenizers count as tokens.
    questions = [example.question.lstrip() for example in examples]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question[: offsets[max_question_length - 1][1]] if len(offsets) > max_question_length else question
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _answer_tokens(example: QAExample, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer, or None if this window does not hold all of it.

    offsets: int32 (tokens, 2), characters of the context, -1 outside of it.
    """
    if not example.answers:
        return None
    start, text = example.answers[0]
    end = start + len(text)
    context = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    if not context.size or offsets[context[0], 0] > start or offsets[context[-1], 1] < end:
        return None
    first = context[np.flatnonzero(offsets[context, 1] > start)[0]]
    last = context[np.flatnonzero(offsets[context, 0] < end)[-1]]
    return int(first), int(last)


# --- batches ------------------------------------------------------------------------------------------------


def length_bucketed_batches(features: Sequence[Feature], batch_size: int, seed: int, epoch: int) -> list[list[Feature]]:
    """All features once, in batches of like length; the order depends on seed and epoch only."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(features))
    lengths = np.array([len(feature["input_ids"]) for feature in features])
    window = batch_size * _BUCKET_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        indices = order[start : start + window]
        indices = indices[np.argsort(lengths[indices], kind="stable")]
        batches += [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return [[features[i] for i in batches[b]] for b in random.permutation(len(batches))]


def collate(batch: Sequence[Feature], pad_id: int) -> "dict[str, torch.Tensor]":
    """Tensors (batch, longest) int64: input_ids, attention_mask, perhaps token_type_ids; and the targets.

    Targets, where the features have them: `labels` (batch,), int64 or, for regression, float32;
    `start_positions` and `end_positions` (batch,) int64.
    """
    # Here, so that data can be read, and answers scored, where PyTorch is not installed.
    import torch

    longest = max(len(feature["input_ids"]) for feature in batch)
    shape = (len(batch), longest)
    tensors = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    if "token_type_ids" in batch[0]:
        tensors["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    for row, feature in enumerate(batch):
        length = len(feature["input_ids"])
        tensors["attention_mask"][row, :length] = 1
        for name in ("input_ids", "token_type_ids"):
            if name in feature:
                tensors[name][row, :length] = torch.from_numpy(feature[name])
    for name in ("label", "start_position", "end_position"):
        if name in batch[0]:
            targets = [feature[name] for feature in batch]
            dtype = torch.float32 if isinstance(targets[0], float) else torch.int64
            tensors[f"{name}s"] = torch.tensor(targets, dtype=dtype)
    return tensors
