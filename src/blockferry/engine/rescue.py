"""A window that takes too long because QEMU waits for an NBD server that says nothing, and the guest with it.

Out of band `yank` ends QEMU's connection to that server: what waits for it fails, and the window is left as any other is.
docs/adr/0014-servers-that-hang.md has what was tried, and why `yank` alone is not enough on Unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from blockferry.plan.copy import nbd_options
from blockferry.plan.destinations import is_uri
from blockferry.plan.plan import Window
from blockferry.qemu.bounded import bounded
from blockferry.qemu.nbd import flushes
from blockferry.qemu.process import is_stopped
from blockferry.qemu.session import CommandRefused, LostReply, Session
from blockferry.qemu.stuck import widen

# So much of the window's time is left for bringing the guest back; that took 20 to 60 ms.
SHARE = 0.6
# A server that works greets within milliseconds; several are asked at the same time.
LOOK_SECONDS = 0.2
YANK_SECONDS = 0.5


class Rescue:
    """Watches over one window, from `begin` to `end`.

    Args:
        session: gives the present connection to QEMU, if there is one.
        pid: QEMU's process.
        window: what was planned.
        seconds: how long the guest may stand still.

    Attributes:
        dead: target -> why, of the disks whose connections were ended.
    """

    def __init__(
        self, session: Callable[[], Session | None], pid: int | None, window: Window | None, seconds: float
    ) -> None:
        self._session = session
        self._pid = pid
        self._seconds = seconds * SHARE
        disks = window.disks if window is not None else ()
        self._mirrors = {disk.target: disk.mirror for disk in disks if is_uri(disk.mirror.file)}
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self.dead: dict[str, str] = {}

    def begin(self) -> None:
        """The guest may stand still from now on."""
        if self._mirrors and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._time_is_up)

    def end(self) -> None:
        """It has what it was to have, or runs again: what is in `dead` by now was left."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    @property
    def words(self) -> str:
        """Which destinations were left, and why."""
        return "; ".join(f"the destination of {target}: {why}" for target, why in self.dead.items())

    def _time_is_up(self) -> None:
        # A QEMU that is stopped itself would only lose its mirrors.
        if self._pid is not None and not is_stopped(self._pid):
            self._task = asyncio.create_task(self.free())

    async def settled(self) -> None:
        """Wait until what has been begun to free the guest is done."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def free(self) -> None:
        """End the connections to those servers that say nothing; to all, if all of them speak."""
        if not self._mirrors:
            return
        answers = await asyncio.gather(*(flushes(mirror.file, LOOK_SECONDS) for mirror in self._mirrors.values()))
        silent = [target for target, words in zip(self._mirrors, answers, strict=True) if words] or list(self._mirrors)
        for target in silent:
            server = self._mirrors[target].file
            self.dead[target] = f"{server} did not answer within {self._seconds:.2g} s, and was left"
        asked = await self._yank([self._mirrors[target].file_node for target in silent])
        servers = {nbd_options(self._mirrors[target].file)["server"].get("path") for target in silent} - {None}
        if self._pid is not None and servers:
            with contextlib.suppress(TimeoutError):
                await bounded(YANK_SECONDS, widen, self._pid, servers, shut=not asked)

    async def _yank(self, nodes: list[str]) -> bool:
        """Whether QEMU has ended its connections to these."""
        session = self._session()
        if session is None or not session.alive:
            return False
        instances = [{"type": "block-node", "node-name": node} for node in nodes]
        try:
            await session.execute_oob("yank", YANK_SECONDS, instances=instances)
        except CommandRefused:
            return True  # there is no such connection any more
        except (LostReply, TimeoutError):
            return False
        return True
