"""What Transformers knows of our checkpoints: ``quant_method: dsformer`` in ``config.json``, and who reads the folder.

This is imported in the middle of Transformers' own import (see ``__init__.py``), so it holds the two registered classes
alone; what they do is in ``huggingface.py``, which is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "dsformer"


@register_quantization_config(QUANT_METHOD)
class DSFormerConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a compressed checkpoint.

    method: its name (ds, svd, …). schedule: what it was trained by, and is when it is trained on. factors: for each
    set of weights the ``members``, which are module names, and the ``tensors`` that stand in the file for them, under
    the first member's name: dtype and shape by name.
    """

    def __init__(self, method: str, schedule: str, factors: Sequence[dict[str, Any]], **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.method, self.schedule, self.factors = method, schedule, list(factors)


@register_quantizer(QUANT_METHOD)
class DSFormerQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads, saves and trains models whose matrices are kept as a compression method's factors."""

    # Compressing takes data and training: `dsformer-compress` does it, and no argument of `from_pretrained`.
    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """float32, whatever is asked for: dictionaries need it. For less there is autocast, or ``dequantize`` first."""
        return torch.float32

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        from compressor.huggingface import await_factors

        await_factors(model, self.quantization_config.factors)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from compressor.huggingface import receive_factors

        config = self.quantization_config
        config.factors = receive_factors(model, config.method, config.schedule)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from compressor.huggingface import release

        return release(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All of it can be trained, not only adapters beside it."""
        return True
