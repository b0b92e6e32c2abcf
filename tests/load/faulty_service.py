"""The service with a fault: an inference of exactly FAULT_TOKENS tokens hangs, or ends its thread, as FAULT says."""

from __future__ import annotations

import os
import threading

from service.__main__ import main
from service.model import OnnxModel

run = OnnxModel.run


def faulty(self, rows):
    if any(len(row) == int(os.environ["FAULT_TOKENS"]) for row in rows):
        if os.environ["FAULT"] == "ends":
            raise SystemExit
        threading.Event().wait()
    return run(self, rows)


if __name__ == "__main__":
    OnnxModel.run = faulty
    main()
