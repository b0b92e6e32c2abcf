"""The uvicorn server, taught to end well: signals, grace, drain, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import signal
import socket
import struct
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.admission import MAX_RETRY_SECONDS
from service.errors import Draining
from service.state import Service

log = logging.getLogger(__name__)

# Time for requests that are on their way when the socket stops listening: over connections that had one before, and
# over new ones, whose first request must be coming.
LINGER_SECONDS = 0.3
LINGER_NEW_SECONDS = 3.0
# Beyond the drain's own deadline, for its answers to be sent.
MARGIN_SECONDS = 6
# A connection is kept for longer than any client is told to wait: one that is closed just when its client comes back
# loses that request.
KEEP_ALIVE_SECONDS = MAX_RETRY_SECONDS + 15


# Linux, include/uapi: the option, and a program of one instruction (BPF_RET | BPF_K) that keeps no byte of any packet.
SO_ATTACH_FILTER = 26
KEEP_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)


def make_no_more(listener: socket.socket) -> None:
    """Let the kernel make no connection any more: one that it made between the last `accept` and `close` would break.

    Who comes now tries again, as TCP does, and is then told that nobody listens. Only Linux can do this.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(KEEP_NOTHING)
    with contextlib.suppress(OSError):  # some sandboxes have no filters
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


class Server(uvicorn.Server):  # type: ignore[misc]
    """Returns from `run` after SIGTERM or SIGINT, once what was accepted has been answered."""

    def __init__(self, app: FastAPI) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            # With uvloop 8 clients got a tenth to a third fewer answers a second; one alone waited as long or longer.
            loop="asyncio",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + MARGIN_SECONDS,
        )
        super().__init__(config)
        self._drain_task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._service.end = self._end
        with contextlib.suppress(AttributeError, RuntimeError):  # not everywhere, not in every thread
            self._loop.add_signal_handler(signal.SIGHUP, self._service.reloader.ask)
        await super().serve(sockets)
        if self._drain_task:
            self._drain_task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between two steps of the event loop. The first signal drains; a second one ends at once."""
        if self._service.lifecycle.draining or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
            return
        log.info("draining", extra={"signal": signal.Signals(sig).name})
        self._service.lifecycle.draining = True
        # A person at the keyboard has no load balancer to wait for.
        grace = 0.0 if sig == signal.SIGINT else self._service.settings.grace_seconds
        self._loop.call_soon_threadsafe(self._begin_drain, grace)

    def _begin_drain(self, grace: float) -> None:
        self._drain_task = asyncio.get_running_loop().create_task(self._drain(grace))

    async def _drain(self, grace: float) -> None:
        await asyncio.sleep(grace)
        self.should_exit = True
        await asyncio.sleep(LINGER_SECONDS + LINGER_NEW_SECONDS + self._service.settings.drain_seconds)
        self._service.lifecycle.closed = True
        self._service.engine.fail_all(Draining("The service is ending and had no time left for this request."))

    def _end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.lifecycle.draining = True
        for server in self.servers:
            listeners = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
            server.close()
            for listener in listeners:
                await self._accept_rest(listener)
        await asyncio.sleep(LINGER_SECONDS)
        deadline = asyncio.get_running_loop().time() + LINGER_NEW_SECONDS
        while self._has_new_connections() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(LINGER_SECONDS / 10)
        await super().shutdown(sockets)

    def _has_new_connections(self) -> bool:
        """Whether over some connection no request has come yet."""
        return any(getattr(connection, "cycle", None) is None for connection in self.server_state.connections)

    async def _accept_rest(self, listener: socket.socket) -> None:
        """Take the connections that the kernel has made already: closing the socket would break them unanswered.

        All of them, and no later ones: whoever is answered before the socket is closed may come back at once, and
        again, and the service would never end.
        """
        waiting = []
        make_no_more(listener)
        listener.setblocking(False)
        with listener, contextlib.suppress(OSError):  # BlockingIOError: nobody waits
            for _ in range(self.config.backlog + 1):
                waiting.append(listener.accept()[0])
        loop = asyncio.get_running_loop()
        for connection in waiting:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        kind = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )
        return protocol
