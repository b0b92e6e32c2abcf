"""The dense-sparse matrix product, its packed format, and the sparse coder that fills it.

Imports numpy only, and opens the native library only when it is first used. There is no ``__version__`` here
on purpose: transformers probes any importable package named ``kernels`` and takes a version for Hugging Face's
package of that name.
"""

from kernels.library import Isa, cpu_info, cpu_name, isa, library_path
from kernels.omp import batch_omp, refit

__all__ = ["Isa", "batch_omp", "cpu_info", "cpu_name", "isa", "library_path", "refit"]
