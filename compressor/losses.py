"""What training minimises: the task's own loss, and the distances to a teacher's answers and inner states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.tasks import Task

# What of a batch is the answer and not the question.
LABELS = ("labels", "start_positions", "end_positions")


def task_loss(outputs: Any, batch: dict[str, Tensor], task: Task) -> Tensor:
    """The task's own loss: cross-entropy, squared error for regression, start and end averaged for QA."""
    if task.kind == "qa":
        start = nn.functional.cross_entropy(outputs.start_logits, batch["start_positions"])
        return (start + nn.functional.cross_entropy(outputs.end_logits, batch["end_positions"])) / 2
    if task.problem_type == "regression":
        return nn.functional.mse_loss(outputs.logits.squeeze(-1), batch["labels"].to(outputs.logits.dtype))
    return nn.functional.cross_entropy(outputs.logits, batch["labels"])


def distillation_loss(outputs: Any, soft: Any, batch: dict[str, Tensor], task: Task, temperature: float) -> Tensor:
    """KL to the teacher's distribution at ``temperature``, scaled by its square; squared error for regression."""
    if task.problem_type == "regression":
        return nn.functional.mse_loss(outputs.logits, soft.logits)
    if task.kind == "qa":
        padding = batch["attention_mask"] == 0
        pairs = [
            (
                getattr(outputs, name).masked_fill(padding, -1e4),
                getattr(soft, name).masked_fill(padding, -1e4),
            )
            for name in ("start_logits", "end_logits")
        ]
    else:
        pairs = [(outputs.logits, soft.logits)]
    losses = [
        nn.functional.kl_div(
            (student / temperature).log_softmax(1),
            (target / temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        for student, target in pairs
    ]
    return torch.stack(losses).mean() * temperature**2


def hidden_loss(outputs: Any, soft: Any, attention_mask: Tensor) -> Tensor:
    """Squared distance to the teacher's hidden states relative to their size, averaged over the layers.

    Every layer is compared with its own twin, so each gets a near and dense signal; the embeddings are not
    factorized and are left out. Relative, so that one weight suits models of every scale.
    """
    mask = attention_mask.unsqueeze(2)
    layers = [
        ((student - target).square() * mask).sum() / (target.square() * mask).sum()
        for student, target in zip(outputs.hidden_states[1:], soft.hidden_states[1:], strict=True)
    ]
    return torch.stack(layers).mean()


def attention_loss(outputs: Any, soft: Any, attention_mask: Tensor) -> Tensor:
    """KL to where the teacher's heads look, averaged over tokens, heads and layers.

    With dropout the maps are those after it, so they are compared without any.
    """
    mask = attention_mask[:, None, :]  # (rows, 1, tokens that look)
    layers = []
    for student, target in zip(outputs.attentions, soft.attentions, strict=True):
        student, target = student.float().clamp_min(1e-8), target.float().clamp_min(1e-8)
        distance = (target * (target.log() - student.log())).sum(3)  # (rows, heads, tokens)
        layers.append((distance * mask).sum() / (mask.sum() * target.shape[1]))
    return torch.stack(layers).mean()
