"""What hangs is a fault too: a server that accepts and says nothing, a QEMU that is stopped, a file system that is frozen."""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from rig import ALL, FORMATS, MIB, SIZE, Rig, open_rig

from blockferry import errors
from blockferry.engine import link, turns
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.qemu import images, nbd
from blockferry.qemu.session import Session
from blockferry.service import Service
from blockferry.testing import Gate, NbdServer, QemuBinaries, TestQemu, blockdev_disk, find_qemu, make_image
from blockferry.testing.crash import Crasher

# Long before QEMU's own answer would be given up (30 s): who waits for that has not been freed.
FREED_SECONDS = 15.0
OTHERS = ("vdb", "sda")


def remote(rig: Rig) -> NbdServer:
    return rig.server(make_image(rig.qemu, rig.dst / "remote", "raw", SIZE))


async def in_a_window_of(rig: Rig, seconds: float) -> None:
    await rig.service.close()
    rig.service = await Service.open(rig.path / "state", window_seconds=seconds)


async def copied(rig: Rig, server: NbdServer) -> None:
    """vda to the server, the others to files."""
    await in_a_window_of(rig, 0.6)
    await rig.copy("vda", server.uri)
    for target in OTHERS:
        await rig.copy(target)
    await rig.ready(*ALL)
    await rig.pauses_heard()


async def left(rig: Rig, pivot: Awaitable[view.Done], *, again: Sequence[str] = ALL) -> None:
    """The guest runs again on its sources, the mirror is lost with the reason; the others go on, and these can be pivoted."""
    async with asyncio.timeout(FREED_SECONDS):
        with pytest.raises(errors.OperationFailed, match=r"vda: nbd\+unix.*did not answer within 0\.36 s"):
            await pivot
    assert await rig.status() == "running"
    for target in ALL:
        assert await rig.chain(target) == [str(rig.source(target))]
    assert "did not answer" in (await rig.heard("mirror-dropped")).data["reason"]
    assert await rig.states() == {"vda": "lost", "vdb": "ready", "sda": "ready"}
    assert (await rig.operations())[-1] == ("pivot", "undone")
    assert not [name for name in await rig.our_nodes() if "-vda-x" in name]
    # It still hangs, and nobody minds.
    await rig.write_each(dict.fromkeys(ALL, 0x91))
    if "vda" in again:
        await rig.copy("vda")
    await rig.ready(*again)
    await rig.pivot(*again)
    await rig.guest.stop()
    for target, fmt in FORMATS.items():
        assert rig.holds(target, rig.dest(target) if target in again else rig.source(target), fmt)


MOMENTS = {
    "before stop": lambda rig: rig.proxy.pause_before("stop"),
    "before complete": lambda rig: rig.proxy.pause_before("job-complete"),
    "pending": lambda rig: rig.proxy.pause_before("job-finalize"),
    "all finalized": lambda rig: rig.proxy.pause_after("job-finalize", 3),
}


@pytest.mark.parametrize(
    ("qemu", "when"),
    [
        ("distribution", "before stop"),
        ("distribution", "pending"),
        ("qemu10", "before complete"),
        ("qemu10", "all finalized"),
    ],
    indirect=["qemu"],
)
async def test_server_hangs_in_the_window(faulty: Rig, when: str) -> None:
    async with remote(faulty) as server:
        await copied(faulty, server)
        gate: Gate = MOMENTS[when](faulty)
        pivot = asyncio.create_task(faulty.pivot(*ALL))
        async with asyncio.timeout(20):
            await gate.reached()
        server.suspend()
        gate.release()
        await left(faulty, pivot)


async def test_server_hangs_with_writes_in_flight(rig: Rig) -> None:
    """More than a Unix socket takes, which is what `yank` does not wake. The server takes one client: nobody can probe it."""
    image = make_image(rig.qemu, rig.dst / "remote", "raw", SIZE)
    async with NbdServer(rig.qemu, image, "raw", rig.path, name="t", once=True) as server:
        await copied(rig, server)
        server.suspend()
        await rig.write("vda", 0x77, MIB, 4 * MIB)
        # QEMU 7.2 forgets the filter of a mirror that fails while `stop` drains, and mirrors that disk no more.
        await left(rig, rig.pivot(*ALL), again=ALL if rig.qemu == find_qemu("qemu10") else OTHERS)


@pytest.mark.parametrize("qemu", ["distribution"], indirect=True)
async def test_server_that_hangs_before_the_window(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes several clients, and does not flush for one of them: the guest is not paused, and the mirror stays."""
    monkeypatch.setattr(nbd, "FLUSH_SECONDS", 0.5)
    async with remote(rig) as server:
        await copied(rig, server)
        server.suspend()
        with pytest.raises(errors.OperationFailed, match=r"vda's destination does not answer: it accepts, and"):
            await rig.pivot(*ALL)
        assert "STOP" not in await rig.pauses_heard()
        assert await rig.states() == dict.fromkeys(ALL, "ready")
        server.resume()
        await rig.pivot(*ALL)
        assert await rig.chain("vda") == [server.uri]


async def hung_pivot(qemu: QemuBinaries, path: Path, *, at: int | None) -> tuple[str, ...]:
    """A pivot whose server hangs with writes in flight, so that QEMU does; its process dies at that boundary, if any.

    Whoever comes next frees the guest: nobody can ask QEMU for anything before. Gives the boundaries that were passed.
    """
    path.mkdir()
    async with open_rig(qemu, path) as rig:
        image = make_image(rig.qemu, rig.dst / "remote", "raw", SIZE)
        async with NbdServer(rig.qemu, image, "raw", rig.path, name="t", once=True) as server:
            await copied(rig, server)
            await rig.service.close()
            server.suspend()
            await rig.write("vda", 0x77, MIB, 4 * MIB)
            pivot = ask.PivotJobs(domain="vm1", disks=ALL)
            with Crasher() as crasher:
                result = await asyncio.to_thread(crasher.run, rig.path / "state", [pivot], at=at)
            assert result.killed is (at is not None)
            assert result.error == (None if result.killed else "operation-failed")
            async with asyncio.timeout(FREED_SECONDS):
                rig.service = await Service.open(rig.path / "state", window_seconds=0.6)
                report = await rig.ask(ask.Recover())
            assert isinstance(report, view.RecoveryReport)
            assert {each.row for each in report.operations} <= {"-"}, "the opening has settled it"
            assert await rig.status() == "running"
            assert await rig.pauses_heard() == ["STOP", "RESUME"]
            for target in ALL:
                assert await rig.chain(target) == [str(rig.source(target))]
            assert await rig.states() == {"vda": "lost", "vdb": "ready", "sda": "ready"}
            assert "did not answer" in (await rig.heard("mirror-dropped")).data["reason"]
            assert (await rig.operations())[-1] == ("pivot", "undone")
            await rig.write_each(dict.fromkeys(ALL, 0x92))
            await rig.pivot(*OTHERS)
            await rig.guest.stop()
            for target, fmt in FORMATS.items():
                assert rig.holds(target, rig.dest(target) if target in OTHERS else rig.source(target), fmt)
    return result.boundaries


async def test_the_process_dies_while_the_server_hangs_in_the_window(qemu: QemuBinaries, tmp_path: Path) -> None:
    boundaries = await hung_pivot(qemu, tmp_path / "lives", at=None)
    hung = boundaries.index("before yank")
    assert "after stop" not in boundaries[:hung], "QEMU hangs in it"
    await hung_pivot(qemu, tmp_path / "dies", at=hung)


async def test_what_frees_qemu_overtakes_all_that_waits_for_it(qemu: QemuBinaries, tmp_path: Path) -> None:
    """A command waits in QEMU's main loop for a server, and more wait for their turn than QEMU takes in at once."""
    async with TestQemu(qemu, tmp_path) as guest:
        image = make_image(qemu, tmp_path / "remote", "raw", SIZE)
        async with NbdServer(qemu, image, "raw", tmp_path, name="t") as server:
            session = await Session.connect(str(guest.qmp), 5.0)
            reached = {"type": "unix", "path": str(server.socket)}
            options = {"driver": "nbd", "export": "t", "server": reached}
            await session.execute("blockdev-add", **{"node-name": "n", **options})
            server.suspend()
            reading = asyncio.create_task(
                session.execute("human-monitor-command", command_line='qemu-io n "read -q 0 512"')
            )
            others = asyncio.create_task(session.execute_each("query-status", [{}] * 20))
            try:
                done, _waiting = await asyncio.wait({reading, others}, timeout=0.5)
                assert not done, "QEMU does not hang"
                await session.execute_oob("yank", 5.0, instances=[{"type": "block-node", "node-name": "n"}])
                async with asyncio.timeout(FREED_SECONDS):
                    await asyncio.gather(reading, others)
            finally:
                server.resume()
                await session.close()


# --- a file system that hangs ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def mounted(device: Path, folder: Path) -> AsyncIterator[Callable[[str], None]]:
    """A file system of its own; gives what freezes (`-f`) and unfreezes (`-u`) it."""

    def run(*words: str | Path) -> None:
        subprocess.run(words, check=True, capture_output=True, timeout=20)

    run("mkfs.ext4", "-q", "-F", device)
    run("mount", device, folder)
    try:
        yield lambda how: run("fsfreeze", how, folder)
    finally:
        run("umount", "-l", folder)


@pytest.mark.parametrize("qemu", ["qemu10"], indirect=True)
async def test_file_system_that_hangs_before_the_window(
    qemu: QemuBinaries, tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen one takes no change and does not come back: nobody can free who waits for it, so the window is refused."""
    monkeypatch.setattr(images, "SYNC_SECONDS", 0.5)
    (tmp_path / "frozen").mkdir()
    async with mounted(device, tmp_path / "frozen") as freeze, open_rig(qemu, tmp_path) as rig:
        await rig.copy("vda", tmp_path / "frozen" / "vda.copy")
        await rig.ready("vda")
        await rig.pauses_heard()
        freeze("-f")
        try:
            with pytest.raises(errors.OperationFailed, match="its file system does not answer within"):
                await rig.pivot("vda")
            assert "STOP" not in await rig.pauses_heard()
            assert await rig.states() == {"vda": "ready"}
        finally:
            freeze("-u")
        await rig.pivot("vda")
        await rig.guest.stop()
        assert rig.holds("vda", tmp_path / "frozen" / "vda.copy", "qcow2")


# --- a QEMU that does not answer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qemu", "step"),
    [("distribution", "query-jobs"), ("distribution", "stop"), ("qemu10", "blockdev-mirror")],
    indirect=["qemu"],
)
async def test_qemu_that_is_stopped(rig: Rig, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a request: it ends within its bound and says what is known. Once QEMU goes on it is settled."""
    monkeypatch.setattr(Session, "COMMAND_SECONDS", 0.5)
    monkeypatch.setattr(link.Link.connect, "__defaults__", (0.5,))
    seen: list[str] = []

    def witness(when: str, what: str) -> None:
        if when == "before" and what == step and armed:
            armed.clear()
            rig.guest.process.signal(signal.SIGSTOP)
            seen.append(what)

    armed: list[bool] = []
    await rig.service.close()
    rig.service = await Service.open(rig.path / "state", witness=witness)
    await rig.copy("vdb")
    await rig.ready("vdb")
    armed.append(True)
    try:
        async with asyncio.timeout(FREED_SECONDS):
            with pytest.raises(errors.BlockferryError) as caught:
                await (rig.copy("vda") if step == "blockdev-mirror" else rig.pivot("vdb"))
        assert seen == [step]
        known = errors.QmpTimeout if step == "query-jobs" else errors.OperationUnsettled
        assert isinstance(caught.value, known)
        assert "no answer within 0.5 s" in str(caught.value) or "did not answer" in str(caught.value)
        async with asyncio.timeout(FREED_SECONDS):
            shown = await rig.show()
        assert shown.state == "unreachable"
        assert f"its process {rig.guest.pid} is stopped" in str(shown.reason)
    finally:
        rig.guest.process.signal(signal.SIGCONT)
    await rig.settled()
    what, state = (await rig.operations())[-1]
    assert await rig.status() == "running"
    # Whether QEMU still reads what it was sent before it was stopped is its own affair: the copy is begun then.
    begun = {"vda": "ready"} if (what, state) == ("copy", "in-progress") and step == "blockdev-mirror" else {}
    if not begun:
        assert state == ("in-progress" if step == "query-jobs" else "undone")
    else:
        await rig.ready("vda")
    assert await rig.states() == {"vdb": "ready"} | begun
    await rig.pivot("vdb")
    await rig.guest.stop()
    assert rig.holds("vdb", rig.dest("vdb"), "raw")


async def test_other_domains_are_not_held_up(tmp_path: Path) -> None:
    """While one QEMU is stopped and a request waits for it, another's snapshot is taken."""
    qemu = find_qemu("distribution")
    folders = [tmp_path / "a", tmp_path / "b"]
    async with contextlib.AsyncExitStack() as stack:
        guests = []
        for folder in folders:
            folder.mkdir()
            disk = make_image(qemu, folder / "vda.img", "qcow2", SIZE)
            guests.append(
                await stack.enter_async_context(TestQemu(qemu, folder, args=blockdev_disk("d0", disk, "qcow2")))
            )
        service = await Service.open(tmp_path)
        stack.push_async_callback(service.close)
        for folder, guest in zip(folders, guests, strict=True):
            await service.submit(ask.Attach(domain=folder.name, qmp=str(guest.qmp)))
        guests[0].process.signal(signal.SIGSTOP)
        waiting = asyncio.create_task(service.submit(ask.ListJobs(domain="a")))
        wish = SnapshotWish(disks=(DiskWish(name="vda", file=str(tmp_path / "b" / "s1")),))
        await service.submit(ask.CreateSnapshot(domain="b", wish=wish))
        assert not waiting.done(), "its QEMU is stopped"
        guests[0].process.signal(signal.SIGCONT)
        await waiting


@pytest.mark.parametrize("qemu", ["distribution"], indirect=True)
async def test_who_waits_is_told_for_whom(faulty: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that does not come to its end: others get its number and since when, and nothing of theirs is done."""
    monkeypatch.setattr(turns, "BUSY_SECONDS", 0.3)
    gate = faulty.proxy.pause_before("transaction")
    first = asyncio.create_task(faulty.snapshot("s1"))
    await gate.reached()
    for refused in (faulty.snapshot("s2"), faulty.copy("vda"), faulty.commit("vda")):
        with pytest.raises(
            errors.DomainBusy, match=r"busy with operation 1 \(snapshot\) since 2\d+-\d\d-\d\dT"
        ) as caught:
            await refused
        assert (caught.value.operation, caught.value.code) == (1, "domain-busy")
    assert list((await faulty.ask(ask.Recover())).unreachable) == ["vm1"]
    gate.release()
    await first
    assert set(await faulty.snapshots()) == {"s1"}
    assert await faulty.operations() == [("snapshot", "done")]
