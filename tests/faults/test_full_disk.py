"""A full disk under the state directory refuses what is new, and harms nothing that runs."""

import contextlib
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rig import ALL, FORMATS, Rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.service import Service

STATE_BYTES = 2 << 20  # less than the write-ahead log takes before it is begun anew: every write needs room


@dataclass
class Disk:
    """The state directory's file system, and the boundary at which it is to be full."""

    folder: Path
    due: tuple[str, str] | None = None
    passed: list[tuple[str, str]] = field(default_factory=list)

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        (self.folder / "filler").unlink()

    def witness(self, when: str, what: str) -> None:
        self.passed.append((when, what))
        if (when, what) == self.due:
            self.due = None
            self.fill()


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, timeout=20)


@contextlib.asynccontextmanager
async def on_a_small_disk(rig: Rig) -> AsyncIterator[Disk]:
    disk = Disk(rig.path / "state")
    await rig.service.close()
    run("mount", "-t", "tmpfs", "-o", f"size={STATE_BYTES}", "tmpfs", disk.folder)
    try:
        rig.service = await Service.open(disk.folder, witness=disk.witness)
        await rig.reattach()
        yield disk
        await rig.service.close()
    finally:
        run("umount", "-l", disk.folder)


@pytest.mark.parametrize("qemu", ["distribution"], indirect=True)
async def test_new_operations_are_refused_and_copies_go_on(rig: Rig) -> None:
    async with on_a_small_disk(rig) as disk:
        await rig.copy("vda")
        await rig.ready("vda")
        await rig.pauses_heard()
        disk.fill()
        cancel = rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
        for refused in (rig.snapshot(only=("sda",)), rig.copy("vdb"), rig.pivot("vda"), cancel):
            with pytest.raises(errors.JournalUnwritable, match="Make room, then try again"):
                await refused
        assert await rig.pauses_heard() == []
        assert not [name for name in await rig.our_nodes() if "-vdb-" in name]
        assert [file for file in rig.files() if "s1" in file or "vdb.copy" in file] == []
        await rig.write("vda", 0x81)
        await rig.ready("vda")
        assert await rig.states() == {"vda": "ready"}
        assert (await rig.show()).state == "running"
        disk.make_room()
        await rig.pivot("vda")
        await rig.guest.stop()
        assert rig.holds("vda", rig.dest("vda"), FORMATS["vda"])


@pytest.mark.parametrize(
    ("qemu", "due", "ends"),
    [
        ("distribution", ("before", "stop"), "undone"),
        ("distribution", ("before", "cont"), "done"),
        ("qemu10", ("before", "job-complete"), "undone"),
        ("qemu10", ("after", "job-finalize"), "done"),
    ],
    indirect=["qemu"],
)
async def test_no_window_leaves_the_guest_paused(rig: Rig, due: tuple[str, str], ends: str) -> None:
    async with on_a_small_disk(rig) as disk:
        for target in ALL:
            await rig.copy(target)
        await rig.ready(*ALL)
        disk.due = due
        with pytest.raises((errors.OperationUnsettled, errors.JournalUnwritable)) as caught:
            await rig.pivot(*ALL)
        assert "full" in str(caught.value) or "I/O" in str(caught.value)
        assert disk.due is None
        assert await rig.status() == "running"
        await rig.write_each(dict.fromkeys(ALL, 0x82))
        disk.make_room()
        await rig.settled()
        assert (await rig.operations())[-1] == ("pivot", ends)
        if ends == "undone":
            assert await rig.states() == dict.fromkeys(ALL, "lost" if rig.is_held else "ready")
            for target in ALL if rig.is_held else ():
                rig.dest(target).unlink()
                await rig.copy(target)
            await rig.ready(*ALL)
            await rig.pivot(*ALL)
        for target in ALL:
            assert await rig.chain(target) == [str(rig.dest(target))]
        await rig.guest.stop()
        for target in ALL:
            assert rig.holds(target, rig.dest(target), FORMATS[target])
