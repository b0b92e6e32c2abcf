"""`dsformer-serve`, also `python -m service`: read the settings, open the models, listen."""

from __future__ import annotations

import logging
import os
import sys

from fastapi import FastAPI

from service import doctor, logs
from service.app import create_app
from service.errors import StartError
from service.server import Server
from service.settings import EXIT_USAGE, Settings, read_options, unknown_variables

log = logging.getLogger("service")

EXIT_START = 1
EXIT_ENGINE = 4
# For a batch whose requests have all left; longer ones are cut off.
END_SECONDS = 0.2
# How long one thread may hold the interpreter while others wait; Python's own 5 ms is a request's whole time here.
SWITCH_SECONDS = 0.001


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    examine, show = arguments[:1] == ["doctor"], "--print-config" in arguments
    settings = read_options(Settings, [word for word in arguments[examine:] if word != "--print-config"])
    if unknown := unknown_variables(os.environ):
        print(f"There is no option for {', '.join(unknown)}; --help shows all there are.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    if show:
        print(settings.model_dump_json(indent=2))
        return
    if examine:
        sys.exit(0 if doctor.report(settings) else EXIT_START)
    logs.configure(settings.log_level, settings.log_format)
    # The tokenizers library would otherwise start one thread for each CPU of the host.
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads))
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        app = create_app(settings)
    except StartError as error:
        log.critical(str(error))
        sys.exit(EXIT_START)
    status = serve(app)
    service = app.state.service
    if service.lifecycle.crashed or not service.engine.has_ended(END_SECONDS):
        # A thread that is in native code, in a long batch or for ever, would hang or crash an orderly end.
        logging.shutdown()
        os._exit(EXIT_ENGINE if service.lifecycle.crashed else status)
    sys.exit(status)


def serve(app: FastAPI) -> int:
    """Until the service ends; returns the exit status, which uvicorn raises where it cannot listen."""
    try:
        Server(app).run()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    main()
