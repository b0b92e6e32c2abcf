"""Shapes of DSLinear that tests and benchmarks share."""

from typing import NamedTuple

import numpy as np

from kernels.banks import bank_sizes
from kernels.integers import to_int8, to_int16
from kernels.onnx_op import index_dtype

# Allowed of the largest output. Products of a few hundred terms in float32; observed below 6e-7 (1.3e-6 for 600 codes).
MAX_RELATIVE_ERROR = 1e-5
# What tiers that round more than weights may differ: DSLinear's tokens and products, to 16 bits (observed below 2e-4)
# or to 8; attention's to bfloat16, where a node allows it.
ROUNDED_ERRORS = {
    **{(tier, "int16"): 5e-4 for tier in ("avx2", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16")},
    **{(tier, "int8"): 1e-3 for tier in ("avx2", "avx512", "avx512vnni")},
    **{(tier, "int8"): 3e-2 for tier in ("avx512vbmi", "avx512bf16")},
    ("avx512bf16", "bfloat16"): 6e-2,
}


class Case(NamedTuple):
    """One layer: N = n_blocks · width inputs, M = rows outputs."""

    name: str
    n_blocks: int
    width: int  # B
    n_atoms: int  # K
    rows: int  # M
    n_nonzero: int  # S
    storage: str = "float32"  # of dictionary and values
    bias: bool = True
    activation: str = "none"
    residual: bool = False
    norm: bool = False
    banked: bool = False  # a row's codes are spread evenly over the banks, as the compressor spreads them

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """dictionary, indices, values and, if the case has them, bias, scales, norm_weight and norm_bias."""
        rng = np.random.default_rng(seed)
        number = np.float16 if self.storage == "float16" else np.float32
        codes = (self.n_blocks, self.rows, self.n_nonzero)
        arrays = {
            "dictionary": rng.standard_normal((self.n_blocks, self.n_atoms, self.width)).astype(number),
            "indices": self._indices(rng, codes).astype(index_dtype(self.n_atoms)),
            "values": rng.standard_normal(codes).astype(number),
        }
        if self.bias:
            arrays["bias"] = rng.standard_normal(self.rows).astype(np.float32)
        if self.norm:
            arrays["norm_weight"] = rng.uniform(0.5, 2, self.rows).astype(np.float32)
            arrays["norm_bias"] = rng.standard_normal(self.rows).astype(np.float32)
        to_integers = {"int16": to_int16, "int8": to_int8}.get(self.storage)
        if to_integers:
            weights = [arrays[name] for name in ("dictionary", "indices", "values")]
            arrays["dictionary"], arrays["values"], arrays["scales"] = to_integers(*weights)
        return arrays

    def _indices(self, rng: np.random.Generator, codes: tuple[int, int, int]) -> np.ndarray:
        if not self.banked:
            return rng.integers(0, self.n_atoms, codes)
        sizes = np.array(bank_sizes(self.n_atoms))
        bank = np.arange(self.n_nonzero) % len(sizes)
        first = bank * sizes[0]
        return rng.integers(first, first + sizes[bank], codes)


# In integers of both kinds.
_INTEGER_CASES = (
    Case("bert-attention", 12, 64, 96, 768, 12),
    Case("minilm", 12, 32, 144, 193, 6, activation="gelu"),
    Case("no-bias", 3, 16, 48, 64, 4, bias=False),
    Case("odd", 3, 17, 37, 53, 5),
    Case("one-of-everything", 1, 1, 1, 1, 1),
    Case("k257-uint16", 2, 8, 257, 33, 3),
    Case("many-nonzeros", 1, 8, 700, 9, 600),
    Case("wide-block", 2, 150, 20, 17, 7),
)

# Edges: K, M, S, B that are no multiples of any vector; one of everything; every storage type and epilogue.
EDGE_CASES = (
    Case("bert-attention", 12, 64, 96, 768, 12),
    Case("bert-ffn-in", 4, 64, 384, 300, 12, activation="gelu"),
    Case("minilm-half", 12, 32, 144, 193, 6, storage="float16", activation="gelu"),
    Case("no-bias", 3, 16, 48, 64, 4, bias=False),
    Case("no-bias-gelu", 3, 16, 48, 64, 4, bias=False, activation="gelu"),
    Case("odd", 3, 17, 37, 53, 5),
    Case("odd-half", 3, 17, 37, 53, 5, storage="float16"),
    Case("one-of-everything", 1, 1, 1, 1, 1),
    Case("k256", 2, 8, 256, 31, 3),
    Case("k257-uint16", 2, 8, 257, 33, 3, activation="gelu"),
    Case("many-nonzeros", 1, 8, 700, 9, 600),
    Case("many-nonzeros-half", 1, 8, 700, 9, 600, storage="float16"),
    Case("wide-block-half", 2, 150, 20, 17, 7, storage="float16"),
    Case("wide-block", 2, 150, 20, 17, 7),
    Case("bert-attention-3.57x-int8", 12, 64, 96, 768, 8, storage="int8"),
    Case("bert-ffn-in-int8", 4, 64, 384, 300, 8, storage="int8", activation="gelu"),
    Case("bert-ffn-in-banked-int8", 4, 64, 384, 300, 8, storage="int8", activation="gelu", banked=True),
    Case("bert-qkv-int8", 3, 64, 288, 95, 12, storage="int8"),
    Case("minilm-banked-int8", 12, 32, 144, 193, 6, storage="int8", activation="gelu", banked=True),
    Case("uneven-banks-int8", 2, 20, 259, 50, 9, storage="int8", banked=True),
    Case("minilm-output-norm-int8", 12, 32, 48, 384, 6, storage="int8", residual=True, norm=True),
    Case("too-wide-a-block-int8", 1, 1200, 5, 6, 3, storage="int8"),
    Case("bert-output-norm", 4, 64, 96, 768, 12, residual=True, norm=True),
    Case("minilm-output-norm-int16", 12, 32, 48, 384, 6, storage="int16", residual=True, norm=True),
    Case("odd-residual", 3, 17, 37, 53, 5, residual=True, activation="gelu"),
    Case("odd-norm", 3, 17, 37, 53, 5, norm=True),
    Case("few-rows-norm-int16", 3, 17, 37, 7, 5, storage="int16", residual=True, norm=True),
    *(
        case._replace(name=f"{case.name}-{storage}", storage=storage)
        for case in _INTEGER_CASES
        for storage in ("int16", "int8")
    ),
)
# Around every vector and tile edge: (batch, sequence).
EDGE_TOKENS = ((1, 1), (1, 15), (1, 16), (1, 17), (2, 24), (1, 63), (1, 65), (3, 43), (0, 5))

# More tokens than a call keeps in scratch at once.
GROUPS_CASES = tuple(
    Case(f"several-groups-{storage}", 12, 64, 384, 20, 3, storage, residual=True, norm=True)
    for storage in ("float32", "int8")
)
GROUPS_TOKENS = ((1, 300),)

# Layers of real models at the presets, for benchmarks; 128 tokens is the usual length.
BENCH_CASES = (
    Case("bert-base-qkv-2.8x", 12, 64, 288, 2304, 12, banked=True),
    Case("bert-base-output-2.8x", 12, 64, 96, 768, 12, banked=True),
    Case("bert-base-ffn-in-2.8x", 12, 64, 384, 3072, 12, activation="gelu", banked=True),
    Case("bert-base-ffn-out-2.8x", 48, 64, 96, 768, 12, banked=True),
    Case("bert-base-qkv-3.57x", 12, 64, 288, 2304, 8, banked=True),
    Case("bert-base-output-3.57x", 12, 64, 96, 768, 8, banked=True),
    Case("bert-base-ffn-in-3.57x", 12, 64, 384, 3072, 8, activation="gelu", banked=True),
    Case("bert-base-ffn-out-3.57x", 48, 64, 96, 768, 8, banked=True),
    Case("minilm-qkv-2.8x", 12, 32, 144, 1152, 6, banked=True),
    Case("minilm-output-2.8x", 12, 32, 48, 384, 6, banked=True),
    Case("minilm-ffn-in-2.8x", 12, 32, 192, 1536, 6, activation="gelu", banked=True),
    Case("minilm-ffn-out-2.8x", 48, 32, 48, 384, 6, banked=True),
)
