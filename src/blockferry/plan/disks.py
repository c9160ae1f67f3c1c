"""Finding the disks that a request speaks of, and whether they can take part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.graph import JOB_FILTERS, PROTOCOL_DRIVERS, Disk, Graph
from blockferry.model.job import ENDED
from blockferry.plan.steps import RemoveNode, Step


def find_disk(domain: str, seen: Observation, name: str) -> Disk:
    """The disk of that target, qdev id, or image path.

    Raises:
        NoSuchDisk: nothing answers to the name.
        AmbiguousDisk: an image that several disks share.
    """
    exact = [disk for disk in seen.disks if name in (disk.target, disk.qdev, disk.drive, disk.backend)]
    found = exact or [disk for disk in seen.disks if disk.answers_to(name)]
    if not found:
        known = ", ".join(disk.target for disk in seen.disks) or "no disks"
        raise errors.NoSuchDisk(domain=domain, disk=name, known=known)
    if len(found) > 1:
        raise errors.AmbiguousDisk(domain=domain, disk=name, targets=", ".join(disk.target for disk in found))
    return found[0]


def unsuitable(disk: Disk, graph: Graph) -> str | None:
    """Why the disk can't be snapshotted or copied, or None."""
    if not disk.chain or disk.root is None:
        return "the drive is empty"
    if disk.device != "disk":
        return f"it is a {disk.device}" + (", a device of the host passed through" if disk.device == "lun" else "")
    if disk.read_only:
        return "it is read-only"
    active = disk.active
    if active.format in PROTOCOL_DRIVERS:
        return f"its image is opened as bare {active.format}, without a format; open it as raw"
    if active.format not in ("qcow2", "raw"):
        return f"its image is {graph.nodes[active.node].driver}; only qcow2 and raw are carried out"
    for image in disk.chain:
        if graph.nodes[image.node].encrypted:
            return f"{image.file} is encrypted, and what the guest writes to a new image would not be"
    return None


def require_suitable(domain: str, disk: Disk, seen: Observation) -> None:
    """Refuse a disk that can't take part, or that has a job on it.

    Raises:
        DiskUnsuitable: with the reason; it has the filter of a job that QEMU has forgotten, too.
        DiskBusy: with the job.
        MoveUnderWay: it is part of a move.
    """
    if disk.target in seen.held:
        raise errors.MoveUnderWay(domain=domain, operation=seen.held[disk.target], what=f"disk {disk.target}")
    reason = unsuitable(disk, seen.graph)
    if reason:
        raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=reason)
    job = job_on(disk, seen)
    if job and is_forgotten(job, seen):
        reason = (
            f"QEMU {seen.capabilities.version} has left {job}, the filter of a job that is no more, above its image, and starts no "
            "other job there until the guest is started anew"
        )
        raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=reason)
    if job:
        raise errors.DiskBusy(domain=domain, disk=disk.target, job=job)


def require_mirrorable(domain: str, disk: Disk, seen: Observation) -> None:
    """Refuse a disk whose mirror QEMU could not switch.

    QEMU 7.2 hangs for ever when it switches a disk with an iothread under a throttle filter; 10.0 does not. The graph does
    not show iothreads.

    Raises:
        DiskUnsuitable: a throttle filter, and a QEMU before 10.
    """
    major = seen.capabilities.version.partition(".")[0]
    if disk.filtered is None or not major.isdecimal() or int(major) >= THROTTLED_MIRRORS_SINCE:
        return
    name: str | None = disk.root
    while name is not None and name != disk.active.node:
        if seen.graph.nodes[name].driver == "throttle":
            reason = (
                f"QEMU {seen.capabilities.version} may hang when it switches a mirrored disk under a throttle filter"
            )
            raise errors.DiskUnsuitable(domain=domain, disk=disk.target, reason=reason)
        name = seen.graph.child(name, "file")


def job_on(disk: Disk, seen: Observation) -> str | None:
    """The job that uses the disk's images, or a filter that it has put above them; a second one QEMU would refuse."""
    graph = seen.graph
    for image in disk.chain:
        for edge in graph.parents(image.node):
            if edge.parent in seen.jobs and seen.jobs[edge.parent].status not in ENDED:
                return edge.parent
    nodes = {image.node for image in disk.chain}
    if disk.root is not None and disk.root not in nodes and graph.nodes[disk.root].driver in JOB_FILTERS:
        return disk.root
    for node in nodes:
        for edge in graph.parents(node):
            above = graph.nodes.get(edge.parent)
            if above is not None and above.driver in JOB_FILTERS:
                return above.name
    return None


def is_forgotten(name: str, seen: Observation) -> bool:
    """Whether this is a job's filter, and there is no job that it could be of.

    QEMU 7.2 leaves one when a mirror or commit fails while the guest's writes are drained; 10.0 does not.
    """
    return name in seen.graph.nodes and all(job.status in ENDED for job in seen.jobs.values())


# The version of the first QEMU that was seen to switch such a disk.
THROTTLED_MIRRORS_SINCE = 10

# Not plain read-only: into an image whose file was opened so QEMU refuses to commit ("Block node is read-only").
READ_ONLY_FILE: dict[str, Any] = {"auto-read-only": True}


def source_options(graph: Graph, node: str) -> dict[str, Any]:
    """How to open a node and its chain again: QAPI BlockdevOptions, nested, without node names.

    QEMU shows driver, file name, cache and detect-zeroes; what it does not show (discard, aio) gets QEMU's defaults.
    """
    here = graph.nodes[graph.below_filters(node)]
    options: dict[str, Any] = {
        "driver": here.driver,
        "read-only": here.read_only,
        "cache": {"direct": here.direct, "no-flush": here.no_flush},
    }
    if here.detect_zeroes != "off":
        options["detect-zeroes"] = here.detect_zeroes
    below = graph.child(here.name, "file")
    if below is None:
        if here.read_only:
            del options["read-only"]
            options |= READ_ONLY_FILE
        return {**options, "filename": here.filename}
    options["file"] = source_options(graph, below)
    backing = graph.child(here.name, "backing")
    if backing is not None:
        options["backing"] = source_options(graph, backing)
    elif here.driver == "qcow2":
        options["backing"] = None
    return options


def close_images(graph: Graph, nodes: Iterable[str]) -> list[Step]:
    """Close images that have left a chain, so that their locks are released; one with another user stays.

    Args:
        graph: as it was while they were in the chain.
        nodes: their format nodes, from the top.
    """
    steps: list[Step] = []
    for node in nodes:
        name: str | None = node
        while name is not None:
            # QEMU frees a node that nobody named by itself, with its last user.
            if not name.startswith("#"):
                steps.append(RemoveNode(node=name, if_unused=True))
            name = graph.child(name, "file")
    return steps
