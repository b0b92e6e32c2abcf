"""Folders that are either the old one or the new one, never half of both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SaveError(RuntimeError):
    """A folder or file could not be written; what was there before is still there."""


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes ``target``'s place when the block ends well.

    A full disk or any other error removes the sibling and leaves ``target`` as it was. A kill between the two
    renames at the end leaves it under a name that starts with a dot; the next call puts it back.
    """
    target = Path(os.path.abspath(target))
    fresh = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise SaveError(f"could not write {target}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_file(target: Path, data: bytes) -> None:
    """Write ``data`` to ``target`` in one step: readers see the old bytes or the new ones."""
    fresh = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(data)
        _sync(fresh)
        fresh.replace(target)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise SaveError(f"could not write {target}: {error}; what was there before is untouched") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
