"""What both sides have in common: how a guest looks and what a case asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from qemu.qmp import EventListener

from blockferry.testing import build_guest
from blockferry.testing.guest import BOOT_OPTIONS
from blockferry.testing.initramfs import newc_archive

MEMORY_MIB = 128
PROCESSORS = 2
BOOT_SECONDS = 60.0  # 6 to 10 s here
# It is at rest when it was found so at so many looks in a row.
RESTED_LOOKS = 5
RESTED_PAUSE_SECONDS = 0.05
MIB = 1024 * 1024
# The paced guest writes this much at once, and so often; see paced-init.sh.
PACED_BYTES = 64 * 1024
TICKS_PER_SECOND = 5
PACED_INIT = Path(__file__).with_name("paced-init.sh")

Way = Literal["mirror", "offload", "blockcopy"]


@dataclass(frozen=True)
class Image:
    """A disk's image: `target` is the disk's name in the guest, `format` qcow2 or raw."""

    target: str
    path: Path
    format: str


@dataclass(frozen=True)
class Boot:
    """The test kit's Linux guest, which writes to its disks and flushes all the time.

    Attributes:
        kernel: its kernel.
        initrd: its initramfs.
        append: the kernel's command line.
        disks: to which it writes.
        acks: what its second serial port says, a line for everything that is safe.
        console: what its first one says.
    """

    kernel: Path
    initrd: Path
    append: str
    disks: tuple[str, ...]
    acks: Path
    console: Path

    async def writing(self) -> None:
        """Wait until it has flushed something to every disk.

        Raises:
            TimeoutError: it did not boot.
        """
        async with asyncio.timeout(BOOT_SECONDS):
            while True:
                said = self.acks.read_text(errors="replace").split() if self.acks.exists() else []
                if set(self.disks) <= set(said):
                    return
                await asyncio.sleep(0.2)


def boot(images: list[Image], folder: Path) -> Boot:
    """A guest that writes to all of these, with copies of its files in `folder`, where every user can read them."""
    built = build_guest()
    disks = tuple(image.target for image in images)
    kernel, initrd = (
        Path(shutil.copy(path, folder / name)) for path, name in ((built.kernel, "k"), (built.initrd, "i"))
    )
    for path in (kernel, initrd):
        path.chmod(0o644)
    append = f"{BOOT_OPTIONS} bf_disks={','.join(disks)} bf_run=bench bf_first=0 bf_slots=1024 bf_batch=4 bf_block=256"
    return Boot(kernel, initrd, append, disks, folder / "acks", folder / "console")


def paced(images: list[Image], folder: Path, rate: int, span: int) -> Boot:
    """A guest that writes `rate` bytes a second to these disks, all together, in the first `span` bytes of each.

    Its kernel unpacks one archive over the other: the first process is another than the test kit's.
    """
    plain = boot(images, folder)
    with plain.initrd.open("ab") as initrd:
        initrd.write(gzip.compress(newc_archive({"init": PACED_INIT.read_bytes()}, ()), compresslevel=1))
    writes = rate // TICKS_PER_SECOND // PACED_BYTES // len(images)
    append = f"{BOOT_OPTIONS} bf_disks={','.join(plain.disks)} bf_writes={writes} bf_span={span // PACED_BYTES}"
    return dataclasses.replace(plain, append=append)


def targets(count: int) -> list[str]:
    """Names of disks: vda, vdb..."""
    return [f"vd{chr(ord('a') + index)}" for index in range(count)]


def snapshot_xml(name: str, overlays: dict[str, Path], mirrors: dict[str, Path] | None = None) -> str:
    """`<domainsnapshot>` with the overlay of each target, for both sides; mirrors are blockferry's alone."""
    disks = ""
    for target, overlay in overlays.items():
        mirror = f"<mirror file='{mirrors[target]}'/>" if mirrors else ""
        disks += f"<disk name='{target}' snapshot='external'><source file='{overlay}'/>{mirror}</disk>"
    return f"<domainsnapshot><name>{name}</name><disks>{disks}</disks></domainsnapshot>"


class Guest(Protocol):
    """A running guest, seen from one side. Every method does the whole of what it says, and proves it, or raises.

    Each answers what a round of its case gives: milliseconds by the key of the figure.
    """

    async def snapshot(self, overlays: dict[str, Path]) -> dict[str, float]:
        """Snapshot these disks at one instant."""
        ...

    async def mirrored(self, overlays: dict[str, Path], mirrors: dict[str, Path]) -> dict[str, float]:
        """Snapshot these disks at one instant, with a mirror of each overlay."""
        ...

    async def copy(self, image: Image, to: Path) -> dict[str, float]:
        """Copy a disk until the copy follows all writes."""
        ...

    async def pivot(self, copies: dict[str, Path]) -> dict[str, float]:
        """Copy these disks, not measured, and let the guest go over to the copies, measured."""
        ...

    async def move(self, way: Way, images: list[Image], folder: Path, uri: str | None) -> dict[str, float]:
        """Move all disks to a folder, under their own names, or the only one to an NBD export: `move`, and `split`.

        `split` is as in `pivot`; a side that pauses nothing has none of one disk.

        Args:
            way: one that the side knows.
            images: the disks'.
            folder: where to.
            uri: of the export; None for none.
        """
        ...

    async def command(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Have QEMU execute a QMP command, past whoever is in charge of it."""
        ...


def moved_by_jobs(ended: EventListener) -> int:
    """Bytes that block jobs have moved, of BLOCK_JOB_COMPLETED events that were not looked at yet."""
    data: list[Any] = [event["data"] for event in ended.clear()]
    return sum(each["offset"] for each in data)


async def at_rest(guest: Guest) -> None:
    """Wait until a guest's firmware has nothing left to do: emulated, it takes one of two processors until then.

    Raises:
        TimeoutError: it went on and on.
    """
    async with asyncio.timeout(BOOT_SECONDS):
        rested = 0
        while rested < RESTED_LOOKS:
            said = str(await guest.command("human-monitor-command", {"command-line": "info registers -a"}))
            # Between two things to do it waits for a moment, too.
            rested = rested + 1 if said.count("HLT=1") == PROCESSORS else 0
            await asyncio.sleep(RESTED_PAUSE_SECONDS)


class Side(Protocol):
    """blockferry or libvirt, warm: started once for all rounds."""

    name: str
    version: str

    def guest(
        self, images: list[Image], folder: Path, boot: Boot | None
    ) -> contextlib.AbstractAsyncContextManager[Guest]:
        """Start a guest with these disks and take charge of it; it ends with the block.

        Args:
            images: its disks.
            folder: for what it leaves.
            boot: what it runs; None for its firmware alone.
        """
        ...

    def own(self, path: Path) -> None:
        """Make a file or folder that of the user under whom this side's QEMU runs."""
        ...


@contextlib.asynccontextmanager
async def running(side: Side, images: list[Image], folder: Path, boot: Boot | None) -> AsyncIterator[Guest]:
    """A guest that writes, or is at rest: see Side.guest. One that does not come up is started again, once.

    Both sides' guests have two processors, and QEMU before 8.1 lets a boot stand still now and then:
    blockferry.testing.processors.

    Raises:
        TimeoutError: nor did the second.
    """
    for last in (False, True):
        async with side.guest(images, folder, boot) as guest:
            try:
                await (boot.writing() if boot is not None else at_rest(guest))
            except TimeoutError:
                if last:
                    raise
                continue
            yield guest
            return
