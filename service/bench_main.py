"""`dsformer-bench`: four ways to measure, each with its own `--help`.

dsformer-bench folders A B     time model folders against each other in this process; the word may be left out
dsformer-bench http            load on a running service
dsformer-bench eval            accuracy of a running service on a whole dev set
dsformer-bench card A B        one card of a dense and a compressed folder: accuracy, sizes, speed, memory
"""

from __future__ import annotations

import sys
from importlib import import_module

MODULES = {
    "folders": "service.bench",
    "http": "service.bench_http",
    "eval": "service.bench_eval",
    "card": "service.bench_card",
}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    command = words[0] if words[0] in MODULES else "folders"
    import_module(MODULES[command]).main(words[words[0] in MODULES :])


if __name__ == "__main__":
    main()
