"""Log lines: time, level, module, message, then key=value; or one JSON object. No line holds text of a user."""

from __future__ import annotations

import json
import logging
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class Utc(logging.Formatter):
    """Times to the millisecond."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    @staticmethod
    def extra(record: logging.LogRecord) -> dict[str, object]:
        """What was passed as `extra`, in the order given."""
        return {k: v for k, v in vars(record).items() if k not in _STANDARD}


class KeyValueFormatter(Utc):
    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}"
        pairs = [f"{k}={quoted(v)}" for k, v in self.extra(record).items()]
        line = " ".join([head, *pairs])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(Utc):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(self.extra(record) | line, default=str)


FORMATTERS = {"text": KeyValueFormatter, "json": JsonFormatter}


def quoted(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else json.dumps(text)


def configure(level: str, form: str = "text") -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[form]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
