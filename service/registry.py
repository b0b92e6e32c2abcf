"""All models of the service: at most one for each task and variant."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from service import artifact
from service.artifact import Task
from service.errors import NotFound, StartError, TaskUnavailable
from service.model import OnnxModel
from service.settings import Settings

log = logging.getLogger(__name__)

TASKS: tuple[Task, ...] = ("classify", "qa")


class Registry:
    def __init__(self, models: list[OnnxModel], default_variant: str) -> None:
        self._models = {(m.artifact.task, str(m.artifact.variant)): m for m in models}
        self.variants = sorted({variant for _, variant in self._models})
        self.defaults = {task: self._default(task, default_variant) for task in TASKS if self.of_task(task)}

    def __iter__(self) -> Iterator[OnnxModel]:
        return iter(self._models.values())

    def of_task(self, task: Task) -> list[str]:
        """Variants loaded for a task, by name."""
        return sorted(variant for t, variant in self._models if t == task)

    def get(self, task: Task, variant: str | None) -> OnnxModel:
        """The model that answers; None asks for the default variant."""
        variant = variant or self.defaults.get(task)
        if variant is None or not self.of_task(task):
            raise TaskUnavailable(f"No model for the task {task} is loaded.")
        if variant not in self.variants:
            raise NotFound(f"There is no such variant; loaded are {', '.join(self.variants)}.")
        model = self._models.get((task, variant))
        if model is None:
            raise TaskUnavailable(
                f"The variant {variant} has no model for the task {task}; {', '.join(self.of_task(task))} has."
            )
        return model

    def _default(self, task: Task, wanted: str) -> str:
        loaded = self.of_task(task)
        if wanted in loaded:
            return wanted
        log.warning("the default variant has no model for a task", extra={"task": task, "answers": loaded[0]})
        return loaded[0]


def load(settings: Settings, loaded: Iterable[OnnxModel] = ()) -> Registry:
    """Check and open every model folder; the first broken one stops the start.

    A folder that is still what one of the `loaded` models was made of is not opened again.
    """
    artifacts = [artifact.read(path) for path in artifact.find_folders(settings.models)]
    seen: dict[tuple[str, str], artifact.Artifact] = {}
    for found in artifacts:
        other = seen.setdefault((found.task, found.variant), found)
        if other is not found:
            raise StartError(
                f"Model folders {other.path} and {found.path} are both {found.task}, {found.variant}: "
                "keep one, or point --models (DSFORMER_MODELS) at another directory."
            )
        if found.config.max_length > settings.max_batch_tokens:
            raise StartError(
                f"Model folder {found.path} takes {found.config.max_length} tokens, more than "
                f"max_batch_tokens {settings.max_batch_tokens}: raise --max-batch-tokens."
            )
    known = [(model.artifact, model) for model in loaded]
    models = [
        next((model for old, model in known if old == found), None) or open_model(found, settings.threads)
        for found in artifacts
    ]
    return Registry(models, settings.default_variant)


def open_model(found: artifact.Artifact, threads: int) -> OnnxModel:
    model = OnnxModel(found, threads)
    log.info(
        "model loaded",
        extra={
            "folder": str(found.path),
            "task": found.task,
            "variant": found.variant,
            "sha256": found.sha256[:12],
            "file_bytes": model.file_bytes,
            "load_seconds": round(model.load_seconds, 3),
        },
    )
    return model
