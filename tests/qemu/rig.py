"""A real guest with three disks of different kinds, the service on it, and a model of what the guest has written.

Of other disks: `open_guest`, as test_guests.py does.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotCreate
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish
from blockferry.service import Service
from blockferry.testing import (
    NbdServer,
    QemuBinaries,
    QmpFaultProxy,
    TestQemu,
    blockdev_disk,
    image_sha256,
    legacy_drive,
    make_image,
    qemu_version,
    write_pattern,
)

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
EVENT_TIMEOUT_S = 10.0  # what is waited for comes within milliseconds
ALL = ("vda", "vdb", "sda")
FORMATS = {"vda": "qcow2", "vdb": "raw", "sda": "qcow2"}
OURS = re.compile(r"bf[0-9a-f]{4}-")


@dataclass(frozen=True)
class State:
    """What a failed operation has to leave as it was."""

    chains: dict[str, tuple[tuple[str, str], ...]]
    xml: str | None
    jobs: tuple[str, ...]
    files: frozenset[str]
    status: str


@dataclass(eq=False)
class Rig:
    """vda: virtio, -blockdev, qcow2, iothread. vdb: a legacy -drive, raw. sda: scsi, -blockdev, qcow2, iothread."""

    qemu: QemuBinaries
    path: Path
    guest: TestQemu
    service: Service
    proxy: QmpFaultProxy | None
    # asyncio writes out what its tasks return when it looks at the handler of SIGINT: twice a test, 24 MiB.
    written: dict[str, bytearray] = field(repr=False)
    qdevs: Mapping[str, str]  # by target, what query-block calls the device
    pauses: EventListener = field(default_factory=lambda: EventListener(("STOP", "RESUME")))
    iothreads: bool = True

    # --- asking -----------------------------------------------------------------------------------------------

    async def ask(self, request: ask.Request) -> Any:
        return await self.service.submit(request)

    async def show(self) -> view.DomainView:
        return await self.ask(ask.ShowDomain(domain="vm1"))

    async def disks(self) -> dict[str, view.DiskView]:
        return {disk.target: disk for disk in (await self.show()).disks}

    async def chain(self, target: str) -> list[str]:
        return [image.file for image in (await self.disks())[target].chain]

    async def jobs(self) -> dict[str, view.JobView]:
        return {job.disk: job for job in (await self.ask(ask.ListJobs(domain="vm1"))).jobs}

    async def states(self) -> dict[str, str]:
        return {target: job.state for target, job in (await self.jobs()).items()}

    async def operation(self, number: int) -> view.OperationView:
        return await self.ask(ask.ShowOperation(operation=number))

    async def operations(self) -> list[tuple[str, str]]:
        return [(each.what, each.state) for each in (await self.ask(ask.ListOperations())).operations]

    async def events(self, kind: str) -> list[view.Event]:
        """The recorded events of that type."""
        return [event for event in (await self.ask(ask.ListEvents())).events if event.type == kind]

    async def heard(self, kind: str, disk: str | None = None) -> view.Event:
        """Wait for an event; one that is recorded already will do."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            async for event in self.service.watch("vm1", 0):
                if event.type == kind and disk in (None, event.disk):
                    return event
        raise AssertionError(f"no {kind} before the end")

    async def snapshot(
        self,
        name: str | None = "s1",
        mirrors: Sequence[str] = (),
        *,
        only: Sequence[str] = ALL,
        folder: Path | None = None,
        backing: dict[str, Path] | None = None,
    ) -> view.SnapshotView:
        """A snapshot of disks, some mirrored to DIR/dst/TARGET.NAME."""
        wish = SnapshotWish(
            name=name,
            only_these=True,
            disks=tuple(
                DiskWish(
                    name=target,
                    file=str((folder or self.path) / f"{target}.{name}"),
                    mirror=MirrorWish(
                        file=str(self.dst / f"{target}.{name}"),
                        backing=str(backing[target]) if backing else None,
                        backing_format=FORMATS[target] if backing else None,
                    )
                    if target in mirrors
                    else None,
                )
                for target in only
            ),
        )
        return await self.ask(ask.CreateSnapshot(domain="vm1", wish=wish, flags=SnapshotCreate.ATOMIC))

    async def copy(self, target: str, dest: Path | str | None = None, **more: Any) -> view.JobView:
        """Start a copy, to DIR/dst/TARGET.copy unless told."""
        return await self.ask(ask.StartCopy(domain="vm1", disk=target, dest=str(dest or self.dest(target)), **more))

    async def commit(self, target: str, **more: Any) -> view.JobView:
        return await self.ask(ask.Commit(domain="vm1", disk=target, **more))

    async def rebase(self, target: str, **more: Any) -> view.JobView:
        return await self.ask(ask.Rebase(domain="vm1", disk=target, **more))

    async def ended(self, target: str) -> view.JobView:
        """Wait until the job of a disk works no more and all that follows it has been done."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            async for _event in self.service.watch("vm1", 0):
                job = (await self.jobs())[target]
                if job.state not in ("running", "copying", "ready"):
                    await self.settled()
                    return job
        raise AssertionError(f"the job of {target} did not end")

    async def layers(self, count: int, *, only: Sequence[str] = ALL) -> None:
        """Take snapshots s1, s2..., and write to each layer of each disk: at a place of its own, and over all others'."""
        for number in range(1, count + 1):
            await self.snapshot(f"s{number}", only=only)
            for target in only:
                await self.write(target, 0xA0 + number, number * 512 * KIB)
                await self.write(target, 0xB0 + number, 7 * MIB)

    def layer(self, target: str, number: int) -> str:
        """The image of snapshot number `number`; 0 is the bottom."""
        return str(self.path / f"{target}.s{number}") if number else str(self.source(target))

    async def snapshots(self) -> dict[str, view.SnapshotView]:
        return {each.name: each for each in (await self.ask(ask.ListSnapshots(domain="vm1"))).snapshots}

    async def pivot(self, *targets: str, timeout: float = 20.0) -> view.Done:
        return await self.ask(ask.PivotJobs(domain="vm1", disks=targets, timeout=timeout))

    async def finish(self, *targets: str, timeout: float = 20.0) -> view.Done:
        return await self.ask(ask.FinishJobs(domain="vm1", disks=targets, timeout=timeout))

    async def delete(self, name: str, flags: int, timeout: float = 20.0) -> view.Done:
        return await self.ask(ask.DeleteSnapshot(domain="vm1", snapshot=name, flags=flags, timeout=timeout))

    async def reopen_service(self) -> None:
        """End the service and start one on the same state directory."""
        await self.service.close()
        self.service = await Service.open(self.path / "state")

    async def settled(self) -> None:
        """Wait until the service has done with what it had to do by itself."""
        await self.ask(ask.Recover())

    async def reattach(self, proxy: QmpFaultProxy | None = None) -> None:
        qmp = proxy.path if proxy else self.guest.qmp
        await self.ask(ask.Attach(domain="vm1", qmp=str(qmp)))

    # --- the guest --------------------------------------------------------------------------------------------

    async def write(self, target: str, byte: int, offset: int = 0, length: int = 64 * KIB) -> None:
        """Write through the guest's device, as QEMU's own test command does."""
        await self.write_each({target: byte}, offset, length)

    async def write_each(self, bytes_: Mapping[str, int], offset: int = 0, length: int = 64 * KIB) -> None:
        """Write a byte to each of several disks, all at once."""
        before = await self._writes(bytes_)
        for target, byte in bytes_.items():
            # Only the asynchronous ones are counted; aio_flush, which would wait, hangs QEMU 7.2 with an iothread.
            await self.hmp(f'qemu-io -d {self.qdevs[target]} "aio_write -q -P {byte:#x} {offset} {length}"')
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while set(before.items()) & set((now := await self._writes(bytes_)).items()):
                pass
        for target, byte in bytes_.items():
            done, failed = before[target]
            assert now[target] == (done + 1, failed), f"the write to {target} failed"
            self.written[target][offset : offset + length] = bytes([byte]) * length

    @contextlib.asynccontextmanager
    async def working(self, target: str) -> AsyncIterator[None]:
        """Meanwhile the guest writes to a disk, again and again."""

        async def write_on() -> None:
            while True:
                await self.write(target, 0x2F)

        writing = asyncio.create_task(write_on())
        try:
            yield
        finally:
            writing.cancel()

    async def _writes(self, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
        """By target, how many writes are done and how many failed."""
        answer = await self.guest.command("query-blockstats")
        found = {each["qdev"]: each["stats"] for each in answer if "qdev" in each}
        stats = {target: found[self.qdevs[target]] for target in targets}
        return {target: (each["wr_operations"], each["failed_wr_operations"]) for target, each in stats.items()}

    async def hmp(self, line: str) -> str:
        return await self.guest.command("human-monitor-command", {"command-line": line})

    async def status(self) -> str:
        return (await self.guest.command("query-status"))["status"]

    @property
    def is_held(self) -> bool:
        """Whether its windows hold the guest's requests instead of stopping it, while it runs."""
        return self.iothreads and forgets(self.qemu)

    @property
    def pauses_of_a_window(self) -> list[str]:
        """What is heard of one, while the guest runs."""
        return [] if self.is_held else ["STOP", "RESUME"]

    async def pauses_heard(self) -> list[str]:
        """STOP and RESUME since the last call."""
        await self.status()
        return [str(event["event"]) for event in self.pauses.clear()]

    async def nodes(self) -> dict[str, dict[str, Any]]:
        answer = await self.guest.command("query-named-block-nodes", {"flat": True})
        return {each["node-name"]: each for each in answer}

    async def our_nodes(self) -> set[str]:
        """Nodes and filters that the service has made."""
        return {name for name in await self.nodes() if OURS.match(name)}

    async def ready(self, *targets: str) -> None:
        """Wait until these mirrors are ready, as QEMU says; not by what is tested."""
        with self.guest.control.listener(("JOB_STATUS_CHANGE", "BLOCK_JOB_READY")) as listener:
            async with asyncio.timeout(EVENT_TIMEOUT_S):
                while not await self._are_ready(targets):
                    await listener.get()

    async def _are_ready(self, targets: Sequence[str]) -> bool:
        jobs = await self.qemu_jobs()
        return all(
            any(f"-{target}-m" in name and job["status"] == "ready" for name, job in jobs.items()) for target in targets
        )

    def in_flight(self) -> list[int]:
        """What each mirror that was started through the proxy has in flight at most, in bytes, in their order."""
        assert self.proxy is not None
        return [words["buf-size"] for command, words in self.proxy.log if command == "blockdev-mirror"]

    async def qemu_jobs(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in await self.guest.command("query-jobs")}

    # --- files ------------------------------------------------------------------------------------------------

    @property
    def dst(self) -> Path:
        return self.path / "dst"

    def dest(self, target: str) -> Path:
        return self.dst / f"{target}.copy"

    def source(self, target: str) -> Path:
        return self.path / f"{target}.img"

    def files(self) -> frozenset[str]:
        """Every image file, with its inode: one that was replaced is another."""
        return frozenset(
            f"{found.relative_to(self.path)} {found.stat().st_ino}"
            for found in self.path.rglob("*")
            if found.is_file() and "state" not in found.parts and found.name not in ("qemu.stderr", "t.nbd.stderr")
        )

    async def state(self) -> State:
        shown = await self.show()
        return State(
            chains={disk.target: tuple((image.file, image.format) for image in disk.chain) for disk in shown.disks},
            xml=shown.xml,
            jobs=tuple(sorted(await self.qemu_jobs())),
            files=self.files(),
            status=shown.state,
        )

    def holds(self, target: str, path: Path, fmt: str) -> bool:
        """Whether a closed image holds exactly what the guest has written to the disk."""
        return image_sha256(self.qemu, path, fmt) == self.digest(target)

    def digest(self, target: str) -> str:
        return hashlib.sha256(self.written[target]).hexdigest()

    def server(self, path: Path, fmt: str = "raw") -> NbdServer:
        return NbdServer(self.qemu, path, fmt, self.path, name="t")


def forgets(qemu: QemuBinaries) -> bool:
    """Whether a guest with iothreads that was stopped may forget a request in this QEMU."""
    return qemu_version(qemu) >= (8, 2)


@functools.cache
def templates(qemu: QemuBinaries) -> dict[str, bytes]:
    """The three images as files, made once a process: six programs to start are half a second on a busy machine."""
    with tempfile.TemporaryDirectory(prefix="blockferry-rig-") as folder:
        for number, (target, fmt) in enumerate(FORMATS.items(), start=1):
            path = make_image(qemu, Path(folder) / target, fmt, SIZE)
            write_pattern(qemu, path, fmt, 0, MIB, 0x10 * number)
        return {target: (Path(folder) / target).read_bytes() for target in FORMATS}


def three_disks(qemu: QemuBinaries, path: Path, *, iothreads: bool = True) -> list[str]:
    for target, contents in templates(qemu).items():
        with (path / f"{target}.img").open("wb") as file:
            file.write(contents.rstrip(b"\0"))
            file.truncate(len(contents))
    return [
        *blockdev_disk("d0", path / "vda.img", "qcow2", iothread="io0" if iothreads else None),
        *legacy_drive(path / "vdb.img", "raw"),
        *blockdev_disk("d2", path / "sda.img", "qcow2", bus="scsi", iothread="io1" if iothreads else None),
    ]


@contextlib.asynccontextmanager
async def open_rig(
    qemu: QemuBinaries,
    path: Path,
    *,
    paused: bool = False,
    proxy: bool = False,
    args: Sequence[str] = (),
    iothreads: bool = True,
) -> AsyncIterator[Rig]:
    """Start it all, attached as vm1; `args` are more disks."""
    written = {
        target: bytearray(bytes([0x10 * number]) * MIB + bytes(SIZE - MIB))
        for number, target in enumerate(FORMATS, start=1)
    }
    disks = three_disks(qemu, path, iothreads=iothreads)
    async with open_guest(qemu, path, [*disks, *args], written, paused=paused, proxy=proxy) as rig:
        rig.iothreads = iothreads
        yield rig


@contextlib.asynccontextmanager
async def open_guest(
    qemu: QemuBinaries,
    path: Path,
    args: Sequence[str],
    written: dict[str, bytearray],
    *,
    paused: bool = False,
    proxy: bool = False,
    machine: str = "pc",
) -> AsyncIterator[Rig]:
    """Start a guest of any disks, attached as vm1; those in `written` are on PATH/TARGET.img and hold that."""
    (path / "dst").mkdir()
    (path / "state").mkdir()
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(TestQemu(qemu, path, args=args, paused=paused, machine=machine))
        between = None
        if proxy:
            between = await stack.enter_async_context(QmpFaultProxy(guest.qmp, path / "proxy.sock"))
        service = await Service.open(path / "state")
        rig = Rig(qemu, path, guest, service, between, written, await find_qdevs(guest, path, written))
        guest.control.register_listener(rig.pauses)
        try:
            await rig.reattach(between)
            yield rig
        finally:
            await rig.service.close()


async def find_qdevs(guest: TestQemu, path: Path, written: Mapping[str, bytearray]) -> dict[str, str]:
    """What query-block calls each target's device, by its image; not asked of the code under test."""
    files = {str(path / f"{target}.img"): target for target in written}
    drives = await guest.command("query-block")
    found = {drive.get("inserted", {}).get("file"): drive.get("qdev") for drive in drives}
    return {target: found[file] for file, target in files.items()}


def wish_xml(name: str, *disks: str) -> str:
    return f"<domainsnapshot><name>{name}</name><disks>{''.join(disks)}</disks></domainsnapshot>"


def header(qemu: QemuBinaries, path: Path, fmt: str = "qcow2") -> dict[str, Any]:
    """What qemu-img reads in an image's header."""
    done = subprocess.run(
        [qemu.img, "info", "-U", "--output=json", "-f", fmt, path], capture_output=True, check=True, timeout=20
    )
    return json.loads(done.stdout)
