"""What both sides have in common: how a guest looks and what a case asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blockferry.testing import build_guest
from blockferry.testing.guest import BOOT_OPTIONS

MEMORY_MIB = 128
PROCESSORS = 2
BOOT_SECONDS = 120.0


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
