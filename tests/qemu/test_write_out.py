"""A destination is written out while it is filled, by a process beside, which is there for no longer."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import FORMATS, SIZE, Rig

from blockferry.model import request as ask
from blockferry.qemu import flusher, syncing
from blockferry.qemu.process import born, ends
from blockferry.testing import make_image
from blockferry.testing.trace import strace

SLOW = 256 << 10  # bytes a second: it would take a minute
WAIT_SECONDS = 20.0


def beside() -> dict[int, list[str]]:
    """The flushers of this process, and what they see to."""
    found = {}
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads and processes end meanwhile
            for pid in children.read_text().split():
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if flusher.__file__ in words:
                    found[int(pid)] = words[words.index(flusher.__file__) + 1 : -1]
    return found


async def comes() -> tuple[int, list[str]]:
    async with asyncio.timeout(WAIT_SECONDS):
        while not (found := beside()):  # noqa: ASYNC110 - nobody says that a process has begun
            await asyncio.sleep(0)
    (one,) = found.items()
    return one


@pytest.mark.parametrize("way", ["is ready", "is cancelled", "nobody looks any more"])
async def test_while_it_is_filled_and_no_longer(rig: Rig, way: str) -> None:
    await rig.write("vda", 0x60, 0, SIZE)
    await rig.copy("vda", bandwidth=SLOW)
    pid, files = await comes()
    started = born(pid)
    assert files == [str(rig.dest("vda"))]
    match way:
        case "is ready":
            await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
            await rig.ready("vda")
        case "is cancelled":
            await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
        case _:
            await rig.service.close()
    assert await ends(pid, started, WAIT_SECONDS)
    if way == "nobody looks any more":
        await rig.reopen_service()
        assert (await comes())[1] == files, "whoever goes on with it sees to it again"


@pytest.mark.parametrize("way", ["copy", "move"])
async def test_an_export_of_a_server_that_takes_several_clients_is_flushed_meanwhile(
    rig: Rig, tmp_path: Path, way: str
) -> None:
    """Again and again, over a connection of ours: QEMU has it flushed once, when it is full."""
    trace = tmp_path / "trace"
    os.mkfifo(trace)
    await rig.write("vda", 0x60, 0, SIZE)
    async with rig.server(make_image(rig.qemu, rig.path / "exported", "raw", SIZE)) as server:
        attached = [*strace(trace, "fdatasync")[:-1], "-p", str(server.pid)]
        tracer = await asyncio.create_subprocess_exec(*attached)
        with await asyncio.to_thread(trace.open) as calls:
            asked = (line for line in calls if "fdatasync(" in line)
            if way == "copy":
                await rig.copy("vda", server.uri, format="raw", bandwidth=SLOW)
            else:
                await rig.ask(
                    ask.MoveStorage(
                        domain="vm1", dest=str(rig.dst), disks={"vda": server.uri}, format="raw", bandwidth=SLOW
                    )
                )
            async with asyncio.timeout(WAIT_SECONDS):
                assert await asyncio.to_thread(lambda: [bool(next(asked, "")) for _time in range(2)]) == [True] * 2
            assert beside() == {}, "a server is asked by ourselves"
            tracer.terminate()
            await tracer.wait()
        await rig.service.close()


def test_it_ends_with_whoever_began_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-I', '-S', {flusher.__file__!r}, {str(image)!r}], stdin=-1)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        started = born(pid)
        parent.kill()
    assert asyncio.run(ends(pid, started, WAIT_SECONDS))


def test_the_kernel_is_asked_to_begin_and_nothing_more(tmp_path: Path) -> None:
    """Also where there is something between that is no image, or nothing: a FIFO would hang whoever opens it."""
    image, fifo, trace = tmp_path / "disk.img", tmp_path / "fifo", tmp_path / "trace"
    image.write_bytes(bytes(1 << 16))
    os.mkfifo(fifo)
    words = [sys.executable, "-I", "-S", flusher.__file__, *map(str, (tmp_path / "missing", fifo, tmp_path, image))]
    subprocess.run(
        [*strace(trace, "sync_file_range"), *words], stdin=subprocess.DEVNULL, check=True, timeout=WAIT_SECONDS
    )
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    (asked,) = [call for call in calls if call.startswith("sync_file_range")]
    assert asked.endswith(f"<{image}>, 0, 0, SYNC_FILE_RANGE_WRITE) = 0")
    opened = [call for call in calls if call.startswith("open") and str(fifo) in call]
    assert opened
    assert all("O_PATH" in call for call in opened), "a FIFO, and a device that is no disk, is looked at only"
    assert not [call for call in calls if call.startswith(("fsync", "fdatasync", "pwrite"))]


def test_the_kernel_is_asked_again_until_the_end(tmp_path: Path) -> None:
    """What is written after the first time is to be written out too."""
    image, trace = tmp_path / "disk.img", tmp_path / "trace"
    image.write_bytes(bytes(1 << 16))
    os.mkfifo(trace)
    words = [*strace(trace, "sync_file_range"), sys.executable, "-I", "-S", flusher.__file__, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process, trace.open() as calls:
        assert process.stdin is not None
        asked = (line for line in calls if "sync_file_range(" in line)
        assert [f"<{image}>" in next(asked, "") for _time in range(3)] == [True] * 3
        process.stdin.close()
        for _line in calls:
            pass
    assert process.returncode == 0


def test_a_long_copy_is_asked_for_less_often() -> None:
    """What comes in between is flushed while everybody waits: a hundredth of all that it took."""
    assert [flusher.pause_after(seconds) for seconds in (0, 1, 2, 10, 25, 3600)] == [0.02, 0.02, 0.02, 0.1, 0.25, 0.25]


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The files that go to the disk in pieces from now on."""
    real, found = syncing.sync_file_range, set()

    def seen(descriptor: int, *arguments: Any) -> Any:
        found.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        return real(descriptor, *arguments)

    monkeypatch.setattr(syncing, "sync_file_range", seen)
    return found


async def test_before_a_window_files_go_to_the_disk_in_pieces(rig: Rig, in_pieces: set[Path]) -> None:
    """A guest waits for whoever finds room for what it has written."""
    await rig.copy("vda")
    await rig.ready("vda")
    assert in_pieces == set()
    await rig.pivot("vda")
    assert in_pieces == {rig.source("vda"), rig.dest("vda")}


async def test_before_its_disks_get_overlays_too(rig: Rig, in_pieces: set[Path]) -> None:
    await rig.snapshot()
    assert in_pieces == {rig.source(target) for target in FORMATS}
