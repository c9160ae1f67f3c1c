"""What the table of refusals is made of: where a row is asked, what is asked, and what has to be so meanwhile.

DIR in a path is the folder of the row's place.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import KIB, MIB, SIZE, Rig, wish_xml

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import NbdServer, TestQemu, make_image

PAGE = 4 * KIB
SLOW = 64 * KIB  # bytes per second: a job does not end while a row looks at it


@dataclass(eq=False)
class Place:
    """Where rows are asked.

    vm1 is the rig's guest; its sda is on a snapshot s1, and it has a read-only vdc and an empty hda. vm2 is another QEMU,
    whose vda is `other/top` on `other/base`. What a row offers lies in `offered`, which is emptied after each.
    """

    rig: Rig
    other: TestQemu | None = None
    operation: int = 0  # of the setting's move

    @property
    def path(self) -> Path:
        return self.rig.path

    @property
    def offered(self) -> Path:
        return self.path / "offered"

    def at(self, path: str) -> str:
        return path.replace("DIR", str(self.path))

    def all_at(self, more: dict[str, Any]) -> dict[str, Any]:
        return {name: self.at(value) if isinstance(value, str) else value for name, value in more.items()}


Asked = Callable[[Place], ask.Request]
Setting = Callable[[Place], AbstractAsyncContextManager[None]]


def run(*command: str | Path) -> str:
    """Run a program to its end; what it printed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


@contextlib.asynccontextmanager
async def as_it_is(_place: Place) -> AsyncIterator[None]:
    yield


@dataclass(frozen=True)
class Row:
    """One thing that is refused.

    Attributes:
        what: it in words, as in the docs.
        operation: of what.
        error: its class, which has the code and the exit status.
        says: what the message has in it, a regular expression.
        request: what is asked.
        setting: what has to be so meanwhile.
    """

    what: str
    operation: str
    error: type[errors.BlockferryError]
    says: str
    request: Asked
    setting: Setting = as_it_is

    @property
    def line(self) -> tuple[str, str, str, int]:
        """What it is, of which operation, and the error's code and exit status, as in the docs."""
        return self.what, self.operation, self.error.code, self.error.exit_status

    def __str__(self) -> str:
        return f"{self.operation}: {self.what}".replace("/", "_")


@dataclass(frozen=True, kw_only=True)
class Vanishing(Row):
    """A guest that is killed when the `nth` QMP command of that name is about to be sent; it has a place of its own."""

    command: str
    nth: int = 1


# --- requests -------------------------------------------------------------------------------------------------


def overlay(file: str | None = "DIR/offered/new", disk: str = "vda", flags: int = 0, **mirror: str) -> Asked:
    """A snapshot of one disk; `to`, `backing` and `backing_format` are its mirror's."""

    def asked(place: Place) -> ask.Request:
        more = {name: place.at(value) for name, value in mirror.items() if name != "to"}
        wish = DiskWish(
            name=place.at(disk),
            file=place.at(file) if file is not None else None,
            mirror=MirrorWish(file=place.at(mirror["to"]), **more) if mirror else None,
        )
        return ask.CreateSnapshot(
            domain="vm1", wish=SnapshotWish(name="new", disks=(wish,), only_these=True), flags=flags
        )

    return asked


def overlays(*files: tuple[str, str, str | None], flags: int = 0) -> Asked:
    """A snapshot of several disks: (disk, overlay, mirror)."""

    def asked(place: Place) -> ask.Request:
        disks = tuple(
            DiskWish(name=disk, file=place.at(file), mirror=MirrorWish(file=place.at(to)) if to else None)
            for disk, file, to in files
        )
        return ask.CreateSnapshot(
            domain="vm1", wish=SnapshotWish(name="new", disks=disks, only_these=True), flags=flags
        )

    return asked


def xml(*disks: str) -> Asked:
    return lambda place: ask.CreateSnapshot(domain="vm1", xml=wish_xml("new", *(place.at(disk) for disk in disks)))


def document(text: str, **more: Any) -> Asked:
    return lambda _place: ask.CreateSnapshot(domain="vm1", xml=text, **more)


def copy(dest: str = "DIR/offered/new", disk: str = "vda", **more: Any) -> Asked:
    def asked(place: Place) -> ask.Request:
        return ask.StartCopy(domain="vm1", disk=place.at(disk), dest=place.at(dest), **place.all_at(more))

    return asked


def move(dest: str = "DIR/offered", /, *disks: str, **more: Any) -> Asked:
    """A move of these disks (`vda`, or `vda=FILE`), or of all."""

    def asked(place: Place) -> ask.Request:
        named = {place.at(disk.partition("=")[0]): place.at(disk.partition("=")[2]) or None for disk in disks}
        return ask.MoveStorage(domain="vm1", dest=place.at(dest), disks=named, **more)

    return asked


def rebase(disk: str = "sda", **more: Any) -> Asked:
    return lambda place: ask.Rebase(domain="vm1", disk=disk, **place.all_at(more))


def commit(disk: str = "sda", **more: Any) -> Asked:
    return lambda place: ask.Commit(domain="vm1", disk=disk, **place.all_at(more))


def delete(snapshot: str, flags: int = 0) -> Asked:
    return lambda _place: ask.DeleteSnapshot(domain="vm1", snapshot=snapshot, flags=flags)


def attach(qmp: str, domain: str = "vm3", timeout: float = 0.3) -> Asked:
    return lambda place: ask.Attach(domain=domain, qmp=place.at(qmp), timeout=timeout)


# --- settings -------------------------------------------------------------------------------------------------


def made(make: Callable[[Place], object]) -> Setting:
    """Something that lies in `offered`."""

    @contextlib.asynccontextmanager
    async def setting(place: Place) -> AsyncIterator[None]:
        make(place)
        yield

    return setting


def image(name: str, fmt: str = "qcow2", size: int | None = SIZE, backing: str | None = None, **more: str) -> Setting:
    def make(place: Place) -> None:
        below = {"backing": Path(place.at(backing)), "backing_fmt": more["of"]} if backing else {}
        make_image(place.rig.qemu, place.offered / name, fmt, size, **below)

    return made(make)


@contextlib.asynccontextmanager
async def copying(place: Place, target: str = "vda") -> AsyncIterator[None]:
    """A copy of a disk works."""
    await place.rig.copy(target, place.offered / "running", bandwidth=SLOW)
    try:
        yield
    finally:
        await place.rig.ask(ask.CancelJobs(domain="vm1", disks=(target,)))


@contextlib.asynccontextmanager
async def moving(place: Place) -> AsyncIterator[None]:
    """A move of vda is under way."""
    begun = await place.rig.ask(move("DIR/offered", "vda=moving", bandwidth=SLOW, verify="none")(place))
    place.operation = begun.operation
    try:
        yield
    finally:
        await place.rig.ask(ask.CancelOperation(operation=begun.operation))


@contextlib.asynccontextmanager
async def given_up(place: Place) -> AsyncIterator[None]:
    """A move of vda was given up."""
    async with moving(place):
        pass
    yield


@contextlib.asynccontextmanager
async def mounted(folder: Path, *options: str) -> AsyncIterator[None]:
    """A tmpfs; as root, as all of the tests."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", *options, "blockferry-test", folder)
    try:
        yield
    finally:
        run("umount", folder)


def small(size: Callable[[Place], int]) -> Setting:
    """A file system of so many bytes at DIR/offered/small."""

    @contextlib.asynccontextmanager
    async def setting(place: Place) -> AsyncIterator[None]:
        async with mounted(place.offered / "small", "-o", f"size={size(place)}"):
            yield

    return setting


@contextlib.asynccontextmanager
async def read_only(place: Place) -> AsyncIterator[None]:
    """A file system that is mounted read-only, with a file `there` that could be an overlay of vda's image."""
    folder = place.offered / "ro"
    async with mounted(folder):
        there = folder / "there"
        make_image(place.rig.qemu, there, "qcow2", SIZE, backing=place.rig.source("vda"), backing_fmt="qcow2")
        make_image(place.rig.qemu, folder / "alone", "qcow2", SIZE)
        run("mount", "-o", "remount,ro", folder)
        yield


def listening(*words: bytes, close: bool = True) -> Setting:
    """Something at DIR/offered/sock that says this to whoever connects, again and again when it does not close."""

    @contextlib.asynccontextmanager
    async def setting(place: Place) -> AsyncIterator[None]:
        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                for word in words:
                    writer.write(word)
                while not close:
                    writer.write(words[-1])
                    await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(answer, place.offered / "sock")
        async with server:
            yield

    return setting


@contextlib.asynccontextmanager
async def within(place: Place) -> AsyncIterator[None]:
    """`serve --storage-root` for the guests' own images, each of them a root, and DIR/offered/inside, which has a way out."""
    rig = place.rig
    (place.offered / "inside").mkdir()
    (place.offered / "inside" / "way-out").symlink_to(place.offered)
    make_image(rig.qemu, place.offered / "there", "qcow2", SIZE, backing=rig.source("vda"), backing_fmt="qcow2")
    make_image(rig.qemu, place.offered / "alone", "qcow2", SIZE)
    roots = [path for path in place.path.iterdir() if path.is_file()]
    roots += [place.path / "other", place.offered / "inside"]
    await rig.service.close()
    rig.service = await Service.open(rig.path / "state", storage_roots=tuple(map(str, roots)))
    try:
        yield
    finally:
        await rig.reopen_service()


@contextlib.asynccontextmanager
async def storage_daemon(place: Place) -> AsyncIterator[None]:
    """It speaks QMP and has no guest."""
    program = place.rig.qemu.img.with_name("qemu-storage-daemon")
    pid = place.offered / "pid"
    chardev = f"socket,path={place.offered / 'sock'},server=on,wait=off,id=qmp"
    run(program, "--daemonize", "--pidfile", pid, "--chardev", chardev, "--monitor", "chardev=qmp")
    try:
        yield
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


@contextlib.asynccontextmanager
async def silent(place: Place) -> AsyncIterator[None]:
    """A socket that takes connections and says nothing, as a QMP socket that serves somebody else."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.offered / "sock"))
        listener.listen()
        yield


@contextlib.asynccontextmanager
async def loop(place: Place) -> AsyncIterator[None]:
    """A block device with a file system that is mounted; DIR/offered/loop leads to it."""
    backing, folder, link = place.offered / "backing", place.offered / "mounted", place.offered / "loop"
    with backing.open("wb") as file:
        file.truncate(MIB)
    run("mkfs.ext2", "-q", backing)
    folder.mkdir()
    device = run("losetup", "-f", "--show", backing)
    try:
        run("mount", device, folder)
        link.symlink_to(device)
        try:
            yield
        finally:
            run("umount", folder)
    finally:
        run("losetup", "-d", device)


def served(fmt: str = "raw", size: int = SIZE, **more: Any) -> Setting:
    """DIR/offered/image, and a qemu-nbd that has it open."""

    @contextlib.asynccontextmanager
    async def setting(place: Place) -> AsyncIterator[None]:
        path = make_image(place.rig.qemu, place.offered / "image", fmt, size)
        async with NbdServer(place.rig.qemu, path, "raw", place.offered, name="t", **more):
            yield

    return setting


@contextlib.asynccontextmanager
async def committing(place: Place) -> AsyncIterator[None]:
    """A commit of sda works."""
    await place.rig.write("sda", 0x5C, 0, SIZE)
    await place.rig.commit("sda", bandwidth=SLOW)
    try:
        yield
    finally:
        await place.rig.ask(ask.CancelJobs(domain="vm1", disks=("sda",)))


@contextlib.asynccontextmanager
async def replaced(place: Place) -> AsyncIterator[None]:
    """Another file lies where vdb's image was."""
    source, aside = place.rig.source("vdb"), place.path / "aside"
    source.rename(aside)
    source.write_bytes(bytes(SIZE))
    try:
        yield
    finally:
        aside.rename(source)


@contextlib.asynccontextmanager
async def two_ready(place: Place) -> AsyncIterator[None]:
    """Copies of vda and vdb are ready."""
    for target in ("vda", "vdb"):
        await place.rig.copy(target)
    await place.rig.ready("vda", "vdb")
    yield


@contextlib.asynccontextmanager
async def layered(place: Place) -> AsyncIterator[None]:
    """vda is on its second snapshot; what the layers hold is on disk, as it is when a guest has flushed."""
    await place.rig.layers(2, only=["vda"])
    for command in ("stop", "cont"):
        await place.rig.guest.command(command)
    yield


def deserted(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def linked(link: Path, to: Path) -> None:
    link.symlink_to(to)


def twins(place: Place) -> None:
    """One overlay under two names."""
    one = place.offered / "a"
    make_image(place.rig.qemu, one, "qcow2", SIZE, backing=place.rig.source("vda"), backing_fmt="qcow2")
    os.link(one, place.offered / "b")


def over(place: Place, name: str, backing: str, fmt: str | None) -> None:
    """An overlay whose header names any backing; qemu-img leaves no name without a format, so that is cut out."""
    path = place.offered / name
    run(place.rig.qemu.img, "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", fmt or "raw", path, str(SIZE))
    if fmt is None:
        contents = path.read_bytes()
        extension = contents.index(bytes.fromhex("e2792aca"))
        # The extension becomes one that nobody knows, and that may be left unread.
        path.write_bytes(contents[:extension] + bytes.fromhex("12345678") + contents[extension + 4 :])


def created(place: Place, name: str, options: str) -> None:
    run(place.rig.qemu.img, "create", "-q", "-f", "qcow2", "-o", options, place.offered / name, str(SIZE))


def marked(offset: int, byte: int) -> Callable[[Place], None]:
    """An image `o` whose header (docs/interop/qcow2.rst) has another byte there."""

    def make(place: Place) -> None:
        make_image(place.rig.qemu, place.offered / "o", "qcow2", SIZE)
        with (place.offered / "o").open("r+b") as file:
            file.seek(offset)
            file.write(bytes([byte]))

    return make


# The last byte of the encryption method, which becomes AES; and that of the incompatible features, bit 1.
encrypted, corrupt = marked(35, 1), marked(79, 2)
