"""The native side by itself: what the library exports, how a tier is chosen, and our header against the official."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import library, library_path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "kernels" / "csrc"


def compile_cc(*arguments):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler (set CXX)")
    command = [compiler, "-std=c++17", f"-I{CSRC}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_for_another_processor_is_refused_in_a_sentence(tmp_path, monkeypatch):
    image = bytearray(Path(library_path()).read_bytes())
    machine = 18  # where an ELF file says what it is for; 243 is RISC-V
    image[machine : machine + 2] = (243).to_bytes(2, "little")
    other = tmp_path / "libdsformer.so"
    other.write_bytes(image)
    monkeypatch.setattr(library, "library_path", lambda: str(other))
    with pytest.raises(RuntimeError, match=r"cannot be loaded on this .* built for another kind of processor"):
        library.library.__wrapped__()


def test_exports_only_its_interface():
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("no nm (binutils)")
    table = subprocess.run([nm, "-D", "--defined-only", library_path()], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in table.stdout.splitlines()}
    assert "RegisterCustomOps" in names
    assert all(name == "RegisterCustomOps" or name.startswith("dsformer_") for name in names)


def test_needs_neither_onnxruntime_nor_openmp():
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("no readelf (binutils)")
    dynamic = subprocess.run([readelf, "-d", library_path()], capture_output=True, text=True, check=True).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "onnxruntime" in line or "omp" in line]


def test_choice_of_a_tier(tmp_path):
    program = tmp_path / "dispatch_check"
    compile_cc(HERE / "dispatch_check.cc", CSRC / "dispatch.cc", "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_header_agrees_with_the_official_one():
    include = os.environ.get("ORT_INCLUDE_DIR")
    if not include:
        pytest.skip("ORT_INCLUDE_DIR is not set (the folder of an official onnxruntime_c_api.h)")
    compile_cc(f"-I{include}", "-fsyntax-only", HERE / "abi_check.cc")
