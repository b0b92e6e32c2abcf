"""Rows of TSV, CSV and JSON Lines files and whole JSON files, each plain or gzip.

Whatever is wrong with one becomes a `DataError`: a sentence with file and line. TSV has no quoting: one line a
row, fields split by one tab; CSV is quoted as usual. The first row of both names the columns.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

# Where a row stands ("train.tsv, line 7") and its fields.
Row: TypeAlias = tuple[str, Mapping[str, Any]]


class DataError(ValueError):
    """A data file cannot be used; the message says which, where and why."""


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a TSV, CSV or JSON Lines file, told apart by the suffix (before .gz)."""
    readers = {".tsv": _tsv_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise DataError(f"{file}: the name must end in {', '.join(readers)} (and perhaps .gz).")
    n_rows = 0
    for row in readers[suffix](file):
        n_rows += 1
        yield row
    if not n_rows:
        raise DataError(f"{file}: the file holds no rows.")


def _lines(file: Path, newline: str) -> Iterator[str]:
    """Decoded lines with their line ends; every way of failing to read is a DataError."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline=newline) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _tsv_rows(file: Path) -> Iterator[Row]:
    # newline="\n": sentences may hold other characters that Python would take for line ends.
    fields = ((line.rstrip("\r\n").split("\t")) for line in _lines(file, "\n"))
    return _table_rows(file, enumerate(fields, start=1))


def _csv_rows(file: Path) -> Iterator[Row]:
    reader = csv.reader(_lines(file, ""), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        try:
            for fields in reader:
                yield reader.line_num, fields
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}: not CSV ({error}).") from error

    return _table_rows(file, numbered())


def _table_rows(file: Path, numbered_fields: Iterable[tuple[int, list[str]]]) -> Iterator[Row]:
    header: list[str] | None = None
    for number, fields in numbered_fields:
        where = f"{file}, line {number}"
        if not any(text.strip() for text in fields):
            raise DataError(f"{where}: the row is empty.")
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise DataError(f"{where}: a column name occurs twice in {', '.join(header)}.")
            continue
        if len(fields) != len(header):
            raise DataError(f"{where}: {len(fields)} fields, but the header has {len(header)} columns.")
        yield where, dict(zip(header, fields, strict=True))


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, "\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            raise DataError(f"{where}: the row is empty.")
        row = _parse_json(where, line)
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object.")
        yield where, row


def read_json(file: Path) -> Any:
    text = "".join(_lines(file, ""))
    if not text.strip():
        raise DataError(f"{file}: the file is empty.")
    return _parse_json(str(file), text)


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).") from error
