"""The HTTP server: uvicorn on a socket that is ours already, ended gracefully."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn

from blockferry.interfaces.api.app import Api

# What was submitted may go on for that long after a SIGTERM; systemd's own patience is 90 s.
DRAIN_SECONDS = 10


class ApiServer(uvicorn.Server):
    """Serves until `end`, or until SIGTERM or SIGINT.

    Args:
        api: what is served.
        before_end: called when a signal ends it, before anything else.
    """

    def __init__(self, api: Api, before_end: Callable[[], object]) -> None:
        # The plainest parts, named: what else is installed changes nothing.
        config = uvicorn.Config(
            api.app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        super().__init__(config)
        self._api = api
        self._before_end = before_end
        self._loop = asyncio.get_running_loop()
        self._drained = 0.0

    @property
    def idle(self) -> bool:
        """No client, and nothing that one left behind."""
        return not self.server_state.connections and not self._api.busy

    @property
    def requests(self) -> int:
        """How many have been answered."""
        return self.server_state.total_requests

    def end(self) -> None:
        """Answer what has been asked, end all streams, then end."""
        self._drained = time.monotonic() + DRAIN_SECONDS
        self._api.close()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        """A signal: uvicorn's own would raise it again at the end, and a graceful end is no death by signal."""
        self._loop.call_soon_threadsafe(self._signalled)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Let what was submitted come to its end, also where the client has left."""
        await super().shutdown(sockets)
        await self._api.drain(max(0.0, self._drained - time.monotonic()))

    def _signalled(self) -> None:
        if not self.should_exit:
            self._before_end()
            self.end()
