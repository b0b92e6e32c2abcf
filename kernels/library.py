"""Finds and opens the native library.

``importlib.resources`` and not ``__file__``: in an editable install the Python files stay in the checkout while
the library sits in site-packages.
"""

import ctypes
import functools
import importlib.resources
import platform
from pathlib import Path
from typing import NamedTuple

LIBRARY_NAME = "libdsformer.so"


class Isa(NamedTuple):
    """The instruction-set tier in use and the reason for it, as a sentence."""

    name: str
    reason: str


def library_path() -> str:
    """Path of the built library, for ``SessionOptions.register_custom_ops_library``.

    Raises FileNotFoundError, with the command that builds it, when it is not there.
    """
    found = importlib.resources.files("kernels").joinpath(LIBRARY_NAME)
    if not isinstance(found, Path) or not found.is_file():
        raise FileNotFoundError(
            f"{LIBRARY_NAME} is not built: run `pip install -e .` in the root of the repository "
            "(needs a C++17 compiler; CMake and Ninja come with it)"
        )
    return str(found)


@functools.cache
def library() -> ctypes.CDLL:
    """The opened library; ctypes releases the interpreter lock during its calls.

    Raises RuntimeError when this machine cannot load it.
    """
    path = library_path()
    try:
        opened = ctypes.CDLL(path)
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be loaded on this {platform.machine()} machine ({error}); if it was built for another "
            f"kind of processor or system, install the package again here"
        ) from error
    opened.dsformer_isa.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_char_p)]
    opened.dsformer_isa.restype = None
    for coder in (opened.dsformer_batch_omp, opened.dsformer_refit):
        coder.argtypes = [
            *[ctypes.c_void_p] * 4,
            *[ctypes.c_int64] * 7,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]
        coder.restype = ctypes.c_int
    return opened


def cpu_info() -> str:
    """What Linux says of the processors, flags and all; elsewhere nothing."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor as the operating system names it, for reports of measurements."""
    lines = cpu_info().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def isa() -> Isa:
    """The tier that this process uses: forced by the environment variable DSFORMER_ISA, or the best possible.

    The choice is made once a process. Raises RuntimeError when DSFORMER_ISA names an unknown or impossible tier.
    """
    name, reason = ctypes.c_char_p(), ctypes.c_char_p()
    library().dsformer_isa(ctypes.byref(name), ctypes.byref(reason))
    text = (reason.value or b"").decode()
    if name.value is None:
        raise RuntimeError(text)
    return Isa(name.value.decode(), text)
