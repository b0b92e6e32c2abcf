"""`dsformer-serve`, also `python -m service`: read the settings, open the models, listen."""

from __future__ import annotations

import logging
import os
import sys

from service import logs
from service.app import create_app
from service.errors import StartError
from service.server import Server
from service.settings import Settings, read_options, unknown_variables

log = logging.getLogger("service")

EXIT_START = 1
EXIT_ENGINE = 4
# How long one thread may hold the interpreter while others wait; Python's own 5 ms is a request's whole time here.
SWITCH_SECONDS = 0.001


def main(argv: list[str] | None = None) -> None:
    settings = read_options(Settings, argv)
    logs.configure(settings.log_level)
    for name in unknown_variables(os.environ):
        log.warning("environment variable is no option of the service", extra={"variable": name})
    # The tokenizers library would otherwise start one thread for each CPU of the host.
    os.environ.setdefault("RAYON_NUM_THREADS", str(settings.threads))
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        app = create_app(settings)
    except StartError as error:
        log.critical(str(error))
        sys.exit(EXIT_START)
    Server(app).run()
    if app.state.service.lifecycle.crashed:
        # A thread that hangs in native code would hang or crash an orderly end.
        logging.shutdown()
        os._exit(EXIT_ENGINE)


if __name__ == "__main__":
    main()
