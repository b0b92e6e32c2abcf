"""Factors that a run starts from, kept on disk: what took K-SVD minutes is not done twice.

A killed run finds its own beside its output, and the runs of a study share one folder: those that differ only in how
they train start from the same factors. A file is named by all that decides what is in it, so no wrong one is taken.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from compressor.calibration import Calibration
from compressor.factors import WeightFactors, read_factors, write_factors
from compressor.methods import Method

log = logging.getLogger(__name__)


def start_of(
    folder: Path, method: Method, model: nn.Module, plan: Sequence[Any], calibration: Calibration
) -> Sequence[WeightFactors]:
    """The factors of ``method.factorize``, from ``folder`` if they are there, else made and left there."""
    path = folder / f"{digest(method, model, calibration)}.safetensors"
    if path.is_file():
        try:
            factors = _read(path, method)
            log.info("starting from the factors in %s", path)
            return factors
        except Exception as error:
            log.warning("%s is broken (%s), so the weights are factorized again", path, error)
    write_factors(path, method.factorize(model, plan, calibration), method.name)
    return _read(path, method)  # as the next run will, for another layout of an array rounds otherwise


def _read(path: Path, method: Method) -> list[WeightFactors]:
    return read_factors(path, lambda _: method.factors_type)[1]


def digest(method: Method, model: nn.Module, calibration: Calibration) -> str:
    """Of the method's settings, the weights, and the data that it may look at."""
    found = hashlib.sha256(repr(method).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().numpy().tobytes())
    found.update(f"{calibration.task.name} {calibration.batch_size} {calibration.seed}".encode())
    for feature in calibration.features:
        for name, values in sorted(feature.items()):
            array = np.asarray(values)
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:32]
