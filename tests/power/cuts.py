"""An operation, recorded once; and the power failing at each flush of it: what is left then has to hold everything."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from matrix import Course, is_gone, stays_defined
from operations import OPERATIONS
from verdict import Standing, images_of, require_contents, standing
from worlds import FORMATS, MIB, SIZE, TARGETS, OwnQemu, Stage, World, definition, guest

from blockferry.model import request as ask
from blockferry.service import Service
from blockferry.testing import (
    QemuVersion,
    QmpFaultProxy,
    find_qemu,
    make_image,
    sharing_file_system,
    write_pattern,
)
from blockferry.testing.crash import Crasher
from blockferry.testing.power import Disk, Entry, Recorder
from blockferry.testing.process import socket_path

SUBSETS = 3  # at each flush: how often some of what was not flushed is left, beside nothing and everything
EVERY = 3  # boundaries from one record to the next
CLUSTER = 1 << 16  # of qcow2; a write of less takes the rest of it along from below
Images = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Cut:
    """The power fails just before an entry of the log, by its number; `left` as `Disk.lose_power` has it."""

    at: int
    left: str

    def __str__(self) -> str:
        return f"{self.at}:{self.left}"


@dataclass
class Tally:
    """The figures."""

    cuts: int = 0
    records: int = 0

    def add(self, other: Tally) -> None:
        """Those of another operation too."""
        self.cuts += other.cuts
        self.records += other.records

    def __str__(self) -> str:
        return f"{self.cuts:,} cuts, {self.records:,} records, 0 lost"


@dataclass(frozen=True)
class Recording:
    """An operation as it went, and everything of it that came to files.

    Attributes:
        operation: its name.
        world: where it was, and where it is when power is back.
        disk: the files at the beginning of the log.
        entries: the log.
        moments: where the power may fail, by the number of the entry before which it does: each flush of the operation,
            and its end. What is on disk changes nowhere else. With each, the images that are not wholly on disk then.
        course: how things stood before and after it.
        images: where the disks were before it; of a guest that blockferry starts it knows itself.
        files: all images that there were before it.
    """

    operation: str
    world: World
    disk: Disk
    entries: Sequence[Entry]
    moments: Mapping[int, tuple[str, ...]]
    course: Course
    images: Images
    files: set[str]

    def cuts(self, seed: int) -> list[Cut]:
        """All that are tried."""
        return [Cut(at, left) for at, unflushed in self.moments.items() for left in _lefts(seed, unflushed)]

    def sample(self, seed: int, count: int) -> list[Cut]:
        """Some of them, of every kind: by which images are not wholly on disk."""
        chance = random.Random(f"{seed} {self.operation}")  # noqa: S311 - it has to be found again, not secret
        kinds: dict[tuple[str, ...], list[Cut]] = {}
        for cut in self.cuts(seed):
            kinds.setdefault(self.moments[cut.at], []).append(cut)
        chosen: set[Cut] = set()
        while len(chosen) < count:
            chosen.add(chance.choice(kinds[chance.choice(sorted(kinds))]))
        return sorted(chosen, key=lambda cut: cut.at)


def _lefts(seed: int, unflushed: tuple[str, ...]) -> list[str]:
    """Where only the journal is unflushed, all of it is what is flushed at the next moment."""
    some = [f"{seed}.{number}" for number in range(SUBSETS)]
    return ["none", "all", "first", "others", *some] if unflushed else ["none", some[0]]


class Theatre:
    """Records operations on one QEMU, one after the other.

    Args:
        version: which.
        folder: existing, its own.
    """

    def __init__(self, version: QemuVersion, folder: Path) -> None:
        self._folder = folder
        (folder / "recorder").mkdir()
        self._recorder = Recorder(folder / "recorder", folder / "world")
        self._template = folder / "template"
        self._template.mkdir()
        binaries = find_qemu(version)
        for target, byte in zip(TARGETS, (0x61, 0x62, 0x63), strict=True):
            image = make_image(binaries, self._template / f"{target}.img", FORMATS[target], SIZE)
            write_pattern(binaries, image, FORMATS[target], 0, MIB, byte)
        self._stage = Stage(version, binaries, Crasher(), self._template)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Theatre]:
        """While its host process runs, which is recorded from its start on."""
        folder = str(self._stage.binaries.system.parent)
        with mock.patch.dict(os.environ, {"BLOCKFERRY_QEMU_DIR": folder}), contextlib.ExitStack() as stack:
            with self._recorded():
                stack.enter_context(self._stage.crasher)
            yield self

    def _recorded(self) -> contextlib.AbstractContextManager[object]:
        return mock.patch.dict(os.environ, self._recorder.environment)

    async def record(self, name: str) -> Recording:
        """Carry an operation out while the guest writes; then the host process and QEMU are gone."""
        operation, world = OPERATIONS[name], self._world(name)
        known: ask.Request = ask.Attach(domain="vm", qmp=str(world.qmp))
        if isinstance(world.qemu, OwnQemu):
            known = ask.Define(xml=definition(world.folder, world.qemu.sockets))
        disk = self._recorder.begin()
        try:
            if not isinstance(world.qemu, OwnQemu):
                with self._recorded():
                    await world.qemu.start()
            for number, request in enumerate([known, *operation.before(world)]):
                await self._carry_out(world, [request])
                await _write_piece(world, number)
            before, images = await self._look(world)
            files = world.files()
            begin = len(self._recorder.entries())
            await self._carry_out(world, operation.itself(world))
            await self._carry_out(world, [ask.ShowDomain(domain="vm")])
            end = len(self._recorder.entries())
            after, _images = await self._look(world)
        finally:
            await (world.qemu.stop() if isinstance(world.qemu, OwnQemu) else world.qemu.kill())
            _remove_sockets(self._folder)
        entries = self._recorder.entries()
        moments = _moments(copy.deepcopy(disk), entries, begin, end)
        course = Course(boundaries=(), commands=(), copies=False, before=before, after=after)
        return Recording(name, world, disk, entries[:end], moments, course, {} if operation.defined else images, files)

    def _world(self, name: str) -> World:
        """Fresh images, and a guest that does not run yet."""
        folder = self._folder / "world"
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("src", "dst"):
            (folder / part).mkdir(parents=True)
        (folder / "state").mkdir(mode=0o700)
        (folder / "qemu.stderr").touch()
        contents, files = {}, {}
        for target in TARGETS:
            files[target] = (Path(shutil.copy(self._template / f"{target}.img", folder / "src")), FORMATS[target])
            contents[target] = bytearray(SIZE)
            contents[target][:MIB] = bytes([0x61 + TARGETS.index(target)]) * MIB
        if OPERATIONS[name].defined:
            qemu = OwnQemu({each: socket_path(folder / f"{each}.sock") for each in ("pen", "control")})
            qmp = folder / "state/run/domains/vm/qmp.sock"
            return World(self._stage, folder, qemu, QmpFaultProxy(qmp, folder / "proxy.sock"), qmp, contents)
        other = guest(self._stage, folder, files)
        return World(self._stage, folder, other, QmpFaultProxy(other.qmp, folder / "proxy.sock"), other.qmp, contents)

    async def _carry_out(self, world: World, requests: Sequence[ask.Request]) -> None:
        """In a process that is recorded, to its end."""
        pen = world.pen()
        assert pen is not None
        result = await asyncio.to_thread(
            self._stage.crasher.run,
            world.state_dir,
            requests,
            to_the_end=True,
            pen=dataclasses.replace(pen, every=EVERY),
        )
        assert result.error is None, result.error

    async def _look(self, world: World) -> tuple[Standing, Images]:
        """How things stand, by a copy of the state directory: what looks is not recorded, and may not write where it is."""
        elsewhere = self._folder / "copy"
        shutil.rmtree(elsewhere, ignore_errors=True)
        elsewhere.mkdir(mode=0o700)
        for path in world.state_dir.glob("journal.*"):
            shutil.copy(path, elsewhere)
        service = await Service.open(elsewhere)
        try:
            return await standing(service), await images_of(service)
        finally:
            await service.close()


@contextlib.contextmanager
def open_theatre(version: QemuVersion, folder: Path, *, shares: bool = False) -> Iterator[Theatre]:
    """A theatre in a folder, or (`shares`) on a file system in it whose files can share their blocks."""
    on = sharing_file_system(folder / "xfs", folder / "mounted") if shares else contextlib.nullcontext(folder)
    with on as where, Theatre(version, where).opened() as theatre:
        yield theatre


async def _write_piece(world: World, number: int) -> None:
    """A cluster that is not written again: whatever image a disk is on now is the only one that holds it."""
    pen = world.pen()
    if pen is None or not world.qemu.alive:
        return
    at, byte = MIB + number * CLUSTER, 0x30 + number
    for target, qdev in pen.disks.items():
        for command in (f"write -q -P {byte} {at} {CLUSTER}", "flush"):
            await world.command("human-monitor-command", {"command-line": f'qemu-io -d {qdev} "{command}"'})
        world.contents[target][at : at + CLUSTER] = bytes([byte]) * CLUSTER


def _moments(disk: Disk, entries: Sequence[Entry], begin: int, end: int) -> dict[int, tuple[str, ...]]:
    """See `Recording`; the files have to be what the whole log says of them."""
    found = {}
    for at, entry in enumerate(entries):
        if (begin <= at < end and entry.flushes) or at == end:
            found[at] = tuple(path for path in disk.unflushed if "/src/" in path or "/dst/" in path)
        disk.go_on(entry)
    found.setdefault(end, ())
    disk.require_recorded()
    return found


async def play(recording: Recording, cuts: Sequence[Cut], tally: Tally) -> None:
    """Have the power fail at these moments, in their order, and look at what is left; once for each recording."""
    world, disk, at = recording.world, recording.disk, 0
    for cut in cuts:
        for entry in recording.entries[at : cut.at]:
            disk.go_on(entry)
        at = cut.at
        disk.lose_power(cut.left)
        world.log.write_bytes(disk.seen(world.log))
        try:
            await _power_is_back(recording, tally, continuing=tally.cuts % 2 == 0)
        except BaseException as error:
            error.add_note(f"cut {cut}; not wholly on disk: {', '.join(map(os.path.basename, recording.moments[at]))}")
            raise
        tally.cuts += 1


async def _power_is_back(recording: Recording, tally: Tally, *, continuing: bool) -> None:
    world, operation = recording.world, OPERATIONS[recording.operation]
    try:
        if operation.defined:
            final = await stays_defined(world, operation, recording.course, continuing=continuing)
            require_contents(world, final, leaks=True)
        else:
            # It looks at the contents before QEMU is started again.
            images, files = recording.images, recording.files
            await is_gone(world, operation, recording.course, images, files, leaks=True, continuing=continuing)
    finally:
        await world.qemu.stop()
        _remove_sockets(world.folder)
    tally.records += sum(len(records.must) for records in world.records().values())


def _remove_sockets(folder: Path) -> None:
    """Of a QEMU that is gone; whoever keeps what a failed test has left can't keep them."""
    for path in folder.rglob("*.sock"):
        path.unlink()
