"""All that the routes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

import kernels
from service.admission import Admission
from service.compare_metrics import CompareMetrics
from service.engine import Engine
from service.keys import Keys
from service.lane import Lane
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.registry import Registry
from service.settings import Settings
from service.workers import Workers

if TYPE_CHECKING:
    from service.reload import Reloader


@dataclass
class Service:
    settings: Settings
    models: Registry
    keys: Keys
    workers: Workers
    admission: Admission
    engine: Engine
    lifecycle: Lifecycle
    metrics: Metrics
    lane: Lane
    compare_metrics: CompareMetrics
    isa: kernels.Isa
    end: Callable[[], None] = lambda: None  # ends the process
    reloader: Reloader = field(init=False)
    closing: list[Callable[[], None]] = field(default_factory=list)  # called at the end

    def observe_queue(self) -> None:
        """Read the gauges anew; they are of use only when somebody looks."""
        self.metrics.load(self.admission.requests, self.admission.tokens)
        for model in self.models:
            self.metrics.queue(model, *self.engine.queued(model))


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
