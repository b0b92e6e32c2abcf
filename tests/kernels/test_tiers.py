"""Every op in every tier against the float64 reference, in the newest and in the oldest runtime we promise."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cases import (
    EDGE_CASES,
    EDGE_TOKENS,
    GROUPS_CASES,
    GROUPS_TOKENS,
    MAX_RELATIVE_ERROR,
    ROUNDED_ERRORS,
)
from ds_model import attention_model, one_node_model

from kernels import isa, library_path, reference
from kernels.onnx_op import PRECISIONS

TIERS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi", "avx512bf16")
TEST_OMP = Path(__file__).with_name("test_omp.py")
RUN_MODELS = Path(__file__).with_name("run_models.py")
RUN_GUARDED = Path(__file__).with_name("run_guarded.py")

# (heads, width of a head); widths that are no multiple of a vector or of the rows in flight.
ATTENTION_HEADS = ((12, 32), (2, 64), (3, 20), (1, 1), (1, 256))
# Around the edges of a task's queries and of a chunk of keys: (batch, tokens).
ATTENTION_TOKENS = ((1, 1), (2, 15), (1, 16), (1, 17), (2, 33), (1, 127), (1, 129), (2, 300), (0, 5), (2, 0))


class Check(NamedTuple):
    name: str
    model: bytes
    inputs: list  # a mapping by input name each
    expected: list
    storage: str


def ds_linear_checks():
    for case, tokens in [(c, EDGE_TOKENS) for c in EDGE_CASES] + [(c, GROUPS_TOKENS) for c in GROUPS_CASES]:
        rng = np.random.default_rng(1)
        arrays = case.arrays()
        features = {"X": case.n_blocks * case.width} | ({"residual": case.rows} if case.residual else {})
        inputs = [
            {name: rng.standard_normal((*shape, n)).astype(np.float32) for name, n in features.items()}
            for shape in tokens
        ]
        expected = [
            reference.ds_linear(x=each["X"], residual=each.get("residual"), **arrays, activation=case.activation)
            for each in inputs
        ]
        model = one_node_model(arrays, inputs=tuple(features), activation=case.activation)
        yield Check(case.name, model, inputs, expected, case.storage)


def attention_checks():
    for (n_heads, width), masked, precision in itertools.product(ATTENTION_HEADS, (False, True), PRECISIONS):
        rng = np.random.default_rng(2)
        inputs = []
        for batch, tokens in ATTENTION_TOKENS:
            # Scores up to about 15: weights from even to all on one key.
            qkv = 2 * rng.standard_normal((batch, tokens, 3 * n_heads * width)).astype(np.float32)
            inputs.append({"QKV": qkv})
            if masked:
                mask = rng.integers(0, 2, (batch, tokens)).astype(np.int32)
                mask[1:, :] = 0  # a text without any key
                inputs[-1]["mask"] = mask
        expected = [reference.attention(each["QKV"], n_heads, each.get("mask")) for each in inputs]
        name = f"attention-{n_heads}x{width}{'-masked' * masked}-{precision}"
        yield Check(name, attention_model(n_heads, mask=masked, precision=precision), inputs, expected, precision)


def run(command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def check_outputs(folder, checks, tier):
    for check in checks:
        allowed = ROUNDED_ERRORS.get((tier, check.storage), MAX_RELATIVE_ERROR)
        with np.load(folder / f"{check.name}.out.npz") as computed:
            for i, wanted in enumerate(check.expected):
                y = computed[f"y{i}"]
                assert y.dtype == np.float32
                assert y.shape == wanted.shape
                np.testing.assert_array_equal(computed[f"t{i}"], y, err_msg=f"{check.name}: threads matter")
                if wanted.size:
                    error = np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-3)
                    assert error < allowed, f"{check.name}, input {i}: relative error {error:.2g}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder for run_models.py, and what should come of it."""
    folder = tmp_path_factory.mktemp("models")
    checks = [*ds_linear_checks(), *attention_checks()]
    for check in checks:
        (folder / f"{check.name}.onnx").write_bytes(check.model)
        named = {f"{name}{i}": tensor for i, each in enumerate(check.inputs) for name, tensor in each.items()}
        np.savez(folder / f"{check.name}.npz", **named)
        np.savez(folder / f"{check.name}.shapes.npz", **{f"y{i}": y.shape for i, y in enumerate(check.expected)})
    return folder, checks


@pytest.fixture(params=TIERS)
def tier(request):
    """A tier that this machine has."""
    probe = run([sys.executable, "-c", "import kernels; print(kernels.isa())"], DSFORMER_ISA=request.param)
    if "is impossible here" in probe.stderr:
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert f"name='{request.param}', reason='forced by DSFORMER_ISA={request.param}'" in probe.stdout, probe.stderr
    return request.param


def test_tier_matches_the_reference(models, tier):
    folder, checks = models
    done = run([sys.executable, RUN_MODELS, library_path(), folder], DSFORMER_ISA=tier)
    assert done.returncode == 0, done.stderr
    assert "odd ['batch', 'sequence', 53]" in done.stdout
    check_outputs(folder, checks, tier)


def test_tier_stays_within_its_tensors(models, tier):
    folder, checks = models
    done = run([sys.executable, RUN_GUARDED, library_path(), folder], DSFORMER_ISA=tier)
    assert done.returncode == 0, f"status {done.returncode} (-11: memory that is not a tensor's)\n{done.stderr}"
    check_outputs(folder, checks, tier)


@pytest.mark.parametrize("tier", ["scalar", "avx2", "avx512"], indirect=True)
def test_tier_codes(tier):
    """All that is asked of batch-OMP and of refitting, of each tier that they are compiled for."""
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST_OMP], DSFORMER_ISA=tier)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["X", "dictionary", "values", "norm_weight", "residual"])
def test_tensors_are_used_where_they_lie(models, tmp_path, name):
    """And a touch of a guarded page is seen at all."""
    folder, _ = models
    for file in folder.glob("bert-output-norm.*"):
        shutil.copy(file, tmp_path)
    done = run([sys.executable, RUN_GUARDED, library_path(), tmp_path, name])
    assert done.returncode == -signal.SIGSEGV


def test_oldest_supported_onnxruntime(models):
    python = os.environ.get("ORT_MIN_PYTHON")
    if not python:
        pytest.skip("ORT_MIN_PYTHON is not set (a Python that has onnxruntime 1.17)")
    folder, checks = models
    for stale in folder.glob("*.out.npz"):
        stale.unlink()
    done = run([python, RUN_MODELS, library_path(), folder])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("onnxruntime 1.17."), done.stdout
    assert "odd ['batch', 'sequence', 53]" in done.stdout
    check_outputs(folder, checks, isa().name)
