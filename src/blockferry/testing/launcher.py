"""Real QEMU processes for tests: found, started under TCG with disks and QMP sockets, killed without mercy.

A QEMU that is started with ``-S`` (the default) runs no guest code, is up in well under a second and has
real disks, jobs and a real block graph; most tests of block operations need no more.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from qemu.qmp import Message, QMPClient, QMPError

from blockferry.testing.firmware import idle_firmware
from blockferry.testing.missing import MissingComponentError
from blockferry.testing.process import ChildProcess, socket_path

REPO_ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 30.0  # QEMU answers after 0.1 to 0.4 s; a loaded machine is allowed a hundred times that
QUIT_TIMEOUT_S = 10.0  # `quit` flushes and closes the images; a hung destination may prevent it for ever

QemuVersion = Literal["distribution", "qemu10"]
Bus = Literal["virtio", "scsi", "ide", "sata", "nvme", "usb"]


@dataclass(frozen=True)
class QemuBinaries:
    """The programs of one QEMU version."""

    system: Path
    img: Path
    nbd: Path
    io: Path


def qemu10_dir() -> Path:
    """Return the folder of QEMU 10's programs: BLOCKFERRY_QEMU10_DIR, or where scripts/qemu10.sh puts them."""
    return Path(os.environ.get("BLOCKFERRY_QEMU10_DIR") or REPO_ROOT / ".cache/qemu10/bin")


def find_qemu(version: QemuVersion | Path) -> QemuBinaries:
    """Find the programs of one QEMU version.

    Args:
        version: "distribution" (found on PATH), "qemu10" (see `qemu10_dir`), or the folder that holds them.

    Raises:
        MissingComponentError: one of the programs is not there; says what installs it.
    """
    if version == "distribution":
        folder, remedy = None, "apt-get install qemu-system-x86 qemu-utils"
    elif version == "qemu10":
        folder, remedy = qemu10_dir(), "make setup"
    else:
        folder, remedy = Path(version), f"ls {version}, it should hold QEMU's programs"

    def program(name: str) -> Path:
        found = shutil.which(name, path=folder)
        if found is None:
            raise MissingComponentError(f"{name} (in {folder or 'PATH'})", remedy)
        return Path(found)

    return QemuBinaries(
        system=program("qemu-system-x86_64"),
        img=program("qemu-img"),
        nbd=program("qemu-nbd"),
        io=program("qemu-io"),
    )


@functools.cache
def qemu_version(binaries: QemuBinaries) -> tuple[int, int]:
    """Return the version of this QEMU, such as (7, 2)."""
    said = subprocess.run([binaries.system, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    major, minor, _rest = said.split()[3].split(".", 2)
    return int(major), int(minor)


def processors(binaries: QemuBinaries) -> int:
    """Return how many processors a Linux may have that this QEMU emulates: 2, or 1 before QEMU 8.1.

    Until then QEMU translates code without a lock on its page, and does not notice what the other processor writes there meanwhile.
    Linux changes its own code while it boots, by way of an int3: a boot meets that int3 for ever now and then.
    """
    return 2 if qemu_version(binaries) >= (8, 1) else 1


def blockdev_node(node: str, path: Path, fmt: str, *, backing: str | None = None, read_only: bool = False) -> list[str]:
    """Return the arguments for a format node `node` on a file node `NODE-file`, without a device.

    Args:
        node: name of the format node.
        path: the image.
        fmt: its format, "raw" or "qcow2".
        backing: node that is its backing (given earlier on the command line); without one QEMU follows the header.
        read_only: open it read-only, as the lower images of a chain are.
    """
    common = {"read-only": read_only, "discard": "unmap"}
    protocol = {"driver": "file", "node-name": f"{node}-file", "filename": str(path), **common}
    layer: dict[str, object] = {"driver": fmt, "node-name": node, "file": f"{node}-file", **common}
    if backing is not None:
        layer["backing"] = backing
    return ["-blockdev", json.dumps(protocol), "-blockdev", json.dumps(layer)]


def blockdev_disk(
    node: str,
    path: Path,
    fmt: str,
    *,
    bus: Bus = "virtio",
    iothread: str | None = None,
    qdev_id: str | None = None,
    addr: str | None = None,
    backing: str | None = None,
) -> list[str]:
    """Return the arguments for a disk as libvirt writes them: explicit nodes and a ``-device``.

    Args:
        node: name of the format node; the file node is `NODE-file`, a controller of the disk's own `NODE-bus`.
        path: the image.
        fmt: its format, "raw" or "qcow2".
        bus: kind of disk; "ide" takes the machine's own controller, the others bring one where they need it.
        iothread: id of an iothread, made for this disk (virtio and scsi only).
        qdev_id: id of the device; `NODE-dev` unless told.
        addr: PCI address of the device (or of its controller).
        backing: node that is the image's backing, as in `blockdev_node`.

    Raises:
        ValueError: an iothread or an address was asked for on a bus that has none.
    """
    if iothread is not None and bus not in {"virtio", "scsi"}:
        raise ValueError(f"a disk on {bus} has no iothread")
    if addr is not None and bus == "ide":
        raise ValueError("a disk on the machine's own IDE controller has no PCI address")
    controller = f"{node}-bus"
    on_pci = {"iothread": iothread, "addr": addr}
    disk = {"drive": node, "id": qdev_id or f"{node}-dev"}
    behind = {**disk, "bus": f"{controller}.0"}
    devices: dict[Bus, list[str]] = {
        "virtio": [_device("virtio-blk-pci", {**disk, **on_pci})],
        "scsi": [_device("virtio-scsi-pci", {"id": controller, **on_pci}), _device("scsi-hd", behind)],
        "ide": [_device("ide-hd", disk)],
        "sata": [_device("ich9-ahci", {"id": controller, "addr": addr}), _device("ide-hd", behind)],
        "nvme": [_device("nvme", {**disk, "serial": node, "addr": addr})],
        "usb": [_device("qemu-xhci", {"id": controller, "addr": addr}), _device("usb-storage", behind)],
    }
    arguments = blockdev_node(node, path, fmt, backing=backing)
    if iothread is not None:
        arguments += ["-object", f"iothread,id={iothread}"]
    for device in devices[bus]:
        arguments += ["-device", device]
    return arguments


def legacy_drive(path: Path, fmt: str, *, id: str | None = None, iface: str = "virtio") -> list[str]:  # noqa: A002
    """Return the arguments for a disk as people type them: ``-drive file=...``, whose nodes have generated names.

    Args:
        path: the image.
        fmt: its format, "raw" or "qcow2".
        id: name of the drive; QEMU makes one up (`virtio0`) unless told.
        iface: the drive's ``if``: "virtio" or "ide".
    """
    options = {"file": str(path).replace(",", ",,"), "format": fmt, "if": iface, "id": id}
    return ["-drive", _join(options)]


def _device(driver: str, options: Mapping[str, str | None]) -> str:
    return f"{driver},{_join(options)}"


def _join(options: Mapping[str, str | None]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)


class _Control(QMPClient):
    """qemu.qmp's, without its log of every message as indented text, which takes longer than the message did."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class TestQemu:
    """One real QEMU under TCG, as an async context manager.

    Args:
        binaries: which QEMU.
        directory: existing folder for its sockets (`NAME.sock`) and `qemu.stderr`.
        args: more arguments: disks, and whatever a test wants.
        machine: the machine type, "pc" or "q35".
        memory_mib: the guest's memory in MiB.
        paused: start with ``-S``; False lets the guest run into its firmware.
        sockets: names of the QMP sockets beside the test's own; the first is `qmp`.
        pass_fds: descriptors that QEMU inherits, for chardevs that name them.
        boots: run QEMU's firmware, and what it finds; otherwise a guest that runs halts at its first instruction.
    """

    __test__ = False  # pytest: not a test class

    def __init__(
        self,
        binaries: QemuBinaries,
        directory: Path,
        *,
        args: Sequence[str] = (),
        machine: str = "pc",
        memory_mib: int = 64,
        paused: bool = True,
        sockets: Sequence[str] = ("qmp",),
        pass_fds: Sequence[int] = (),
        boots: bool = False,
    ) -> None:
        self.binaries = binaries
        self.directory = directory
        self.sockets = {name: socket_path(directory / f"{name}.sock") for name in sockets}
        self.control = _Control("control")
        self._args = list(args)
        self._base = ["-machine", f"{machine},accel=tcg", "-m", str(memory_mib), "-nodefaults", "-display", "none"]
        if paused:
            self._base.append("-S")
        if not boots:
            self._base += ["-bios", str(idle_firmware(directory))]
        self._pass_fds = tuple(pass_fds)
        self._process: ChildProcess | None = None

    @property
    def qmp(self) -> Path:
        """The QMP socket that is left to the code under test."""
        return next(iter(self.sockets.values()))

    @property
    def process(self) -> ChildProcess:
        """The process, once started."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True while the process exists."""
        return self._process is not None and self._process.alive

    async def start(self) -> None:
        """Start QEMU; on return it answers QMP and every socket listens.

        The control monitor runs on a socket pair that QEMU inherits. QEMU greets on it from its main loop, after
        all other chardevs were opened, so the greeting says that the sockets listen: nothing is polled.

        Raises:
            StartError: QEMU ended, or did not greet in 30 s; has what it wrote to stderr.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            monitors = ["-chardev", f"socket,id=control,fd={theirs.fileno()}", "-mon", "chardev=control,mode=control"]
            for path in self.sockets.values():
                monitors += ["-qmp", f"unix:{str(path).replace(',', ',,')},server=on,wait=off"]
            self._process = ChildProcess(
                [str(self.binaries.system), *self._base, *monitors, *self._args],
                self.directory / "qemu.stderr",
                (theirs.fileno(), *self._pass_fds),
            )
            await self._process.start()
        # The other end now exists in QEMU only: if QEMU dies, the connection ends.
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self.control.connect(ours)
        except (QMPError, TimeoutError) as error:
            await self._process.kill()
            raise self._process.start_error() from error

    async def command(self, name: str, args: Mapping[str, object] | None = None) -> Any:
        """Execute a command on the control socket and return its answer.

        Raises:
            qemu.qmp.ExecuteError: QEMU answered with an error.
            qemu.qmp.ExecInterruptedError: QEMU died.
        """
        return await self.control.execute(name, dict(args) if args else None)

    async def stop(self) -> None:
        """End QEMU by `quit`, or after 10 s without mercy; nothing to do if it is gone."""
        if self.alive:
            with contextlib.suppress(QMPError, TimeoutError):
                async with asyncio.timeout(QUIT_TIMEOUT_S):
                    await self.command("quit")
                    await self.process.wait()
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL QEMU, as a crash or the OOM killer would, and wait until it is gone."""
        if self._process is not None:
            await self._process.kill()
        # The connection's end is what was asked for; its reason is QEMU's death.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self.control.disconnect()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
