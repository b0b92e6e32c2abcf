"""The service with a fault, named by FAULT.

slow : every run takes 20 ms more, so that a queue builds up before a tiny model
hangs, ends : an inference with a row of exactly FAULT_TOKENS tokens hangs, or ends its thread
"""

from __future__ import annotations

import os
import threading
import time

from service.__main__ import main
from service.model import OnnxModel

run = OnnxModel.run


def faulty(self, rows):
    if os.environ["FAULT"] == "slow":
        time.sleep(0.02)
    elif any(len(row) == int(os.environ["FAULT_TOKENS"]) for row in rows):
        if os.environ["FAULT"] == "ends":
            raise SystemExit
        threading.Event().wait()
    return run(self, rows)


if __name__ == "__main__":
    OnnxModel.run = faulty
    main()
