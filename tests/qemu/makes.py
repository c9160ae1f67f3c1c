"""Disks of every make that docs/guests.md names, as people type them, for one guest that has them all."""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rig import SIZE, Rig, open_guest

from blockferry.testing import QemuBinaries, make_image


@dataclass(frozen=True)
class Make:
    """A way to give a guest a disk.

    In `args`, IMAGE is its file, NODE the options of a `-blockdev` (named TARGET-node, on TARGET-file), DRIVE those of a
    `-drive` without its `if`.

    Attributes:
        target: what it is to be called.
        what: the device, as in docs/guests.md.
        given: how it is given to QEMU, as there.
        format: of its image.
        args: what is typed.
        iothread: whether it has one.
        direct: whether it is opened with O_DIRECT.
        since: the first QEMU that has it.
    """

    target: str
    what: str
    given: str
    format: str
    args: str
    iothread: bool = False
    direct: bool = False
    since: int = 0

    @property
    def bus(self) -> str:
        """Libvirt's name for it."""
        return {"AHCI": "sata", "virtio-blk": "virtio", "NVMe": "nvme", "IDE": "ide", "USB": "usb"}.get(
            self.what.split()[0], "scsi"
        )

    def arguments(self, folder: Path) -> list[str]:
        """QEMU's."""
        image = folder / f"{self.target}.img"
        cache = ",cache.direct=on" if self.direct else ""
        node = (
            f"-blockdev driver=file,node-name=TARGET-file,filename=IMAGE{cache} "
            f"-blockdev driver={self.format},node-name=TARGET-node,file=TARGET-file{cache}"
        )
        text = self.args.replace("-NODE", node).replace("DRIVE", f"file=IMAGE,format={self.format}")
        return [word.replace("TARGET", self.target).replace("IMAGE", str(image)) for word in text.split()]


# In the order of their targets: QEMU gives devices their PCI addresses in the order of the command line.
PC = (
    Make("vda", "virtio-blk", "-blockdev", "qcow2", "-NODE -device virtio-blk-pci,drive=TARGET-node,id=TARGET-dev"),
    Make(
        "vdb",
        "virtio-blk",
        "-blockdev",
        "qcow2",
        "-NODE -object iothread,id=io0 -device virtio-blk-pci,drive=TARGET-node,id=TARGET-dev,iothread=io0",
        iothread=True,
    ),
    Make(
        "vdc",
        "virtio-blk",
        "-blockdev",
        "raw",
        "-NODE -object iothread,id=io1 -device virtio-blk-pci,drive=TARGET-node,iothread=io1",
        iothread=True,
        direct=True,
    ),
    Make(
        "vdd",
        "virtio-blk",
        "-drive if=none",
        "raw",
        "-drive DRIVE,if=none,id=d3 -object iothread,id=io2 -device virtio-blk-pci,drive=d3,iothread=io2",
        iothread=True,
    ),
    Make(
        "vde",
        "virtio-blk",
        "-drive if=none",
        "qcow2",
        "-drive DRIVE,if=none,id=d4,copy-on-read=on,cache=none -device virtio-blk-pci,drive=d4",
        direct=True,
    ),
)


def makes_for(qemu: QemuBinaries, makes: Sequence[Make]) -> list[Make]:
    """Those that this QEMU has."""
    major = 10 if "qemu10" in str(qemu.system) else 7
    return [make for make in makes if make.since <= major]


@contextlib.contextmanager
def direct_folder(path: Path) -> Iterator[Path]:
    """A folder on a file system that has O_DIRECT, which not every tmpfs does: `path`, or one of our own."""
    for folder in (path, Path("/var/tmp"), Path(__file__).parent):  # a folder of our own is made in it
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            try:
                os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
            except OSError:
                continue
        if folder == path:
            yield path
        else:
            with tempfile.TemporaryDirectory(prefix="blockferry-direct-", dir=folder) as own:
                yield Path(own)
        return
    raise AssertionError("no file system here has O_DIRECT, which some of these disks are opened with")


@contextlib.asynccontextmanager
async def open_makes(
    qemu: QemuBinaries, path: Path, makes: Sequence[Make], more: Sequence[str] = (), *, machine: str = "pc"
) -> AsyncIterator[Rig]:
    """A guest that runs, with these disks (empty) and `more`, a proxy before its QMP socket."""
    with direct_folder(path) as folder:
        images: dict[str, bytes] = {}
        for make in makes:
            image = folder / f"{make.target}.img"
            if make.format in images:
                image.write_bytes(images[make.format])
            else:
                images[make.format] = make_image(qemu, image, make.format, SIZE).read_bytes()
        args = [word for make in makes for word in make.arguments(folder)]
        written = {make.target: bytearray(SIZE) for make in makes}
        async with open_guest(qemu, folder, [*args, *more], written, proxy=True, machine=machine) as rig:
            yield rig
