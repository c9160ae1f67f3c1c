"""A domain as observed: its run state, disks, jobs, and what its QEMU can do."""

from __future__ import annotations

import msgspec

from blockferry.model.files import Chains, ImageFact
from blockferry.model.graph import Disk, Graph
from blockferry.model.job import Job


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this QEMU can do.

    Attributes:
        version: such as `7.2.22`.
        commands: names from query-commands.
    """

    version: str
    commands: frozenset[str]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan is made from, read from QEMU at one moment.

    Attributes:
        status: query-status, such as `running`, `paused`, `io-error`.
        running: whether the guest's processors run.
        graph: nodes and edges.
        disks: by PCI and bus address.
        jobs: by id.
        capabilities: what this QEMU can do.
        pid: QEMU's process, from the socket's peer, when known.
        uuid: the guest's.
        memory: bytes.
        vcpus: how many.
        held: target -> the move that its disk is part of, and that keeps all others off it.
        at_work: targets of the disks that the guest has just read or written, where somebody has asked for that.
        forgets: whether a guest that is stopped and let run again may never hear of a request that was under way.
    """

    status: str
    running: bool
    graph: Graph
    disks: tuple[Disk, ...]
    jobs: dict[str, Job]
    capabilities: Capabilities
    pid: int | None = None
    uuid: str | None = None
    memory: int = 0
    vcpus: int = 0
    held: dict[str, int] = {}
    at_work: frozenset[str] = frozenset()
    forgets: bool = False

    def disk(self, target: str) -> Disk | None:
        """The disk of that target."""
        return next((disk for disk in self.disks if disk.target == target), None)

    @property
    def chains(self) -> Chains:
        """Each disk's images, the active one first."""
        return {
            disk.target: tuple(
                ImageFact(
                    path=image.file,
                    format=image.format,
                    virtual_size=image.virtual_size,
                    snapshots=self.graph.nodes[image.node].snapshots,
                )
                for image in disk.chain
            )
            for disk in self.disks
        }


class ChainsNow(msgspec.Struct, frozen=True, kw_only=True):
    """What a domain's disks are on, whether it runs or is shut off.

    Attributes:
        chains: as QEMU has them open, or as the headers of the images that it is started on say.
        uuid: the guest's, when it has one.
        seen: the domain as observed; None when it is shut off.
    """

    chains: Chains
    uuid: str | None = None
    seen: Observation | None = None


# libvirt's prefix for each bus; virDomainDiskDefAssignTargets has the same.
TARGET_PREFIX = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd", "nvme": "nvme", "fdc": "fd"}


def target_name(bus: str, index: int) -> str:
    """Libvirt's target name for the index-th disk (from 0) with that prefix: vda ... vdz, vdaa; nvme0n1.

    libvirt's virIndexToDiskName does the same for letters.
    """
    if bus == "nvme":
        return f"nvme{index}n1"
    letters = ""
    index += 1
    while index > 0:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return TARGET_PREFIX[bus] + letters


def names_that_last(targets: dict[str, str]) -> dict[str, str]:
    """The names that hold in another QEMU process as well: of devices that somebody gave an id.

    The path of any other counts devices: `/machine/unattached/device[19]` is another one with one more processor.
    """
    return {qdev: name for qdev, name in targets.items() if qdev.startswith("/machine/peripheral/") or qdev[:1] != "/"}


def assign_targets(devices: list[tuple[str, str]], kept: dict[str, str]) -> dict[str, str]:
    """Give every device a target: those given before stay, the rest get the first free names in order.

    Args:
        devices: (qdev, bus) in the order of PCI and bus addresses.
        kept: qdev -> target from earlier.

    Returns:
        qdev -> target, for exactly these devices.
    """
    given = {qdev: kept[qdev] for qdev, _bus in devices if qdev in kept}
    # A name once given to a device that is gone is not given again: the journal speaks of it.
    taken = set(kept.values())
    for qdev, bus in devices:
        if qdev in given:
            continue
        index = 0
        while (name := target_name(bus, index)) in taken:
            index += 1
        given[qdev] = name
        taken.add(name)
    return given
