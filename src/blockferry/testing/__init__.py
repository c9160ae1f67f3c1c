"""The public test kit: real QEMUs, images, NBD servers, writing Linux guests, and a QMP proxy that injects faults."""

from blockferry.testing.agent import AgentFault, AgentRelay, ask_agent
from blockferry.testing.ext4 import file_on_ext4, fsck, make_ext4, needs_recovery
from blockferry.testing.guest import GuestError, Missing, Records, StartedAgainWarning, WritingGuest
from blockferry.testing.images import (
    ImageDamagedError,
    ToolError,
    check_image,
    compare_images,
    image_sha256,
    make_image,
    raw_contents,
    write_pattern,
)
from blockferry.testing.initramfs import GuestImages, build_guest
from blockferry.testing.launcher import (
    QemuBinaries,
    QemuVersion,
    TestQemu,
    blockdev_disk,
    blockdev_node,
    find_qemu,
    legacy_drive,
    processors,
    qemu10_dir,
    qemu_version,
)
from blockferry.testing.missing import MissingComponentError
from blockferry.testing.nbd import FaultyNbdServer, NbdServer
from blockferry.testing.process import StartError
from blockferry.testing.proxy import Fault, FaultKind, Gate, QmpFaultProxy
from blockferry.testing.sharing import sharing_file_system

__all__ = [
    "AgentFault",
    "AgentRelay",
    "Fault",
    "FaultKind",
    "FaultyNbdServer",
    "Gate",
    "GuestError",
    "GuestImages",
    "ImageDamagedError",
    "Missing",
    "MissingComponentError",
    "NbdServer",
    "QemuBinaries",
    "QemuVersion",
    "QmpFaultProxy",
    "Records",
    "StartError",
    "StartedAgainWarning",
    "TestQemu",
    "ToolError",
    "WritingGuest",
    "ask_agent",
    "blockdev_disk",
    "blockdev_node",
    "build_guest",
    "check_image",
    "compare_images",
    "file_on_ext4",
    "find_qemu",
    "fsck",
    "image_sha256",
    "legacy_drive",
    "make_ext4",
    "make_image",
    "needs_recovery",
    "processors",
    "qemu10_dir",
    "qemu_version",
    "raw_contents",
    "sharing_file_system",
    "write_pattern",
]
