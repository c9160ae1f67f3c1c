"""Giving both sides of a comparison to read over NBD: nodes of a running QEMU, and chains that nobody has open.

QEMU has one NBD server. Ours listens in a folder that only we and QEMU can enter, so that nobody else reads the guest's
disks there. Whether a server that runs is ours is asked of its socket: what a process of ours that died has left in QEMU is
found and ended by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from blockferry.model.files import ImageFact
from blockferry.plan.copy import nbd_options
from blockferry.plan.destinations import is_uri
from blockferry.plan.plan import Names
from blockferry.plan.tracking import CHUNK
from blockferry.qemu.nbdclient import NbdClient, NbdFailed
from blockferry.qemu.nbdwire import ALLOCATION
from blockferry.qemu.paths import block_devices
from blockferry.qemu.session import CommandRefused, LostReply, Session

# An export ends when the requests that it has in hand are done; a storage that answers none of them holds it.
UNEXPORT_SECONDS = 30.0
# A killed qemu-nbd is gone at once, unless its storage holds it.
KILL_SECONDS = 5.0
_SOCKET = "qemu.sock"
# qemu-nbd takes a socket that listens already as systemd hands them over, sd_listen_fds(3): ours is its standard input.
# So it can be connected to before it runs, and, as it serves until its last client is gone, it outlives none of us.
_START = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 0</dev/null'


class ServingFailed(Exception):
    """A side can't be given to read, with the reason."""


def folder_of(names: Names) -> str:
    """The folder of the sockets of an operation's comparison."""
    return os.path.join(tempfile.gettempdir(), f"blockferry-{names.stem}")


# --- QEMU's side ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(session: Session, names: Names) -> AsyncIterator[str]:
    """Have QEMU serve NBD on a socket of ours, and give that folder; nothing of it is left afterwards.

    Raises:
        ServingFailed: QEMU serves somebody else, or has no server, or the folder can't be made.
        CommandRefused, LostReply: as of the session.
    """
    folder = folder_of(names)
    await end_serving(session, names)
    try:
        await asyncio.to_thread(_make, folder, session.pid)
        address = {"type": "unix", "data": {"path": os.path.join(folder, _SOCKET)}}
        try:
            await session.execute("nbd-server-start", addr=address)
        except CommandRefused as error:
            hint = ": `nbd-server-stop` ends it, if nobody needs it" if "already running" in error.words else ""
            raise ServingFailed(f"QEMU can't serve its disks to be read, {error.words}{hint}") from error
        yield folder
    finally:
        await end_serving(session, names)


async def end_serving(session: Session, names: Names) -> None:
    """End QEMU's NBD server with all of its exports if it is that of this operation's comparison; remove the folder.

    Raises:
        CommandRefused: as of the session. A connection that is lost is no error: there is nobody left to be asked.
    """
    folder = folder_of(names)
    if session.alive and await asyncio.to_thread(_listens, os.path.join(folder, _SOCKET), session.pid):
        with contextlib.suppress(LostReply):
            await session.execute("nbd-server-stop")
    if os.path.lexists(folder):
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _make(folder: str, pid: int | None) -> None:
    try:
        os.mkdir(folder, 0o700)
        if os.geteuid() == 0 and pid is not None:
            # It is QEMU that makes the socket, and it may run as somebody else.
            user, group = _user_of(pid)
            os.chown(folder, user, group)
    except OSError as error:
        raise ServingFailed(f"{folder} can't be made: {error.strerror}") from error


def _user_of(pid: int) -> tuple[int, int]:
    """The user and group that a process acts as (proc_pid_status(5)); the owner of its folder is root when it hides."""
    fields = dict(line.partition(":")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])


def _listens(path: str, pid: int | None) -> bool:
    """Whether that process listens on the socket; None is one that can't be told from others."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(1.0)
        try:
            link.connect(path)
        except OSError:
            return False
        credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return pid is None or struct.unpack("3i", credentials)[0] == pid


@contextlib.asynccontextmanager
async def exported(
    session: Session, folder: str, node: str, name: str, bitmap: str | None = None
) -> AsyncIterator[str]:
    """Export a node under a name, for reading, and give the socket; with the context of one of its bitmaps.

    The export goes where the node is: an iothread's stays that one's, and follows it.

    Raises:
        CommandRefused, LostReply: as of the session.
    """
    bitmaps = [bitmap] if bitmap is not None else []
    try:
        await session.execute("block-export-add", type="nbd", id=name, node_name=node, name=name, bitmaps=bitmaps)
        yield os.path.join(folder, _SOCKET)
    finally:
        with contextlib.suppress(LostReply):
            await _unexport(session, name)


async def _unexport(session: Session, name: str) -> None:
    async def gone() -> bool:
        exports = await session.execute("query-block-exports")
        return all(export["id"] != name for export in exports)

    if session.alive and not await gone():
        # Not nbd-server-stop: it waits for requests in hand, and the guest with it.
        await session.execute("block-export-del", id=name, mode="hard")
        await session.wait_until(
            gone, ("BLOCK_EXPORT_DELETED",), what=f"the end of export {name}", seconds=UNEXPORT_SECONDS
        )


async def _described(session: Session, node: str) -> dict[str, Any] | None:
    """A node as QEMU describes it, with its backing chain; None when it is gone."""
    nodes: list[dict[str, Any]] = await session.execute("query-named-block-nodes")
    return next((each for each in nodes if each["node-name"] == node), None)


async def bitmaps_of(session: Session, node: str) -> dict[str, dict[str, Any]]:
    """A node's dirty bitmaps by name, as QEMU describes them; of a node that is gone none."""
    found = await _described(session, node) or {}
    return {bitmap["name"]: bitmap for bitmap in found.get("dirty-bitmaps", ()) if "name" in bitmap}


@contextlib.asynccontextmanager
async def frozen(session: Session, node: str, bitmap: str, scratch: str, size: int) -> AsyncIterator[None]:
    """Keep what a bitmap counts now in one of the name `scratch`, on a node of that name that holds nothing.

    A node of its own: it has no iothread, and a bitmap that counts on can't be exported.

    A write is counted when it is done. The transaction waits for those that are under way (qmp_transaction drains), so
    what anybody has read before of a write is counted here.

    Raises:
        CommandRefused, LostReply: as of the session.
    """
    new = {"node": scratch, "name": scratch, "granularity": CHUNK, "disabled": True}
    merge = {"node": scratch, "target": scratch, "bitmaps": [{"node": node, "name": bitmap}]}
    await remove_node(session, scratch)
    try:
        await session.execute("blockdev-add", driver="null-co", node_name=scratch, size=size, read_zeroes=True)
        await session.execute(
            "transaction",
            actions=[
                {"type": "block-dirty-bitmap-add", "data": new},
                {"type": "block-dirty-bitmap-merge", "data": merge},
            ],
        )
        yield
    finally:
        with contextlib.suppress(LostReply):
            await remove_node(session, scratch)


async def remove_node(session: Session, node: str) -> None:
    """Close a node with its bitmaps; nothing where it is gone, or QEMU is."""
    if session.alive and await _described(session, node) is not None:
        await session.execute("blockdev-del", node_name=node)


async def can_export(session: Session) -> bool:
    """Whether a guest survives that its disks are exported.

    An export is where its node is. Until QEMU 9.0 a client's end is dealt with there too, and in an iothread QEMU aborts
    then (7.2.22, blockdev-nbd.c: "nbd_blockdev_client_closed: Assertion `qemu_in_main_thread()'"). Nothing in QMP says where a
    node is; without iothreads all are in the main thread.
    """
    major = session.version.partition(".")[0]
    return (major.isdecimal() and int(major) >= 9) or not await session.execute("query-iothreads")


async def images_of(session: Session, node: str) -> tuple[ImageFact, ...]:
    """The images of a node and what it stands on, top first, as QEMU has them open."""
    found = await _described(session, node)
    image: dict[str, Any] | None = found["image"] if found is not None else None
    facts: list[ImageFact] = []
    while image is not None:
        path = image["filename"]
        problem = None if path.startswith("/") or is_uri(path) else "it is no file, and no export"
        facts.append(ImageFact(path=path, format=image["format"], problem=problem))
        image = image.get("backing-image")
    devices = await block_devices(fact.path for fact in facts)
    return tuple(msgspec.structs.replace(fact, device=fact.path in devices) for fact in facts)


# --- the other side -------------------------------------------------------------------------------------------


class ClosedChain:
    """A chain that is served for reading by a qemu-nbd of ours.

    Attributes:
        socket: where it listens; there is one export, without a name.
        first: a client. It has to be kept: the server ends with its last one.
    """

    def __init__(self, process: asyncio.subprocess.Process, path: str) -> None:
        self._process = process
        self.socket = path
        self.first: NbdClient

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    async def connect(self, link: socket.socket) -> None:
        """Make the first client of a connection to it.

        Raises:
            ServingFailed: the chain can't be read, with qemu-nbd's own words.
        """
        try:
            self.first = await asyncio.to_thread(NbdClient, link, "", ALLOCATION)
        except NbdFailed as error:
            raise ServingFailed(f"qemu-nbd {await self.last_words() or error}") from error

    async def last_words(self) -> str | None:
        """How it ended, and what it said; None while it runs."""
        try:
            # It closes its connections a moment before it is gone.
            async with asyncio.timeout(1.0):
                status = await self._process.wait()
        except TimeoutError:
            return None
        said = await self._process.stderr.read() if self._process.stderr is not None else b""
        words = said.decode(errors="replace").strip().removeprefix("qemu-nbd: ")
        return f"has ended with status {status}{': ' if words else ''}{words}"

    async def end(self) -> None:
        """End it; it writes nothing, so nothing is lost."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await self._process.wait()


@contextlib.asynccontextmanager
async def closed(
    program: str, images: tuple[ImageFact, ...], path: str, *, shared: bool = False
) -> AsyncIterator[ClosedChain]:
    """Serve a chain that nobody writes, read-only, each image with the driver that is named.

    QEMU's locks hold here: an image that somebody writes is refused, unless it is to be `shared`.

    Args:
        program: qemu-nbd.
        images: the chain, top first.
        path: where its socket is to be.
        shared: read what somebody has open for writing. What is read is right where it was flushed, and not written since.

    Raises:
        ServingFailed: it can't be read, with the reason.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(link.close)
        options = chain_options(images) | ({"force-share": True} if shared else {})
        try:
            listener.bind(path)
            listener.listen()
            link.connect(path)
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _START, "sh", program),
                *("--read-only", "--shared=0", f"json:{json.dumps(options)}"),
                stdin=listener.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise ServingFailed(f"qemu-nbd can't be started: {error.strerror or error}") from error
        listener.close()  # it is the server's now: when that ends, nobody listens
        chain = ClosedChain(process, path)
        try:
            await chain.connect(link)
            with chain.first:
                yield chain
        finally:
            await chain.end()


def chain_options(images: tuple[ImageFact, ...]) -> dict[str, Any]:
    """QAPI BlockdevOptions of a closed chain, top first, that leave nothing to be probed or followed.

    Raises:
        ServingFailed: it is no chain of files, and no export, that can be read.
    """
    options: dict[str, Any] | None = None
    for image in reversed(images):
        if image.problem:
            raise ServingFailed(f"{image.path} can't be read: {image.problem}")
        file = _opened_by(image)
        if image.format == "qcow2":
            options = {"driver": "qcow2", "file": file, "backing": options}
        elif options is None:
            options = {"driver": image.format, "file": file}
        else:
            raise ServingFailed(f"{image.path} is {image.format}, and backs onto nothing")
    if options is None:
        raise ServingFailed("there is no image to be compared with")
    return options


def _opened_by(image: ImageFact) -> dict[str, Any]:
    if is_uri(image.path):
        return nbd_options(image.path)
    return {"driver": "host_device" if image.device else "file", "filename": image.path}
