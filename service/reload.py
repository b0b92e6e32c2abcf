"""New models without a restart: SIGHUP, or a changed model folder, loads them beside those that answer.

What changed is checked, opened, warmed up and self-tested as at the start, while the old models go on. Then all change
places in one step: a request that has its model keeps it to its end, and the old one's memory is given back after the
last of them. Anything wrong with the new folders leaves every old model where it was; the log, /info and
dsformer_reloads_total say why.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service import artifact, lifecycle, registry
from service.edge import log_failure
from service.errors import NotReady, StartError
from service.registry import Registry
from service.state import Service

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Reload:
    """The last one: `loaded`, `unchanged`, or what stood against it: `folder_refused`, `self_test_failed`, `error`."""

    result: str
    sentence: str
    unix_seconds: float


class Reloader:
    def __init__(self, service: Service, describe: Callable[[Registry], None]) -> None:
        """describe: told of the new models as they take over."""
        self._service = service
        self._describe = describe
        self._one = asyncio.Lock()
        self._asked = asyncio.Event()
        self.last: Reload | None = None

    def ask(self) -> None:
        """Reload soon. For signal handlers: returns at once."""
        self._asked.set()

    async def watch(self) -> None:
        """Reload when asked to, and when the folders have changed and then stay as they are for one look."""
        seconds = self._service.settings.reload_seconds
        loaded = seen = await asyncio.to_thread(fingerprint, self._service.settings.models)
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), seconds or None)
            found = await asyncio.to_thread(fingerprint, self._service.settings.models)
            still, seen = found == seen, found
            if self._asked.is_set() or (still and found != loaded):
                self._asked.clear()
                loaded = found
                await self.reload()

    async def reload(self) -> Reload:
        async with self._one:
            try:
                last = await self._reload()
            except StartError as error:
                last = self._ended("folder_refused", str(error))
            except NotReady as error:
                last = self._ended("self_test_failed", error.sentence)
            except Exception as error:
                log_failure(error, "reload")
                last = self._ended("error", "The reload failed; the log of the service holds the reason.")
        give_memory_back()
        return last

    async def _reload(self) -> Reload:
        service, old = self._service, self._service.models
        # A thread beside the pool for texts: loading takes seconds, and texts must not wait for it.
        new = await asyncio.to_thread(registry.load, service.settings, old)
        fresh = [model for model in new if model not in set(old)]
        if not fresh and len(set(new)) == len(set(old)):
            return self._ended("unchanged", "The model folders are those that are loaded.")
        for model in fresh:
            await lifecycle.warm_up(service.engine, model, service.settings.max_batch_tokens)
            service.metrics.tested(model, await lifecycle.self_test(service.engine, model))
        service.models = new
        self._describe(new)
        names = ", ".join(f"{model.artifact.name} {model.artifact.sha256[:12]}" for model in fresh) or "none"
        return self._ended("loaded", f"New models: {names}; {len(set(new))} answer now.")

    def _ended(self, result: str, sentence: str) -> Reload:
        self._service.metrics.reloaded(result)
        self.last = Reload(result, sentence, time.time())
        level = logging.INFO if result in ("loaded", "unchanged") else logging.ERROR
        log.log(level, "reload", extra={"result": result, "why": sentence})
        return self.last

    def info(self) -> dict[str, Any] | None:
        return None if self.last is None else asdict(self.last)


def fingerprint(root: Path) -> Fingerprint:
    """Size and time of every file that a reload would read, without reading any."""
    found = []
    with contextlib.suppress(StartError, OSError):
        for folder in artifact.find_folders(root):
            for name in artifact.FILES:
                with contextlib.suppress(OSError):
                    status = (folder / name).stat()
                    found.append((str(folder / name), status.st_size, status.st_mtime_ns))
    return tuple(found)


def give_memory_back() -> None:
    """What the old models held goes back to the system, not only to the allocator."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has this
        ctypes.CDLL(None).malloc_trim(0)
