"""What the service is measured against: FastAPI around a session, one request at a time, batches of nobody."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Response

from service import artifact, classify
from service.model import OnnxModel
from service.schemas import TextPair


def create(folder: Path, threads: int) -> FastAPI:
    app, model, lock = FastAPI(), OnnxModel(artifact.read(folder), threads), threading.Lock()

    @app.post("/classify")
    def answer(body: dict[str, str]) -> list[list[dict[str, object]]]:
        rows, _ = classify.prepare(model.tokenizer, [TextPair(text=body["inputs"])], "error", model.max_length)
        with lock:
            (logits,) = model.run(rows)
        powers = np.exp(logits[0].astype(np.float64))
        return [
            [{"label": n, "score": float(x)} for n, x in zip(model.artifact.labels, powers / powers.sum(), strict=True)]
        ]

    @app.get("/readyz")
    def ready() -> Response:
        return Response()

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--log-level", default="warning")
    options = parser.parse_args()
    uvicorn.run(
        create(options.models, options.threads), port=options.port, log_level=options.log_level, access_log=False
    )
