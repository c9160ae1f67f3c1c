"""A guest with three disks, a state directory, and whatever can go wrong with them: what a case is tried on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from blockferry.journal.journal import Journal
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import (
    FaultyNbdServer,
    QemuBinaries,
    QemuVersion,
    QmpFaultProxy,
    TestQemu,
    blockdev_disk,
    find_qemu,
    legacy_drive,
    make_image,
    write_pattern,
)
from blockferry.testing.crash import WORK_SECONDS, Accident, Crasher, moving
from blockferry.testing.firmware import idle_firmware
from blockferry.testing.guest import WritingGuest
from blockferry.testing.pen import RECORD_BYTES, RECORDS_AT, SLOTS, Monitor, Pen, PenPlan, Records, listener, read_log
from blockferry.testing.process import socket_path
from blockferry.testing.sick import heal, sick_storage

MIB = 1 << 20
SIZE = RECORDS_AT + SLOTS * RECORD_BYTES
TARGETS = ("vda", "vdb", "sda")
FORMATS = {"vda": "qcow2", "vdb": "raw", "sda": "qcow2"}
QDEVS = {
    "vda": "/machine/peripheral/da-dev/virtio-backend",
    "vdb": "/machine/peripheral-anon/device[0]/virtio-backend",
    "sda": "da2-dev",
}
OWN_QDEVS = {target: f"/machine/peripheral/disk-{target}/virtio-backend" for target in ("vda", "vdb")} | {
    "sda": "disk-sda"
}
# The image behind the server, how its URI looks, and how long each write to it takes.
SERVED = "dst/served.img"
EXPORT = re.compile(r"nbd\+unix:///(\w+)\?socket=(.+)")
WRITE_DELAY = "2ms"
SICK = "sick"  # the page that says what fails
OURS = "bf"  # how the names of our nodes begin


@dataclass(frozen=True)
class Stage:
    """What all cases of a QEMU version share: its programs, a process that has accidents, the images to begin with."""

    version: QemuVersion
    binaries: QemuBinaries
    crasher: Crasher
    template: Path

    @classmethod
    @contextlib.contextmanager
    def open(cls, version: QemuVersion, folder: Path) -> Iterator[Stage]:
        """Make the images, with a pattern of its own in each; what is started from here on has storage that can fail."""
        binaries = find_qemu(version)
        environment = sick_storage(folder / SICK) | {"BLOCKFERRY_QEMU_DIR": str(binaries.system.parent)}
        with mock.patch.dict(os.environ, environment), Crasher() as crasher:
            for target, byte in zip(TARGETS, (0x61, 0x62, 0x63), strict=True):
                image = make_image(binaries, folder / f"{target}.img", FORMATS[target], SIZE)
                write_pattern(binaries, image, FORMATS[target], 0, MIB, byte)
            yield cls(version, binaries, crasher, folder)

    def heal(self) -> None:
        """Let storage fail no more."""
        heal(self.template / SICK)


@dataclass(eq=False)
class World:
    """Where a case plays.

    Attributes:
        stage: its QEMU's.
        folder: with `src/` (the disks), `dst/` and `state/`.
        qemu: the guest; another one once it was killed and started again. One that blockferry starts is an OwnQemu.
        proxy: between the service and it, when that is wanted.
        qmp: the socket that the service is given.
        contents: what the disks hold beside records, by target.
        guest: the Linux that writes by itself; without one a pen writes.
        server: of the export that disks are copied to, where they are.
        server_was_gone: whether it was killed, before it was healed.
    """

    stage: Stage
    folder: Path
    qemu: TestQemu | OwnQemu
    proxy: QmpFaultProxy
    qmp: Path
    contents: dict[str, bytearray] = field(default_factory=dict, repr=False)
    guest: WritingGuest | None = None
    server: FaultyNbdServer | None = None
    server_was_gone: bool = False

    @property
    def export(self) -> str:
        """The server's URI."""
        assert self.server is not None
        return self.server.uri

    def server_accident(self, how: str, at: int) -> Accident:
        """It fails writes (`fail`), holds requests (`hold`), or dies (`die`) at that boundary."""
        assert self.server is not None
        match how:
            case "fail":
                return Accident(at=at, what="create", target=str(self.server.failing))
            case "hold":
                return Accident(at=at, what="hold", target=str(self.server.pause))
        return Accident(at=at, what="kill", target=str(self.server.pid))

    async def end(self) -> None:
        """End QEMU."""
        await self.qemu.stop()

    async def heal(self) -> None:
        """Have the server serve again, whatever it had; nobody may have been left on one that was gone."""
        self.server_was_gone = self.server is not None and await self.server.revive()
        if self.server_was_gone and self.qemu.alive:
            drives = await self.command("query-block")
            on = [drive["qdev"] for drive in drives if drive["inserted"]["image"]["filename"].startswith("nbd")]
            assert not on, f"{on} went over to a server that was gone"

    async def notice(self) -> None:
        """Have the guest write to each disk: a mirror whose server was killed notices by that, sooner or later by itself."""
        plan = self.pen()
        assert plan is not None
        pen = Pen(plan)
        for _target in TARGETS:
            pen.write()
        pen.close()
        async with asyncio.timeout(WORK_SECONDS):
            while any(
                "-vda-" in job["id"] and job["status"] != "concluded" for job in await self.command("query-jobs")
            ):
                pass

    def file_of(self, image: str) -> Path:
        """Where an image is for whoever reads it here: behind the server, of an export."""
        return self.folder / SERVED if image.startswith("nbd") else Path(image)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        return self.folder / "records"

    def pen(self, every: int = 4, first: int = 0) -> PenPlan | None:
        """What the guest is to write meanwhile, unless it does by itself; see PenPlan."""
        if self.guest is not None:
            return None
        disks = OWN_QDEVS if isinstance(self.qemu, OwnQemu) else QDEVS
        return PenPlan(monitor=str(self.qemu.sockets["pen"]), disks=disks, log=str(self.log), every=every, first=first)

    def records(self) -> dict[str, Records]:
        return read_log(self.log, TARGETS)

    def source(self, target: str) -> Path:
        return self.folder / "src" / f"{target}.img"

    def dest(self, name: str) -> str:
        return str(self.folder / "dst" / name)

    def files(self) -> set[str]:
        """All images there are."""
        return {str(path) for part in ("src", "dst") for path in (self.folder / part).iterdir()}

    async def start_again(self, images: dict[str, tuple[str, str]]) -> None:
        """Start the guest anew, after it was killed, on these images: its sockets are where they were."""
        await self.qemu.stop()
        self.qemu = guest(self.stage, self.folder, images)
        await self.qemu.start()

    def tell_whose(self) -> None:
        """Have the journal know QEMU's process, which nobody sees behind a proxy: that it is gone is all that it is told.

        A guest behind a proxy is not killed by a case, and QEMU 7.2 may crash by itself when its storage fails.
        """
        assert isinstance(self.qemu, TestQemu)
        with contextlib.closing(Journal(self.state_dir / "journal.sqlite")) as journal:
            record = journal.domain("vm")
            assert record is not None
            journal.put_domain(msgspec.structs.replace(record, pid=self.qemu.process.pid, born=0))

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Ask QEMU, beside the code under test."""
        return await self.qemu.command(name, arguments)


@dataclass(frozen=True)
class OwnQemu:
    """The QEMU of a guest that blockferry starts, as far as a case deals with it; `sockets` are named in its definition."""

    sockets: dict[str, Path]

    @property
    def alive(self) -> bool:
        return listener(str(self.sockets["control"])) is not None

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        monitor = Monitor(str(self.sockets["control"]))
        try:
            return monitor.ask(name, arguments)
        finally:
            monitor.close()

    async def stop(self) -> None:
        """Kill it, if it runs, and wait until it is gone."""
        pid = listener(str(self.sockets["control"]))
        if pid is not None:
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            await asyncio.to_thread(select.select, [process], [], [])
            os.close(process)


def definition(folder: Path, sockets: dict[str, Path]) -> str:
    """The three disks as libvirt's XML, with the sockets of the case's own."""
    bus = {"vda": "virtio", "vdb": "virtio", "sda": "scsi"}
    disks = "".join(
        f"<disk type='file'><driver name='qemu' type='{FORMATS[target]}'/><source file='{folder}/src/{target}.img'/>"
        f"<target dev='{target}' bus='{bus[target]}'/></disk>"
        for target in TARGETS
    )
    more = "".join(
        f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{path},server=on,wait=off'/>" for path in sockets.values()
    )
    return (
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>vm</name>"
        "<memory unit='MiB'>16</memory><os><type arch='x86_64' machine='pc'>hvm</type>"
        f"<loader type='rom'>{idle_firmware(folder)}</loader></os><features><acpi/></features>"
        f"<devices><controller type='scsi' index='0' model='virtio-scsi'/>{disks}</devices>"
        f"<qemu:commandline>{more}</qemu:commandline></domain>"
    )


def disk_arguments(files: Mapping[str, tuple[Path | str, str]]) -> list[str]:
    """Virtio with an iothread, a drive that nobody named, scsi with an iothread."""
    paths = {target: (Path(file), fmt) for target, (file, fmt) in files.items()}
    first = blockdev_disk("da", *paths["vda"], iothread="io0")
    if (found := EXPORT.fullmatch(str(files["vda"][0]))) is not None:
        node = next(index for index, word in enumerate(first) if '"da-file"' in word)
        server = {"type": "unix", "path": found[2]}
        first[node] = json.dumps({"driver": "nbd", "node-name": "da-file", "export": found[1], "server": server})
    return [
        *first,
        *legacy_drive(*paths["vdb"]),
        *blockdev_disk("da2", *paths["sda"], bus="scsi", iothread="io1"),
    ]


def guest(stage: Stage, folder: Path, files: Mapping[str, tuple[Path | str, str]]) -> TestQemu:
    """A QEMU on these images that runs, with a socket for the service and one for the pen."""
    return TestQemu(
        stage.binaries, folder, args=disk_arguments(files), paused=False, memory_mib=16, sockets=("qmp", "pen")
    )


@contextlib.asynccontextmanager
async def open_world(
    stage: Stage, folder: Path, *, proxied: bool = True, defined: bool = False, served: bool = False
) -> AsyncIterator[World]:
    """Fresh images; and a guest on them that runs and nobody is attached to, unless blockferry is to start it.

    `served`: there is a server to copy to.
    """
    for part in ("src", "dst"):
        (folder / part).mkdir(parents=True)
    (folder / "state").mkdir(mode=0o700)
    contents = {}
    for target in TARGETS:
        shutil.copy(stage.template / f"{target}.img", folder / "src")
        contents[target] = bytearray(SIZE)
        contents[target][:MIB] = bytes([0x61 + TARGETS.index(target)]) * MIB
    qemu: TestQemu | OwnQemu
    if defined:
        qemu = OwnQemu({name: socket_path(folder / f"{name}.sock") for name in ("pen", "control")})
        qmp = folder / "state/run/domains/vm/qmp.sock"
    else:
        qemu = guest(stage, folder, {target: (folder / "src" / f"{target}.img", FORMATS[target]) for target in TARGETS})
        await qemu.start()
        qmp = qemu.qmp
    proxy = QmpFaultProxy(qmp, folder / "proxy.sock")
    where = proxy.path if proxied and not defined else qmp
    world = World(stage=stage, folder=folder, qemu=qemu, proxy=proxy, qmp=where, contents=contents)
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(proxy)
            if served:
                image = make_image(stage.binaries, folder / SERVED, "raw", SIZE)
                world.server = FaultyNbdServer(stage.binaries, image, folder, name="t", wdelay=WRITE_DELAY)
                await stack.enter_async_context(world.server)
                stack.push_async_callback(world.end)  # which its server waits for
            yield world
    finally:
        await world.qemu.stop()


@contextlib.asynccontextmanager
async def serving(world: World) -> AsyncIterator[Service]:
    """The state directory, opened: what was interrupted is settled by that."""
    service = await Service.open(world.state_dir)
    try:
        yield service
    finally:
        await service.close()


async def worked_out(service: Service) -> None:
    """Until no job works that ends by itself; what does not end in time, behind a proxy say, is the verdict's affair."""
    last = await service.submit(ask.ListEvents(since=2**62))
    assert isinstance(last, view.EventList)
    if not await running(service):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WORK_SECONDS):
            async for _event in service.watch("vm", last.last):
                if not await running(service):
                    return


async def running(service: Service) -> bool:
    jobs = await service.submit(ask.ListJobs(domain="vm"))
    assert isinstance(jobs, view.JobList)
    return any(job.state == "running" for job in jobs.jobs) or await moving(service)


@contextlib.contextmanager
def playground(otherwise: Path) -> Iterator[Path]:
    """A folder to play in: in memory where there is enough of it, since a sync costs nothing there. Kept after an error."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if fits else otherwise))
    try:
        yield folder
    except BaseException as error:
        kept = folder
        if fits:
            # Not moved: a socket can't be copied to another file system.
            kept = shutil.copytree(
                folder, otherwise / folder.name, symlinks=True, ignore=shutil.ignore_patterns("*.sock")
            )
            shutil.rmtree(folder)
        error.add_note(f"what it left is in {kept}")
        raise
    shutil.rmtree(folder)


def read_image(stage: Stage, path: Path, fmt: str, to: Path) -> bytes:
    """What a guest would read of an image, chain and all, that nobody has open."""
    if fmt == "raw":
        return path.read_bytes()
    subprocess.run(
        [stage.binaries.img, "convert", "-f", fmt, "-O", "raw", path, to], check=True, capture_output=True, timeout=60
    )
    try:
        return to.read_bytes()
    finally:
        to.unlink()
