"""Meet, import all that ``compress`` works with, part, and print the threads that are left, by name.

torchrun --nproc-per-node 2 part_in_processes.py
"""

from __future__ import annotations

from pathlib import Path

from compressor import processes


def main() -> None:
    processes.join()
    import compressor.pipeline
    import compressor.worker  # noqa: F401

    processes.from_all("here")
    processes.leave()
    print(*(name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")), flush=True)


if __name__ == "__main__":
    main()
