"""Comparing what a guest was moved from with what it is on: exact while it writes, and nothing is left in QEMU."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from rig import ALL, EVENT_TIMEOUT_S, FORMATS, KIB, MIB, SIZE, Rig, templates

import blockferry.qemu.compare
from blockferry.model.files import ImageFact
from blockferry.model.move import Difference, Verdict
from blockferry.plan.plan import Names
from blockferry.plan.tracking import CHUNK
from blockferry.qemu.compare import Compared, CompareFailed, compare, forget
from blockferry.qemu.copier import Throttle
from blockferry.qemu.images import Images
from blockferry.qemu.serving import end_serving, folder_of
from blockferry.qemu.session import Session
from blockferry.testing import NbdServer, write_pattern
from blockferry.testing.sick import NAME, fail, heal, sick_storage

NAMES = Names("test", os.getpid())
BITMAP = "since"


class Held(Throttle):
    """Lets nobody read before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._waits = asyncio.Event()
        self._free = threading.Event()

    def take(self, length: int, stop: threading.Event) -> None:  # noqa: ARG002
        self._loop.call_soon_threadsafe(self._waits.set)
        assert self._free.wait(EVENT_TIMEOUT_S)

    async def waits(self) -> None:
        """Wait until a reader waits: it is known what is to be read, and nothing has been."""
        await asyncio.wait_for(self._waits.wait(), EVENT_TIMEOUT_S)

    def free(self) -> None:
        self._free.set()


@dataclass
class Moved:
    """A guest that was moved, with the connection to its QEMU."""

    rig: Rig
    session: Session
    disks: tuple[Compared, ...]
    nodes: set[str]  # that have a bitmap
    reports: list[tuple[int, int]] = field(default_factory=list)

    @property
    def through_qemu(self) -> bool:
        """Whether the destination is exported: its disks have iothreads."""
        return not self.session.version.startswith("7.")

    async def compare(self, *throttles: Throttle, how: Literal["sample", "full"] = "full") -> Verdict:
        return await compare(
            self.session,
            self.disks,
            how,
            images=Images(qemu_img=str(self.rig.qemu.img)),
            names=NAMES,
            report=lambda done, total: self.reports.append((done, total)),
            throttles=throttles,
        )

    async def fails(self, reason: str) -> None:
        with pytest.raises(CompareFailed, match=reason):
            await self.compare()
        await self.nothing_left()

    async def nothing_left(self) -> None:
        """QEMU has what it had before, and serves nobody; no process and no socket of ours is there."""
        assert servers() == []
        assert not os.path.lexists(folder_of(NAMES))
        if not self.rig.guest.alive:
            return
        assert await self.rig.guest.command("query-block-exports") == []
        nodes = await self.rig.nodes()
        assert not any(name.startswith(NAMES.stem) for name in nodes)
        assert {
            (name, bitmap["name"], bitmap["busy"])
            for name, node in nodes.items()
            for bitmap in node.get("dirty-bitmaps", ())
        } == {(node, BITMAP, False) for node in self.nodes}
        await self.rig.guest.command("nbd-server-start", address(self.rig.path))
        await self.rig.guest.command("nbd-server-stop")


def address(folder: Path) -> dict[str, object]:
    return {"addr": {"type": "unix", "data": {"path": f"{folder}/qemu.sock"}}}


def servers() -> list[int]:
    """The qemu-nbd processes that are children of ours and live."""
    # By their parent, not by the threads' lists of children: those lose a child whose thread ends meanwhile.
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
            if parent == os.getpid() and b"qemu-nbd" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@contextlib.asynccontextmanager
async def counted(rig: Rig, sources: Mapping[str, Sequence[Path]]) -> AsyncIterator[Moved]:
    """What the guest writes to its images from now on is counted; `sources` are what it came from, and their bases."""
    await rig.service.close()
    images = Images(qemu_img=str(rig.qemu.img))
    drives = {drive.get("qdev"): drive for drive in await rig.guest.command("query-block")}
    disks = []
    for target, chain in sources.items():
        node = drives[rig.qdevs[target]]["inserted"]["node-name"]
        facts = await images.chain(str(chain[0]), FORMATS[target])
        assert [image.path for image in facts] == [str(path) for path in chain]
        disks.append(Compared(target=target, node=node, bitmap=BITMAP, source=facts, size=SIZE))
        await rig.guest.command("block-dirty-bitmap-add", {"node": node, "name": BITMAP, "granularity": CHUNK})
    session = await Session.connect(str(rig.guest.qmp), EVENT_TIMEOUT_S)
    try:
        yield Moved(rig, session, tuple(disks), {disk.node for disk in disks})
    finally:
        await session.close()


@pytest.fixture
async def moved(rig: Rig) -> AsyncIterator[Moved]:
    """Three disks: virtio and SCSI, each in an iothread of its own, qcow2; and a raw one. They came from DIR/from/TARGET."""
    (rig.path / "from").mkdir()
    for target, contents in templates(rig.qemu).items():
        source_of(rig, target).write_bytes(contents)
    async with counted(rig, {target: [source_of(rig, target)] for target in ALL}) as found:
        yield found


def source_of(rig: Rig, target: str) -> Path:
    return rig.path / "from" / target


# --- what is found --------------------------------------------------------------------------------------------


async def test_what_the_guest_wrote_is_told_from_what_differs(moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = moved.rig
    verdict = await moved.compare()
    assert (verdict.compared, verdict.written, verdict.different, verdict.differences) == (3 * SIZE, 0, 0, ())
    assert moved.reports[-1] == (3 * SIZE, 3 * SIZE)
    await moved.nothing_left()

    # Over data, where there were none, and at the end.
    await rig.write_each(dict.fromkeys(ALL, 0x77), 4 * KIB, 4 * KIB)
    await rig.write_each(dict.fromkeys(ALL, 0x78), 5 * MIB - 4 * KIB, 8 * KIB)
    await rig.write_each(dict.fromkeys(ALL, 0x79), SIZE - 512, 512)
    # Read beside QEMU 7.2, the two qcow2 images lack what it still has in its caches: what was allocated since.
    written = (12 if moved.through_qemu else 6) * CHUNK
    verdict = await moved.compare()
    assert (verdict.written, verdict.different, verdict.differences) == (written, 0, ())

    # Behind QEMU's back: in a source under its format, in a raw source where it had no data, and in a raw destination.
    write_pattern(rig.qemu, source_of(rig, "vda"), "qcow2", 3 * CHUNK + 7, 1, 0xEE)
    write_pattern(rig.qemu, source_of(rig, "vda"), "qcow2", 8 * CHUNK, 2 * CHUNK, 0xEE)
    write_pattern(rig.qemu, source_of(rig, "vdb"), "raw", SIZE - CHUNK - 1, 1, 0xEE)
    descriptor = os.open(rig.source("vdb"), os.O_WRONLY)
    os.pwrite(descriptor, b"\xee", 10 * CHUNK)
    os.close(descriptor)
    verdict = await moved.compare()
    assert verdict.differences == (
        Difference(target="vda", offset=3 * CHUNK, length=CHUNK),
        Difference(target="vda", offset=8 * CHUNK, length=2 * CHUNK),
        Difference(target="vdb", offset=10 * CHUNK, length=CHUNK),
        Difference(target="vdb", offset=SIZE - 2 * CHUNK, length=CHUNK),
    )
    assert (verdict.written, verdict.different) == (written, 5 * CHUNK)

    # Many: so many are named, and all are counted.
    with source_of(rig, "vdb").open("r+b") as source:
        for offset in range(CHUNK, 6 * MIB, 2 * CHUNK):
            source.seek(offset)
            source.write(b"\xee")
    monkeypatch.setattr(blockferry.qemu.compare, "NAMED_MAX", 40)
    verdict = await moved.compare()
    assert [difference.target for difference in verdict.differences] == ["vda"] * 2 + ["vdb"] * 40
    assert verdict.different == 3 * CHUNK + 50 * CHUNK - CHUNK
    assert await rig.status() == "running"
    assert await rig.pauses_heard() == []
    await moved.nothing_left()


async def test_a_chain_is_read_through_all_of_its_images(rig: Rig) -> None:
    await rig.layers(2, only=("vda",))
    await rig.copy("vda", format="raw")
    await rig.ready("vda")
    await rig.pivot("vda")
    async with counted(rig, {"vda": [Path(rig.layer("vda", number)) for number in (2, 1, 0)]}) as moved:
        verdict = await moved.compare()
        assert (verdict.compared, verdict.written, verdict.different) == (SIZE, 0, 0)
        # Of what is not zero: 1 MiB of the base with what the first layer has over it, the second layer's, and both's.
        verdict = await moved.compare(how="sample")
        assert (verdict.how, verdict.compared, verdict.different) == ("sample", MIB + 2 * CHUNK, 0)
        write_pattern(rig.qemu, rig.source("vda"), "qcow2", 7 * MIB, CHUNK, 0xEE)
        assert (await moved.compare()).different == 0, "hidden by what is above"
        write_pattern(rig.qemu, rig.source("vda"), "qcow2", 512, 512, 0xEE)
        verdict = await moved.compare(how="sample")
        assert verdict.differences == (Difference(target="vda", offset=0, length=CHUNK),)
        await moved.nothing_left()


async def test_what_the_guest_writes_meanwhile_is_no_difference(moved: Moved) -> None:
    async def write() -> None:
        for number in range(1 << 30):
            await moved.rig.write_each(dict.fromkeys(ALL, number % 256), number % 16 * CHUNK, 4 * KIB)

    # After one has looked at what is to be read, and before it is read: the bitmap is looked at last.
    held = Held()
    comparing = asyncio.create_task(moved.compare(held))
    await held.waits()
    await moved.rig.write_each(dict.fromkeys(ALL, 0x55), 256 * KIB, 4 * KIB)
    held.free()
    verdict = await comparing
    assert (verdict.written, verdict.different) == (3 * CHUNK, 0)

    # All the time.
    writing = asyncio.create_task(write())
    for _ in range(4):
        verdict = await moved.compare()
        assert verdict.written
        assert (verdict.different, verdict.differences) == (0, ())
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    await moved.nothing_left()


# --- what goes wrong ------------------------------------------------------------------------------------------


async def test_nothing_is_left_and_nothing_of_others_is_touched(moved: Moved, tmp_path: Path) -> None:
    await moved.rig.guest.command("nbd-server-start", address(tmp_path))
    export = {"type": "nbd", "id": "theirs", "node-name": moved.disks[0].node}
    await moved.rig.guest.command("block-export-add", export)
    with pytest.raises(CompareFailed, match="already running"):
        await moved.compare()
    await forget(moved.session, moved.disks, NAMES)
    assert [each["id"] for each in await moved.rig.guest.command("query-block-exports")] == ["theirs"]
    await moved.rig.guest.command("nbd-server-stop")
    await moved.nothing_left()

    # What a dead one has left is found by the next with its names, and by who is told to forget it.
    node = moved.disks[0].node

    async def leave() -> None:
        copy = NAMES.of("vda", "w")
        os.mkdir(folder_of(NAMES), 0o700)
        await moved.rig.guest.command("nbd-server-start", address(Path(folder_of(NAMES))))
        scratch = {"driver": "null-co", "node-name": copy, "size": SIZE}
        await moved.rig.guest.command("blockdev-add", scratch)
        await moved.rig.guest.command("block-dirty-bitmap-add", {"node": copy, "name": copy, "disabled": True})
        for name, exported in ((NAMES.of("vda", "e"), node), (copy, copy)):
            export = {"type": "nbd", "id": name, "name": name, "node-name": exported}
            await moved.rig.guest.command("block-export-add", export)

    await leave()
    await forget(moved.session, moved.disks, NAMES)
    await moved.nothing_left()
    await leave()
    await moved.rig.write("vda", 0x55)
    assert (await moved.compare()).written == CHUNK
    await moved.nothing_left()

    # It can be cancelled.
    for _ in range(2):
        held = Held()
        comparing = asyncio.create_task(moved.compare(held))
        await held.waits()
        comparing.cancel()
        held.free()
        with pytest.raises(asyncio.CancelledError):
            await comparing
        await moved.nothing_left()


async def test_what_can_not_be_read_is_never_equal(
    moved: Moved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = moved.rig
    source = source_of(rig, "vda")
    async with NbdServer(rig.qemu, source, "qcow2", tmp_path):  # it could write
        with pytest.raises(CompareFailed, match=r"vda: its source can't be read: .* lock"):
            await moved.compare()

    whole = source.read_bytes()
    source.write_bytes(b"something else")
    await moved.fails(r"vda: its source can't be read: qemu-nbd has ended with status 1: .*qcow2")
    source.write_bytes(whole)

    first = moved.disks[0]
    moved.disks = (msgspec.structs.replace(first, source=(ImageFact(path=str(source), format="raw"),)),)
    await moved.fails(f"vda can't be compared: it has {SIZE} bytes, and .*{source}, has")
    gone = msgspec.structs.replace(first.source[0], problem="it is encrypted")
    moved.disks = (msgspec.structs.replace(first, source=(gone,)),)
    await moved.fails("it is encrypted")
    moved.disks = (first,)

    for name, value in sick_storage(tmp_path / "sick").items():
        monkeypatch.setenv(name, value)
    held = Held()
    comparing = asyncio.create_task(moved.compare(held))
    await held.waits()
    fail(f"r 5 {source}")
    held.free()
    with pytest.raises(
        CompareFailed, match=rf"vda .* at offset \d+: qemu-nbd, which reads {source}, .*Input/output error"
    ):
        await comparing
    heal(Path(os.environ[NAME]))
    await moved.nothing_left()

    # The reader dies.
    held = Held()
    comparing = asyncio.create_task(moved.compare(held))
    await held.waits()
    for pid in servers():
        os.kill(pid, signal.SIGKILL)
    held.free()
    with pytest.raises(CompareFailed, match=r"vda can't be compared.*qemu-nbd.*it has ended with status -9"):
        await comparing
    await moved.nothing_left()
    assert (await moved.compare()).different == 0


async def test_without_a_bitmap_or_a_qemu_nobody_knows(moved: Moved) -> None:
    disk = moved.disks[2]
    held = Held()
    await moved.rig.write("sda", 0x55)
    comparing = asyncio.create_task(moved.compare(held))
    await held.waits()
    bitmap = {"node": disk.node, "name": BITMAP}
    await moved.rig.guest.command("block-dirty-bitmap-disable", bitmap)
    held.free()
    with pytest.raises(CompareFailed, match=f"sda: nobody knows .* bitmap {BITMAP} of node {disk.node} does not count"):
        await comparing
    await moved.rig.guest.command("block-dirty-bitmap-remove", bitmap)
    with pytest.raises(CompareFailed, match=f"sda: nobody knows .* bitmap {BITMAP} of node {disk.node} is not there"):
        await moved.compare()
    moved.nodes.remove(disk.node)
    await moved.nothing_left()

    # QEMU dies.
    moved.disks = moved.disks[:2]
    held = Held()
    comparing = asyncio.create_task(moved.compare(held))
    await held.waits()
    await moved.rig.guest.kill()
    held.free()
    with pytest.raises(CompareFailed, match=r"vda can't be compared.*QEMU, of node|QEMU gives no answer"):
        await comparing
    await moved.nothing_left()
    with pytest.raises(CompareFailed, match="QEMU gives no answer"):
        await moved.compare()
    await end_serving(moved.session, NAMES)
