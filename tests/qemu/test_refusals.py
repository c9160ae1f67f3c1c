"""Every row of the table, on both QEMUs: the error it is to be, and nothing changed, nothing lost."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from refusal_kit import Place, Row, Vanishing, mounted
from refusals import ROWS, VANISHING
from rig import ALL, EVENT_TIMEOUT_S, KIB, MIB, SIZE, Rig, forgets, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.plan.destinations import NEW_OVERLAY_BYTES
from blockferry.service import Service
from blockferry.testing import (
    QemuBinaries,
    TestQemu,
    blockdev_disk,
    blockdev_node,
    check_image,
    find_qemu,
    make_image,
)

BYTES, DISKS = itertools.cycle(range(1, 256)), itertools.cycle(ALL)


LOOPS = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["distribution", "qemu10"])
async def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """One for all rows of a QEMU: what is refused leaves nothing behind. At its end, what was written is looked for."""
    qemu = find_qemu(request.param)
    path = tmp_path_factory.mktemp("refusals")
    (path / "other").mkdir()
    base = make_image(qemu, path / "other/base", "raw", MIB)
    top = make_image(qemu, path / "other/top", "qcow2", backing=base, backing_fmt="raw")
    read_only = make_image(qemu, path / "read-only", "raw", MIB)
    args = [
        *blockdev_node("ro", read_only, "raw", read_only=True),
        *["-device", "virtio-blk-pci,drive=ro,id=ro-dev,addr=0x1e"],
        *["-device", "ide-cd,id=empty-dev,bus=ide.0"],
    ]
    async with contextlib.AsyncExitStack() as stack:
        other = await stack.enter_async_context(
            TestQemu(qemu, path / "other", args=blockdev_disk("d", top, "qcow2"), paused=False)
        )
        rig = await stack.enter_async_context(open_rig(qemu, path, args=args))
        await rig.ask(ask.Attach(domain="vm2", qmp=str(other.qmp)))
        await rig.snapshot("s1", only=["sda"])
        yield Place(rig, other)
        await rig.guest.stop()
        for target, image in (("vda", "vda.img"), ("vdb", "vdb.img"), ("sda", "sda.s1")):
            assert rig.holds(target, path / image, "raw" if target == "vdb" else "qcow2")


async def seen(place: Place) -> dict[str, Any]:
    """What has to be as it was."""
    rig = place.rig
    folders = (place.offered, place.path / "other")
    small = [each for folder in folders for each in folder.rglob("*") if each.is_file() and each.stat().st_size < SIZE]
    return {
        "vm1": await rig.state(),
        "other domains": (await rig.ask(ask.ListDomains())).domains,
        "vm2": (await rig.ask(ask.ShowDomain(domain="vm2"))).disks,
        "nodes": await rig.our_nodes(),
        "jobs": await rig.states(),
        "snapshots": sorted(await rig.snapshots()),
        "operations": await rig.operations(),
        "contents": {each: hashlib.sha256(each.read_bytes()).digest() for each in small},
    }


# Rows that differ in the operation alone are asked one after the other, and looked at once.
GROUPS = [tuple(rows) for _, rows in itertools.groupby(ROWS, key=lambda row: (row.what, id(row.setting)))]


@LOOPS
@pytest.mark.parametrize("rows", GROUPS, ids=lambda rows: rows[0].what.replace("/", "_"))
async def test_refused(place: Place, rows: tuple[Row, ...]) -> None:
    place.offered.mkdir()
    try:
        async with rows[0].setting(place):
            before = await seen(place)
            await place.rig.pauses_heard()
            for row in rows:
                await refused(place, row)
            assert await place.rig.pauses_heard() == []
            await place.rig.settled()
            after = await seen(place)
            for name, was in before.items():
                assert after[name] == was, name
            # The guest still writes; what it has written is looked for at the end.
            await place.rig.write(next(DISKS), next(BYTES), MIB)
    finally:
        shutil.rmtree(place.offered)


async def refused(place: Place, row: Row) -> None:
    with pytest.raises(row.error) as caught:
        await place.rig.ask(row.request(place))
    error = caught.value
    assert type(error) is row.error
    assert error.outcome == "refused"
    assert re.search(row.says, error.message), f"{row}: {error.message}"
    assert len(error.message) < 10 * KIB
    assert error.message.isprintable()
    assert errors.from_dict(json.loads(msgspec.json.encode(error.to_dict()))).message == error.message


@dataclass
class Killer:
    """Kills QEMU when a command is about to be sent; told of every command by the service."""

    pid: int
    command: str
    nth: int
    armed: bool = False

    def __call__(self, when: str, what: str) -> None:
        if self.armed and self.nth and (when, what) == ("before", self.command):
            self.nth -= 1
            if self.nth == 0:
                os.kill(self.pid, signal.SIGKILL)


@pytest.mark.parametrize("row", VANISHING, ids=lambda row: f"{row} at {row.command}")
async def test_vanishing(qemu: QemuBinaries, tmp_path: Path, row: Vanishing) -> None:
    """It is said, what was begun is undone, and every image is whole.

    A window in which the guest is not stopped is recorded by the time its jobs are finalized.
    """
    stopped = row.command in ("stop", "job-finalize")
    async with contextlib.AsyncExitStack() as stack:
        rig = await stack.enter_async_context(open_rig(qemu, tmp_path, iothreads=not (stopped and forgets(qemu))))
        place = Place(rig)
        await stack.enter_async_context(row.setting(place))
        killer = Killer(rig.guest.pid, row.command, row.nth)
        await rig.service.close()
        rig.service = await Service.open(rig.path / "state", witness=killer)
        chains, files, done = (await rig.state()).chains, rig.files(), await rig.operations()
        killer.armed = True
        with pytest.raises(row.error) as caught:
            await rig.ask(row.request(place))
        assert re.search(row.says, caught.value.message), caught.value.message
        assert killer.nth == 0
        begun = (await rig.operations())[len(done) :]
        assert [state for _what, state in begun] == ([] if row.error is errors.QmpUnreachable else ["undone"])
        assert (await rig.ask(ask.Recover())).operations == ()
        assert (await rig.show()).state == "gone"
        assert rig.files() == files
        with pytest.raises(errors.QmpUnreachable, match="Nothing was done"):
            await rig.snapshot("later")
        await rig.guest.kill()
        for target, chain in chains.items():
            for file, fmt in chain:
                check_image(rig.qemu, Path(file), fmt)
            file, fmt = chain[0]
            assert rig.holds(target, Path(file), fmt)


# --- what takes a guest of its own ----------------------------------------------------------------------------


async def test_full_journal(rig: Rig) -> None:
    """What can't be written down is not begun; with room again it is."""
    state_dir = rig.path / "small"
    await rig.service.close()
    async with mounted(state_dir, "-o", "size=1m"):
        rig.service = await Service.open(state_dir)
        try:
            await rig.reattach()
            before = await rig.state()
            filler = state_dir / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(KIB)):
                    pass
            for request in (rig.snapshot(), rig.copy("vda"), rig.copy("vdb")):
                with pytest.raises(errors.JournalUnwritable, match=r"full.*Make room"):
                    await request
            filler.unlink()
            assert await rig.state() == before
            assert await rig.our_nodes() == set()
            assert await rig.pauses_heard() == []
            await rig.snapshot()
        finally:
            await rig.service.close()
    rig.service = await Service.open(rig.path / "state")


async def test_nothing_new_on_a_domain_with_an_unsettled_operation(faulty: Rig) -> None:
    """Its socket has gone in the middle; when it is there again the operation is settled before anything else."""
    before = await faulty.state()
    away = faulty.path / "away"
    gate = faulty.proxy.pause_before("blockdev-add", 2)
    snapshot = asyncio.create_task(faulty.snapshot())
    await gate.reached()
    faulty.proxy.path.rename(away)
    await faulty.proxy.cut()
    gate.release()
    with pytest.raises(errors.OperationUnsettled):
        await snapshot
    nodes, files = await faulty.our_nodes(), faulty.files()
    for request in (faulty.snapshot("s2"), faulty.copy("vdb"), faulty.commit("vda"), faulty.rebase("vda")):
        with pytest.raises(errors.Unsettled, match="operation 1 is not settled yet"):
            await request
    assert (await faulty.our_nodes(), faulty.files()) == (nodes, files)
    away.rename(faulty.proxy.path)
    await faulty.settled()
    assert await faulty.operations() == [("snapshot", "undone")]
    assert await faulty.state() == before
    await faulty.snapshot()


async def test_a_stream_that_somebody_has_not_dismissed(rig: Rig) -> None:
    """Its end is waited for by its status: to ask QEMU for its nodes then would crash it."""
    before = await rig.state()
    with rig.guest.control.listener("JOB_STATUS_CHANGE") as listener:
        stream = {"job-id": "theirs", "device": "d0", "auto-dismiss": False}
        await rig.guest.command("block-stream", stream)
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while (await listener.get())["data"]["status"] != "concluded":
                pass
    for request in (rig.snapshot(), rig.copy("vdb"), rig.rebase("vda"), rig.commit("sda")):
        with pytest.raises(errors.JobNotDismissed, match=r"'theirs'.*job-dismiss"):
            await request
    await rig.guest.command("job-dismiss", {"id": "theirs"})
    assert await rig.state() == before
    assert await rig.operations() == []
    await rig.snapshot()


# --- what is not refused: the other side of a limit ------------------------------------------------------------


async def test_room_that_is_enough_to_the_byte(rig: Rig, tmp_path: Path) -> None:
    """A page less is refused (see the table); so much holds the whole copy, or the overlays."""
    taken = rig.source("vdb").stat().st_blocks * 512
    assert taken < SIZE, "it is sparse"
    for name, size in (("copy", taken), ("overlays", 2 * NEW_OVERLAY_BYTES)):
        async with mounted(tmp_path / name, "-o", f"size={size}"):
            if name == "copy":
                await rig.copy("vdb", tmp_path / name / "vdb")
                await rig.finish("vdb")
                assert rig.holds("vdb", tmp_path / name / "vdb", "raw")
                continue
            await rig.snapshot("s1", only=["vda", "sda"], folder=tmp_path / name)
            await rig.delete("s1", 0)
            assert not list((tmp_path / name).iterdir())
