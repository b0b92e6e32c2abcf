"""Reading, windows and batches, and a sentence for everything that can be wrong with a data file."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tokenizer

from compressor.data import (
    ClassifyExample,
    DataError,
    QAExample,
    classify_features,
    collate,
    complete_task,
    length_bucketed_batches,
    load_examples,
    qa_features,
)
from compressor.tasks import TASKS, UnknownTaskError, find_task


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def squad(*questions: dict[str, Any], context: str = "the king lived in Paris") -> str:
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]})


def asked(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "question": "who?", "answers": [{"text": "king", "answer_start": 4}], **changes}


# --- tasks --------------------------------------------------------------------------------------------------


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UnknownTaskError, match=r"'sst3'.*sst2.*squad_v2"):
        find_task("sst3")


def test_a_folder_of_known_tasks(tmp_path: Path) -> None:
    write(tmp_path / "sst2/train.tsv.gz", 'sentence\tlabel\n"good film\t1\nbad film\t0\n')
    write(tmp_path / "mnli/dev_matched.tsv", "sentence1\tsentence2\tlabel\na\tb\tneutral\n")
    write(tmp_path / "stsb/dev.tsv.gz", "sentence1\tsentence2\tlabel\na\tb\t3.800\n")
    assert load_examples(find_task("sst2"), "train", tmp_path) == [
        ClassifyExample('"good film', None, 1),  # a quote is an ordinary character
        ClassifyExample("bad film", None, 0),
    ]
    assert load_examples(find_task("mnli"), "validation", tmp_path) == [ClassifyExample("a", "b", 1)]
    assert load_examples(find_task("stsb"), "validation", tmp_path) == [ClassifyExample("a", "b", 3.8)]
    with pytest.raises(DataError, match=r"'rte' needs .*rte/train.tsv.gz, which does not exist"):
        load_examples(find_task("rte"), "train", tmp_path)


def test_files_of_one_task_are_read_one_after_the_other(tmp_path: Path) -> None:
    for name in ("train_subset", "train_rebuilt"):
        write(tmp_path / f"qnli/{name}.tsv.gz", f"sentence1\tsentence2\tlabel\n{name}\tb\tentailment\n")
    examples = load_examples(find_task("qnli"), "train", tmp_path)
    assert [example.text for example in examples] == ["train_subset", "train_rebuilt"]  # type: ignore[union-attr]


# --- a user's own files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.tsv", 'text\ttext_pair\tlabel\nein "Satz"\tzwei\tja\nnoch einer\tdrei\tnein\n'),
        ("own.tsv.gz", '\ufefftext\ttext_pair\tlabel\r\nein "Satz"\tzwei\tja\r\nnoch einer\tdrei\tnein\r\n'),
        ("own.csv", 'label,sentence1,sentence2\nja,"ein ""Satz""",zwei\nnein,noch einer,drei\n'),
        (
            "own.jsonl",
            '{"text": "ein \\"Satz\\"", "text_pair": "zwei", "label": "ja"}\n'
            '{"text": "noch einer", "text_pair": "drei", "label": "nein"}\n',
        ),
    ],
)
def test_own_files_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    file = write(tmp_path / name, content)
    task = complete_task(find_task("classify"), file)
    assert task.label_names == ("ja", "nein")
    assert load_examples(task, "train", train_file=file) == [
        ClassifyExample('ein "Satz"', "zwei", 0),
        ClassifyExample("noch einer", "drei", 1),
    ]
    assert len(load_examples(task, "validation", validation_file=file, rows=1)) == 1


@pytest.mark.parametrize(
    ("labels", "names", "problem_type"),
    [
        (["10", "9", "9"], ("9", "10"), "single_label_classification"),
        (["b", "a", "10"], ("10", "a", "b"), "single_label_classification"),
        (["0.5", "2", "3"], (), "regression"),
    ],
)
def test_labels_come_from_the_training_file(
    tmp_path: Path, labels: list[str], names: tuple[str, ...], problem_type: str
) -> None:
    rows = "".join(f"word\t{label}\n" for label in labels)
    task = complete_task(find_task("classify"), write(tmp_path / "own.tsv", f"text\tlabel\n{rows}"))
    assert task.label_names == names
    assert task.problem_type == problem_type
    assert task.n_labels == max(1, len(names))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "holds no rows"),
        ("a.tsv", "text\tlabel\n", "holds no rows"),
        ("a.tsv", "words\tlabel\nx\t1\n", "line 2: no column text or sentence or sentence1; there are words, label"),
        ("a.tsv", "text\nx\n", "line 2: no column label"),
        ("a.tsv", "text\ttext\tlabel\nx\ty\t1\n", "line 1: a column name occurs twice"),
        ("a.tsv", "text\tlabel\nx\t1\n\t \ny\t0\n", "line 3: the row is empty"),
        ("a.tsv", "text\tlabel\nx\t1\n \t1\n", "line 3: text is empty"),
        ("a.tsv", "text\tlabel\nx\t\n", "line 2: the label is empty"),
        ("a.tsv", "text\tlabel\nx\ty\t1\n", "line 2: 3 fields, but the header has 2 columns"),
        ("a.tsv", "text\tlabel\nx\tmaybe\n", "line 2: the label 'maybe' is none of sst2's: NEGATIVE, POSITIVE"),
        ("a.tsv", "text\tlabel\nx\t2\n", "line 2: the label '2' is none of"),
        ("a.csv", 'text,label\nx,1\n"y,0\n', "line 3: not CSV"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '["x", 1]\n', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "line 1: text is 5, not a text"),
        ("a.jsonl", '{"text": "x", "label": [1]}\n', r"line 1: the label is \[1\]"),
        ("a.jsonl", '{"text": "x \\ud83d", "label": 1}\n', "line 1: text holds half a surrogate pair at character 2"),
        ("a.txt", "x", "must end in .tsv, .csv, .jsonl"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as raised:
        load_examples(find_task("sst2"), "train", train_file=file)
    assert str(file) in str(raised.value)


def test_unreadable_files(tmp_path: Path) -> None:
    task = find_task("sst2")
    with pytest.raises(DataError, match="No such file"):
        load_examples(task, "train", train_file=tmp_path / "none.tsv")
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(task, "train", train_file=tmp_path / "a.tsv")
    (tmp_path / "a.tsv.gz").write_bytes(b"text\tlabel\nx\t1\n")
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(task, "train", train_file=tmp_path / "a.tsv.gz")
    whole = gzip.compress(b"text\tlabel\n" + b"x\t1\n" * 999)
    (tmp_path / "b.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(task, "train", train_file=tmp_path / "b.tsv.gz")


def test_an_unknown_label_in_validation(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "text\tlabel\nx\tja\ny\tnein\n")
    validation = write(tmp_path / "dev.tsv", "text\tlabel\nx\tja\ny\tvielleicht\n")
    task = complete_task(find_task("classify"), train)
    with pytest.raises(DataError, match=r"dev.tsv, line 3: the label 'vielleicht' is none of classify's: ja, nein"):
        load_examples(task, "validation", train_file=train, validation_file=validation)


def test_open_tasks_need_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give --train-file"):
        complete_task(find_task("classify"), None)
    with pytest.raises(DataError, match="only the label ja"):
        complete_task(find_task("classify"), write(tmp_path / "a.tsv", "text\tlabel\nx\tja\n"))
    with pytest.raises(DataError, match="no files of its own"):
        load_examples(TASKS["qa"], "train", tmp_path)


def test_a_regression_refuses_words(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel\nx\ty\tvery\n")
    with pytest.raises(DataError, match=r"line 2: the label is 'very', but stsb needs a number"):
        load_examples(find_task("stsb"), "train", train_file=file)


# --- SQuAD files --------------------------------------------------------------------------------------------


def test_squad_files(tmp_path: Path) -> None:
    none = {"id": "2", "question": "when?", "answers": [], "is_impossible": True}
    file = write(tmp_path / "a.json.gz", squad(asked(), none))
    assert load_examples(find_task("squad_v2"), "train", train_file=file) == [
        QAExample("1", "who?", "the king lived in Paris", ((4, "king"),)),
        QAExample("2", "when?", "the king lived in Paris", (), is_impossible=True),
    ]


def test_inferred_places_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inferred = asked(id="2", answers=[{"text": "king", "answer_start": 4, "start_inferred": True}])
    file = write(tmp_path / "a.json", squad(asked(), inferred))
    with caplog.at_level(logging.INFO):
        assert len(load_examples(find_task("squad"), "train", train_file=file)) == 1
    assert "left out 1 question" in caplog.text
    assert len(load_examples(find_task("squad"), "train", train_file=file, keep_inferred=True)) == 2
    assert len(load_examples(find_task("squad"), "validation", validation_file=file)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"data": [', "not JSON"),
        ("[1]", "not in SQuAD layout"),
        ('{"data": [{"paragraphs": 5}]}', "paragraphs is missing or not a list of objects"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "article 0, paragraph 0: context is missing"),
        ('{"data": []}', "no usable example"),
        (squad(asked(), context="  "), "context is empty"),
        (squad(asked(question=" ")), "question 1: question is empty"),
        (squad(asked(id=7)), "question 7: the id is missing or not a text"),
        (squad(asked(answers=[{"text": "king", "answer_start": 5}])), "'king' does not stand at its answer_start 5"),
        (squad(asked(answers=[{"text": "king", "answer_start": -19}])), "does not stand at its answer_start -19"),
        (squad(asked(answers=[{"text": "king"}])), "needs a text and a whole number answer_start"),
        (squad(asked(answers="king")), "answers is not a list of objects"),
        (squad(asked(answers=[])), "no answers, though it is not marked is_impossible"),
        (squad(asked(is_impossible=True)), "answers given, though it is marked is_impossible"),
    ],
)
def test_bad_squad_files(tmp_path: Path, content: str, message: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message) as raised:
        load_examples(find_task("squad_v2"), "train", train_file=file)
    assert str(file) in str(raised.value)


# --- features -----------------------------------------------------------------------------------------------


def bert_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_classify_features_are_cut_not_padded() -> None:
    examples = [ClassifyExample("the film was good", None, 1), ClassifyExample("bad", None, 0)]
    features = classify_features(examples, make_tokenizer(), max_length=5)
    assert [len(feature["input_ids"]) for feature in features] == [5, 3]
    assert [feature["label"] for feature in features] == [1, 0]
    assert "token_type_ids" not in features[0]  # this tokenizer does not say that its model takes them
    pair = classify_features([ClassifyExample("good", "bad", 1)], bert_tokenizer(), max_length=8)[0]
    assert pair["token_type_ids"].tolist() == [0, 0, 0, 1, 1]


CONTEXT = "the king lived in paris and the queen lived in rome . so the story was good"
QUEEN = QAExample("q", "  who lived in rome", CONTEXT, ((CONTEXT.index("queen"), "queen"),))
WINDOWS: dict[str, Any] = {"max_length": 16, "doc_stride": 3, "max_question_length": 4}


def test_qa_windows_cover_the_context_and_know_their_characters() -> None:
    features = qa_features([QUEEN], make_tokenizer(), training=False, **WINDOWS)
    assert len(features) > 1
    seen: set[str] = set()
    for feature in features:
        assert len(feature["input_ids"]) <= 16
        assert len(feature["offsets"]) == len(feature["input_ids"])
        assert feature["example_index"] == 0
        places = feature["offsets"][feature["offsets"][:, 0] >= 0]
        words = [CONTEXT[start:end] for start, end in places]
        tokens = make_tokenizer().convert_ids_to_tokens(feature["input_ids"][feature["offsets"][:, 0] >= 0])
        assert words == tokens
        seen.update(words)
    assert seen == set(CONTEXT.split())


def test_training_windows_point_at_the_answer() -> None:
    tokenizer = make_tokenizer()
    windows = qa_features([QUEEN], tokenizer, training=False, **WINDOWS)
    answerable = qa_features([QUEEN], tokenizer, training=True, **WINDOWS)
    assert 0 < len(answerable) < len(windows)
    for feature in answerable:
        span = feature["input_ids"][feature["start_position"] : feature["end_position"] + 1]
        assert tokenizer.convert_ids_to_tokens(span) == ["queen"]
    both = qa_features([QUEEN], tokenizer, training=True, unanswerable=True, **WINDOWS)
    assert len(both) == len(windows)
    elsewhere = [feature for feature in both if feature["start_position"] == 0]
    assert len(elsewhere) == len(windows) - len(answerable)
    assert all(feature["end_position"] == 0 for feature in elsewhere)


def test_an_answer_across_the_edge_of_a_window_is_not_in_it() -> None:
    long = QAExample("q", "who", CONTEXT, ((0, CONTEXT[:40]),))
    assert qa_features([long], make_tokenizer(), 11, 2, training=True, max_question_length=4) == []


def test_long_questions_are_cut() -> None:
    example = QAExample("q", "who " * 50, CONTEXT)
    (feature,) = qa_features([example], make_tokenizer(), 128, 8, training=False, max_question_length=4)
    assert feature["input_ids"].tolist().count(make_tokenizer().convert_tokens_to_ids("who")) == 4


def test_windows_too_small_for_the_question_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_length 32 leaves no room.*must exceed 83"):
        qa_features([QUEEN], make_tokenizer(), 32, 16, training=True)


# --- batches ------------------------------------------------------------------------------------------------


def lengths_of(n: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": np.zeros(random.integers(1, 100)), "number": i} for i in range(n)]


def test_batches_hold_every_feature_once_in_a_fixed_order() -> None:
    features = lengths_of(1003)
    batches = length_bucketed_batches(features, 8, seed=3, epoch=0)
    assert sorted(feature["number"] for batch in batches for feature in batch) == list(range(1003))
    assert len(batches) == 126

    def numbers(seed: int, epoch: int) -> list[int]:
        batches = length_bucketed_batches(features, 8, seed, epoch)
        return [feature["number"] for batch in batches for feature in batch]

    assert numbers(3, 0) == numbers(3, 0)
    assert numbers(3, 0) != numbers(3, 1) != numbers(4, 0)


def test_batches_hold_little_padding_and_are_shuffled() -> None:
    batches = length_bucketed_batches(lengths_of(1000), 8, seed=0, epoch=0)
    lengths = [[len(feature["input_ids"]) for feature in batch] for batch in batches]
    padded = sum(len(batch) * max(batch) for batch in lengths)
    assert padded < 1.06 * sum(map(sum, lengths))
    longest = [max(batch) for batch in lengths]
    assert longest != sorted(longest)


def test_collate_pads_to_the_longest() -> None:
    examples = [ClassifyExample("good", "bad film", 1), ClassifyExample("the film was good", "fine", 0)]
    batch = collate(classify_features(examples, bert_tokenizer(), 32), pad_id=7)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][0, 6:].tolist() == [7, 7]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 8]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch["labels"].tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    score = collate(classify_features([ClassifyExample("good", None, 2.5)], make_tokenizer(), 32), pad_id=0)
    assert score["labels"].dtype == torch.float32
    spans = collate(qa_features([QUEEN], make_tokenizer(), 64, 8, training=True, max_question_length=8), 0)
    assert spans["start_positions"].tolist() == spans["end_positions"].tolist() == [13]
