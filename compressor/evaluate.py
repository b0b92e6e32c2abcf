"""A model's answers and metrics over a whole validation set: of an exported folder through ONNX Runtime, or in PyTorch.

Answers are what ``scoring.py`` knows as predictions: a row of logits for each text, or the text of each answer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as PlainTokenizer
from transformers import PreTrainedTokenizerFast

from compressor.config import QA_LENGTH, QA_STRIDE
from compressor.data import (
    ClassifyExample,
    DataError,
    Example,
    Feature,
    QAExample,
    Tokenizer,
    classify_features,
    collate,
    qa_features,
)
from compressor.export import usable_positions
from compressor.metrics import decode_qa
from compressor.progress import progress
from compressor.scoring import score
from compressor.session import open_session
from compressor.tasks import Task

# (inputs by name) -> the model's outputs, each (batch, ...).
Run: TypeAlias = Callable[[Mapping[str, torch.Tensor]], Sequence[NDArray[Any]]]

# Tokens of a question that are kept, as the published BERT results use them.
_MAX_QUESTION_LENGTH = 64


def evaluate_folder(
    folder: Path, task: Task, examples: Sequence[Example], batch_size: int = 16, threads: int = 0
) -> dict[str, float]:
    """Metrics, in points, of an exported model folder. threads: ONNX Runtime's; 0 is one a physical core."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    custom_ops = config["dsformer"]["variant"] == "dsformer"
    session = open_session(folder / "model.onnx", threads, custom_ops)
    names = [node.name for node in session.get_inputs()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=PlainTokenizer.from_file(str(folder / "tokenizer.json")), model_input_names=names
    )

    def run(inputs: Mapping[str, torch.Tensor]) -> Sequence[NDArray[Any]]:
        outputs: Sequence[NDArray[Any]] = session.run(None, {name: inputs[name].numpy() for name in names})
        return outputs

    limit = config["max_position_embeddings"]
    answers = _answers(run, tokenizer, config["pad_token_id"], limit, task, examples, batch_size, folder.name)
    return score(task, examples, answers)


def evaluate_model(
    model: Any, tokenizer: Tokenizer, task: Task, examples: Sequence[Example], batch_size: int = 32, show: bool = True
) -> dict[str, float]:
    """Metrics, in points, of a transformers model on whatever device it is; its mode is left as it was.

    ``show``: with a progress bar.
    """
    return score(task, examples, answer(model, tokenizer, task, examples, batch_size, "PyTorch" if show else None))


def answer(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    batch_size: int = 32,
    name: str | None = "PyTorch",
) -> list[Any]:
    """What :func:`evaluate_model` scores: the answer to each example, in their order.

    ``name``: what the progress bar calls the model; None: no bar.
    """
    outputs = ("start_logits", "end_logits") if task.kind == "qa" else ("logits",)

    def run(inputs: Mapping[str, torch.Tensor]) -> Sequence[NDArray[Any]]:
        result = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        return [result[name].float().cpu().numpy() for name in outputs]

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            limit, pad_id = usable_positions(model), tokenizer.pad_token_id
            return _answers(run, tokenizer, pad_id, limit, task, examples, batch_size, name)
    finally:
        model.train(was_training)


def _answers(
    run: Run,
    tokenizer: Tokenizer,
    pad_id: int,
    limit: int,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    name: str | None,
) -> list[Any]:
    if not examples:
        raise DataError(f"There are no examples to measure {task.name} on.")
    title = name and f"measuring {name} on {task.name}"
    if task.kind == "qa":
        questions = [example for example in examples if isinstance(example, QAExample)]
        features = qa_evaluation_features(questions, tokenizer, limit)
        starts, ends = zip(*_predict(run, features, pad_id, batch_size, title), strict=True)
        texts = decode_qa(features, starts, ends, questions, null_allowed=task.unanswerable)
        return [texts[question.id] for question in questions]
    rows = [example for example in examples if isinstance(example, ClassifyExample)]
    features = classify_features(rows, tokenizer, limit)
    return [outputs[0] for outputs in _predict(run, features, pad_id, batch_size, title)]


def qa_evaluation_features(examples: Sequence[QAExample], tokenizer: Tokenizer, limit: int) -> list[Feature]:
    """Windows of the usual sizes, or of smaller ones in proportion where the model takes fewer tokens."""
    scale = min(1.0, limit / QA_LENGTH)
    return qa_features(
        examples,
        tokenizer,
        max_length=int(scale * QA_LENGTH),
        doc_stride=int(scale * QA_STRIDE),
        max_question_length=int(scale * _MAX_QUESTION_LENGTH),
        training=False,
    )


def _predict(
    run: Run, features: Sequence[Feature], pad_id: int, batch_size: int, title: str | None
) -> list[tuple[NDArray[Any], ...]]:
    """Each feature's outputs, in the features' order; batches are of like length to save padding."""
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    predictions: dict[int, tuple[NDArray[Any], ...]] = {}
    with progress(title, total=len(features)) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([features[i] for i in chosen], pad_id)
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            outputs = run(inputs)
            for row, i in enumerate(chosen):
                predictions[i] = tuple(output[row] for output in outputs)
                advance()
    return [predictions[i] for i in range(len(features))]
