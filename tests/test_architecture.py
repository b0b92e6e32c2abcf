"""Imports point one way: service → kernels ← compressor, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"kernels": set(), "compressor": {"kernels"}, "service": {"kernels"}}
TRAINING = {"torch", "transformers", "compressor"}


def imported_packages(file):
    for node in ast.walk(ast.parse(file.read_text(), file)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def modules_after(statement):
    """Top-level names in sys.modules after a statement, in a fresh interpreter that sees the repository."""
    code = f"{statement}\nimport sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    forbidden = ALLOWED.keys() - ALLOWED[package] - {package}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not forbidden & set(imported_packages(file)), file


def test_kernels_source_imports_only_numpy_and_the_standard_library():
    for file in (ROOT / "kernels").rglob("*.py"):
        foreign = set(imported_packages(file)) - sys.stdlib_module_names - {"kernels", "numpy"}
        assert not foreign, file


def test_service_source_never_imports_training():
    for file in (ROOT / "service").rglob("*.py"):
        assert not TRAINING & set(imported_packages(file)), file


def test_scoring_needs_no_training():
    """`dsformer-bench eval` scores answers where only the service's own packages are installed."""
    assert not {"torch", "transformers", "scipy", "typer"} & modules_after("import compressor.scoring")


def test_importing_kernels_is_light():
    added = modules_after("import kernels") - modules_after("import numpy, ctypes") - sys.stdlib_module_names
    assert added == {"kernels"}


def test_importing_the_service_loads_no_training():
    modules = ", ".join(f"service.{file.stem}" for file in (ROOT / "service").glob("*.py") if file.stem != "__main__")
    assert not TRAINING & modules_after(f"import {modules}")


def test_importing_the_compressor_loads_neither_torch_nor_transformers():
    """It only waits for transformers to be imported, to tell it of our checkpoints."""
    assert not {"torch", "transformers", "onnxruntime"} & modules_after("import compressor")


def test_kernels_names_no_version():
    """transformers would take it for the version of Hugging Face's package `kernels`."""
    import kernels

    assert not hasattr(kernels, "__version__")
