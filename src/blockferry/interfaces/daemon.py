"""The wiring: a service inside the caller's process, or a host process that serves it to everyone.

    python -m blockferry.interfaces.daemon --state-dir DIR [--window-seconds SECONDS] [--idle-exit SECONDS] [--ready-fd N]
        [--detach]

The order at the start matters: the lock, then the socket (who connects now waits), then recovery, then answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockferry.errors import BlockferryError, InternalError
from blockferry.hostprocess import (
    WINDOW_SECONDS,
    Lock,
    Ownership,
    StateDir,
    default_state_dir,
    default_storage_roots,
    prepare_state_dir,
)

if TYPE_CHECKING:
    from blockferry.client import Ferry
    from blockferry.interfaces.api.server import ApiServer
    from blockferry.service import Service

logger = logging.getLogger("blockferry.host")


async def open_service(
    state_dir: Path, window_seconds: float = WINDOW_SECONDS, storage_roots: Sequence[str] | None = None
) -> Service:
    """Wire the parts of a service. The caller owns the state directory.

    Args:
        state_dir: an absolute path.
        window_seconds: how long a guest may stand still before its window is left.
        storage_roots: the folders in which images may lie; None for those of BLOCKFERRY_STORAGE_ROOTS.

    Raises:
        StateDirUnusable: its journal can't be opened.
        BadRequest: a storage root is no absolute path.
    """
    from blockferry.service import Service

    roots = default_storage_roots() if storage_roots is None else tuple(storage_roots)
    return await Service.open(state_dir, window_seconds=window_seconds, storage_roots=roots)


@contextlib.asynccontextmanager
async def open_ferry(
    state_dir: str | os.PathLike[str] | None = None,
    *,
    window_seconds: float = WINDOW_SECONDS,
    storage_roots: Sequence[str] | None = None,
) -> AsyncIterator[Ferry]:
    """Open a service inside this process, which owns the state directory until the block ends.

    Recovery has run when the block begins. Public as `blockferry.open`.

    Args:
        state_dir: where state is kept; the default is the command's.
        window_seconds: how long a guest may stand still before a pivot, a finish or a reopen is left.
        storage_roots: absolute paths of the folders in which images may lie. None: those of BLOCKFERRY_STORAGE_ROOTS; none
            at all: images that callers name, and what is in or below their folders.

    Raises:
        BadRequest: a storage root is no absolute path.
        StateDirBusy: another process owns it; `blockferry.connect` talks to a host process.
        StateDirUnusable: it can't be made, read or trusted.
    """
    from blockferry.client import Ferry

    state = StateDir(state_dir or default_state_dir())
    prepare_state_dir(state)
    lock = Lock.take(state)
    try:
        service = await open_service(state.path, window_seconds, storage_roots)
        try:
            yield Ferry(service)
        finally:
            await service.close()
    finally:
        lock.release()


# --- the host process -----------------------------------------------------------------------------------------


class Announcement:
    """Says once, as a line of JSON, that the host process is ready, or why it isn't.

    Args:
        descriptor: where; None for nowhere.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __call__(self, message: dict[str, Any]) -> None:
        """Say it, and close the descriptor."""
        if self._descriptor is None:
            return
        with contextlib.suppress(BrokenPipeError):  # who asked did not wait
            os.write(self._descriptor, json.dumps({"version": 1, **message}).encode() + b"\n")
        if self._descriptor > 2:
            os.close(self._descriptor)
        self._descriptor = None


async def serve(
    state: StateDir,
    ownership: Ownership,
    idle_exit: float | None,
    announce: Announcement,
    *,
    window_seconds: float = WINDOW_SECONDS,
    storage_roots: Sequence[str] | None = None,
) -> None:
    """Open the service, say that it is ready, and serve it until a signal comes or nobody needs it any more.

    Args:
        state: a prepared state directory, owned by us.
        ownership: the proof of it.
        idle_exit: seconds without work and without a client after which to end; None for never.
        announce: told when it is ready.
        window_seconds: how long a guest may stand still.
        storage_roots: see `open_service`.
    """
    from blockferry.interfaces.api import Api
    from blockferry.interfaces.api.server import ApiServer

    service = await open_service(state.path, window_seconds, storage_roots)
    try:
        server = ApiServer(Api(service), before_end=ownership.withdraw)
        announce({"kind": "serving", "pid": os.getpid(), "socket": str(state.socket)})
        logger.info("serving socket=%s", state.socket)
        async with asyncio.TaskGroup() as tasks:
            idling = tasks.create_task(_end_when_idle(service, server, ownership, idle_exit))
            await server.serve(sockets=[ownership.listener])
            idling.cancel()
    finally:
        await service.close()
        logger.info("ended")


async def _end_when_idle(service: Service, server: ApiServer, ownership: Ownership, idle_exit: float | None) -> None:
    if idle_exit is None:
        return

    def idle() -> bool:
        return server.idle and not service.has_work()

    since, requests = time.monotonic(), server.requests
    while True:
        await asyncio.sleep(min(1.0, idle_exit / 4))
        if not idle() or server.requests != requests:
            since, requests = time.monotonic(), server.requests
        elif time.monotonic() - since >= idle_exit and ownership.withdraw(idle):
            logger.info("idle seconds=%g", idle_exit)
            server.end()
            return


def main(arguments: list[str] | None = None) -> int:
    """Be a host process; returns the exit status."""
    options = _parse(arguments)
    if options.detach:
        _detach()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    announce = Announcement(options.ready_fd)
    state = StateDir(options.state_dir)
    try:
        prepare_state_dir(state)
        ownership = Ownership.take(state)
        try:
            work = serve(
                state,
                ownership,
                options.idle_exit,
                announce,
                window_seconds=options.window_seconds,
                storage_roots=options.storage_root,
            )
            asyncio.run(work)
        finally:
            ownership.give_up()
    except BlockferryError as error:
        return _end_with(error, announce)
    except KeyboardInterrupt:  # before it served: recovery goes on at the next start
        return 130
    except Exception as error:
        logger.critical("bug", exc_info=True)
        return _end_with(InternalError(detail=f"{type(error).__name__}: {error}"), announce)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m blockferry.interfaces.daemon", description=__doc__)
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    parser.add_argument(
        "--window-seconds",
        type=_positive,
        metavar="SECONDS",
        default=os.environ.get("BLOCKFERRY_WINDOW_SECONDS") or str(WINDOW_SECONDS),
        help="how long a guest may stand still",
    )
    parser.add_argument("--idle-exit", type=float, metavar="SECONDS", help="end after that long without work")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="where to say that it is ready, as a line of JSON")
    parser.add_argument(
        "--storage-root", action="append", metavar="DIR", help="where images may lie; can be given again"
    )
    parser.add_argument("--detach", action="store_true", help="go on in a process of its own")
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time")
    return seconds


def _detach() -> None:
    """Go on in a process that nobody waits for; its starter (hostprocess) has made the session and the streams."""
    if os.fork():
        os._exit(0)
    os.chdir("/")


def _end_with(error: BlockferryError, announce: Announcement) -> int:
    announce({"kind": "error", "error": error.to_dict()})
    sys.stderr.write(f"blockferry: {error.message}\n")
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
