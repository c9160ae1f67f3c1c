"""Disks of every make that docs/guests.md names, as people type them, for one guest that has them all."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rig import MIB, SIZE, Rig, open_guest

from blockferry.testing import QemuBinaries, make_image


@dataclass(frozen=True)
class Make:
    """A way to give a guest a disk.

    Attributes:
        target: what it is to be called.
        what: the device, as in docs/guests.md.
        given: how it is given to QEMU, as there.
        format: of its image.
        args: what is typed: IMAGE stands for its file, -NODE for a format node TARGET-node on a file node TARGET-file, -DRIVE
            for a `-drive` with its image and format.
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
        return BUSES[self.what.split()[0]]

    @property
    def row(self) -> str:
        """Its line in docs/guests.md."""
        more = [each for each, so in (("iothread", self.iothread), ("O_DIRECT", self.direct)) if so]
        more += [word for word in ("copy-on-read", "throttling", "iothread-vq-mapping") if word in self.args]
        more += [f"QEMU {self.since} and later"] if self.since else []
        return f"| {self.what} | `{self.given}` | {self.format} | {', '.join(more) or '-'} |"

    def arguments(self, folder: Path) -> list[str]:
        """QEMU's."""
        image = folder / f"{self.target}.img"
        cache = ",cache.direct=on" if self.direct else ""
        node = (
            f"-blockdev driver=file,node-name=TARGET-file,filename=IMAGE{cache} "
            f"-blockdev driver={self.format},node-name=TARGET-node,file=TARGET-file{cache}"
        )
        drive = f"-drive file=IMAGE,format={self.format}{',cache=none' if self.direct else ''}"
        text = self.args.replace("-NODE", node).replace("-DRIVE", drive)
        return [word.replace("TARGET", self.target).replace("IMAGE", str(image)) for word in text.split()]


BUSES = {
    "virtio-blk": "virtio",
    "virtio-scsi": "scsi",
    "lsi53c895a": "scsi",
    "SATA": "sata",
    "IDE": "ide",
    "USB": "usb",
    "NVMe": "nvme",
}
IO = "-object iothread,id=TARGET-io"
BLK = "-device virtio-blk-pci,id=TARGET-dev"
HBA = "-device virtio-scsi-pci,id=TARGET-bus"
USB = "-device qemu-xhci,id=TARGET-bus"

# QEMU gives devices their PCI addresses, which targets follow, in the order of the command line; `if=virtio` come last.
PC = (
    Make("vda", "virtio-blk", "-blockdev", "qcow2", f"-NODE {BLK},drive=TARGET-node"),
    Make(
        "vdb",
        "virtio-blk",
        "-blockdev",
        "qcow2",
        f"-NODE {IO} {BLK},drive=TARGET-node,iothread=TARGET-io",
        iothread=True,
    ),
    Make(
        "vdc",
        "virtio-blk",
        "-blockdev",
        "raw",
        f"-NODE {IO} -device virtio-blk-pci,drive=TARGET-node,iothread=TARGET-io",
        iothread=True,
        direct=True,
    ),
    Make(
        "vdd",
        "virtio-blk",
        "-drive if=none",
        "raw",
        f"-DRIVE,if=none,id=d3 {IO} {BLK},drive=d3,iothread=TARGET-io",
        iothread=True,
    ),
    Make(
        "vde",
        "virtio-blk",
        "-drive if=none",
        "qcow2",
        f"-DRIVE,if=none,id=d4,copy-on-read=on {BLK},drive=d4",
        direct=True,
    ),
    Make("sda", "virtio-scsi", "-blockdev", "qcow2", f"-NODE {HBA} -device scsi-hd,bus=sda-bus.0,drive=TARGET-node"),
    Make(
        "sdb",
        "virtio-scsi",
        "-blockdev",
        "raw",
        f"-NODE {IO} {HBA},iothread=TARGET-io -device scsi-hd,bus=sdb-bus.0,drive=TARGET-node,id=TARGET-dev",
        iothread=True,
    ),
    # A second disk of the same controller, and so of the same iothread.
    Make(
        "sdc",
        "virtio-scsi",
        "-drive if=none",
        "qcow2",
        "-DRIVE,if=none,id=d5 -device scsi-hd,bus=sdb-bus.0,drive=d5",
        iothread=True,
    ),
    Make(
        "sdd",
        "lsi53c895a",
        "-drive if=none",
        "raw",
        "-DRIVE,if=none,id=d6 -device lsi53c895a,id=TARGET-bus -device scsi-hd,bus=sdd-bus.0,drive=d6",
    ),
    Make(
        "sde",
        "SATA (AHCI)",
        "-blockdev",
        "qcow2",
        "-NODE -device ich9-ahci,id=TARGET-bus -device ide-hd,bus=sde-bus.0,drive=TARGET-node,id=TARGET-dev",
    ),
    Make("sdf", "SATA (AHCI)", "-drive if=none", "raw", "-DRIVE,if=none,id=d7 -device ide-hd,bus=sde-bus.1,drive=d7"),
    Make(
        "sdg",
        "USB (usb-storage)",
        "-blockdev",
        "qcow2",
        f"-NODE {USB} -device usb-storage,bus=sdg-bus.0,drive=TARGET-node",
    ),
    Make(
        "sdh",
        "USB (usb-bot)",
        "-drive if=none",
        "raw",
        "-DRIVE,if=none,id=d8 -device usb-bot,id=TARGET-bot,bus=sdg-bus.0 -device scsi-hd,bus=sdh-bot.0,drive=d8",
    ),
    Make("nvme0n1", "NVMe", "-blockdev", "qcow2", "-NODE -device nvme,serial=TARGET,drive=TARGET-node,id=TARGET-dev"),
    Make("nvme1n1", "NVMe", "-drive if=none", "raw", "-DRIVE,if=none,id=d9 -device nvme,serial=TARGET,drive=d9"),
    Make("hda", "IDE", "-hda", "qcow2", "-hda IMAGE"),
    Make("hdb", "IDE", "-drive if=ide", "raw", "-DRIVE,if=ide,index=1"),
    Make("hdc", "IDE", "-blockdev", "qcow2", "-NODE -device ide-hd,bus=ide.1,unit=0,drive=TARGET-node"),
    Make("vdf", "virtio-blk", "-drive if=virtio", "raw", "-DRIVE,if=virtio"),
    Make("vdg", "virtio-blk", "-drive if=virtio", "qcow2", "-DRIVE,if=virtio,throttling.iops-total=100000"),
)

PORT = "-device pcie-root-port,id=TARGET-port,chassis="
Q35 = (
    Make(
        "vda", "virtio-blk", "-drive if=none", "qcow2", f"{PORT}1 -DRIVE,if=none,id=d0 {BLK},drive=d0,bus=TARGET-port"
    ),
    Make(
        "vdb",
        "virtio-blk",
        "-blockdev",
        "qcow2",
        f"-NODE {PORT}2 {IO} {IO}-2 -device "
        '{"driver":"virtio-blk-pci","drive":"TARGET-node","bus":"TARGET-port",'
        '"iothread-vq-mapping":[{"iothread":"TARGET-io"},{"iothread":"TARGET-io-2"}]}',
        iothread=True,
        since=9,
    ),
    Make(
        "nvme0n1",
        "NVMe",
        "-blockdev",
        "raw",
        f"-NODE {PORT}3 -device nvme,serial=TARGET,bus=TARGET-port,drive=TARGET-node",
    ),
    Make("sda", "SATA (AHCI)", "-hda", "qcow2", "-hda IMAGE"),
)


@dataclass(frozen=True)
class LeftAlone:
    """A drive that no snapshot is taken of: what it is called, what it is, why it is left out, and what is typed.

    In `args`, MEDIUM is a raw image of 1 MiB.
    """

    target: str
    what: str
    reason: str
    args: str

    @property
    def row(self) -> str:
        """Its line in docs/guests.md."""
        return f"| {self.what} | {self.reason} |"

    def arguments(self, folder: Path) -> list[str]:
        """QEMU's."""
        return self.args.replace("MEDIUM", str(folder / f"{self.target}.medium")).split()


READ_ONLY = "-blockdev driver=raw,node-name=ro,read-only=on,file.driver=file,file.filename=MEDIUM"
PC_ALONE = (
    LeftAlone("vdh", "a read-only disk", "it is read-only", f"{READ_ONLY} -device virtio-blk-pci,drive=ro,addr=0x1e"),
    LeftAlone(
        "sdi",
        "a cdrom",
        "it is a cdrom",
        "-drive file=MEDIUM,format=raw,if=none,id=cd,media=cdrom "
        "-device virtio-scsi-pci,id=cd-bus,addr=0x1f -device scsi-cd,bus=cd-bus.0,drive=cd,id=cd-dev",
    ),
    LeftAlone("hdd", "an empty cdrom or floppy drive", "the drive is empty", "-drive if=ide,index=3,media=cdrom"),
    LeftAlone("fda", "a floppy with a medium", "it is a floppy", "-drive if=floppy,format=raw,file=MEDIUM"),
    LeftAlone("fdb", "an empty cdrom or floppy drive", "the drive is empty", "-device floppy"),
)
Q35_ALONE = (LeftAlone("sdb", "a cdrom with a medium", "it is a cdrom", "-cdrom MEDIUM"),)
MACHINES = {"pc": PC, "q35": Q35}
LEFT_ALONE = {"pc": PC_ALONE, "q35": Q35_ALONE}


def makes_of(qemu: QemuBinaries, machine: str) -> list[Make]:
    """Those that this QEMU has."""
    version = subprocess.run([qemu.img, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    major = int(version.split()[2].split(".")[0])
    return [make for make in MACHINES[machine] if make.since <= major]


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


def make_disks(qemu: QemuBinaries, folder: Path, makes: Sequence[Make], alone: Sequence[LeftAlone] = ()) -> list[str]:
    """Make the images, empty ones, and return QEMU's arguments."""
    images: dict[str, bytes] = {}
    for make in makes:
        image = folder / f"{make.target}.img"
        if make.format in images:
            image.write_bytes(images[make.format])
        else:
            images[make.format] = make_image(qemu, image, make.format, SIZE).read_bytes()
    for drive in alone:
        (folder / f"{drive.target}.medium").write_bytes(bytes(MIB))
    return [word for each in (*makes, *alone) for word in each.arguments(folder)]


@contextlib.asynccontextmanager
async def open_makes(
    qemu: QemuBinaries,
    path: Path,
    makes: Sequence[Make],
    alone: Sequence[LeftAlone] = (),
    *,
    machine: str = "pc",
    proxy: bool = False,
) -> AsyncIterator[Rig]:
    """A guest that runs, with these disks and drives."""
    with direct_folder(path) as folder:
        args = make_disks(qemu, folder, makes, alone)
        written = {make.target: bytearray(SIZE) for make in makes}
        async with open_guest(qemu, folder, args, written, proxy=proxy, machine=machine) as rig:
            yield rig
