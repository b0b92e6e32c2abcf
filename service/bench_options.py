"""What the commands of `dsformer-bench` share: options that are flags only, a progress bar, an end in a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from tqdm import tqdm

from service.errors import BackendFailed, StartError
from service.settings import read_options

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
SECONDS_BETWEEN_LINES = 30.0


class Flags(BaseSettings):
    """Flags only: names such as THREADS mean other things in people's environments."""

    model_config = SettingsConfigDict(extra="forbid", cli_kebab_case=True, cli_hide_none_type=True)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *others: Any, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@contextmanager
def end_in_a_sentence() -> Iterator[None]:
    """What a person can mend, and Ctrl-C, end the program without a traceback."""
    try:
        yield
    except (StartError, BackendFailed, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


OwnFlags = TypeVar("OwnFlags", bound=Flags)


def command(kind: type[OwnFlags], run: Callable[[OwnFlags], None]) -> Callable[..., None]:
    """A command's `main`: flags from the words given, else from the command line, and an end in a sentence."""

    def main(argv: list[str] | None = None) -> None:
        options = read_options(kind, argv)
        with end_in_a_sentence():
            run(options)

    return main


def progress(total: int, unit: str, done: int = 0) -> Any:
    """A bar on a terminal; a line every half minute where standard error is a file or a pipe."""
    every = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(total=total, initial=done, unit=unit, file=sys.stderr, mininterval=every, maxinterval=10 * every)


def write_json(file: Path, report: object) -> None:
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
