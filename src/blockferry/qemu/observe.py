"""Reading a domain from QEMU: graph, disks, jobs, run state. What is so now is said here and nowhere else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import msgspec

from blockferry import errors
from blockferry.model.domain import Capabilities, Observation, assign_targets, target_name
from blockferry.model.graph import Bitmap, Disk, Edge, Graph, Node
from blockferry.model.job import Job
from blockferry.qemu.internal import internal_snapshots
from blockferry.qemu.session import BadReply, CommandRefused, LostReply, Session

# QEMU's answers to several commands are of several moments; while a job ends they may disagree. Look again.
LOOKS = 20
# A device hangs on a controller on a bridge on a bridge; QEMU takes 256 PCI buses.
HOPS_MAX = 256
# From here on the interrupt of a disk with an iothread may be lost in a `stop`: docs/adr/0025-held-by-their-jobs.md.
FORGETS_FROM = (8, 2)
AT_WORK_NS = 250_000_000  # bursts come some times a second; one request now and then is no work
# Libvirt's words for what is no plain disk; a lun is the host's own device, which takes the guest's SCSI commands as it is.
DEVICES = {"scsi-cd": "cdrom", "ide-cd": "cdrom", "floppy": "floppy", "scsi-block": "lun", "scsi-generic": "lun"}
REQUIRED = ("x-debug-query-block-graph", "query-named-block-nodes", "blockdev-add", "blockdev-reopen", "query-jobs")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's drive as a device: what does not change while it is plugged in.

    Attributes:
        bus: `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`, `fdc`.
        device: `disk`, `cdrom`, `floppy` or `lun`.
        order: its PCI and bus address, to be sorted by.
        slot: the position on an IDE or floppy bus, which libvirt's name follows; None elsewhere.
    """

    bus: str
    device: str
    order: tuple[int, ...]
    slot: int | None = None


class Observer:
    """Observes one domain; keeps only what can't change (capabilities, plugged devices).

    Args:
        session: to its QEMU.
        targets: qdev -> target names given before; the caller keeps what `targets` grows to.
    """

    def __init__(self, session: Session, targets: Mapping[str, str]) -> None:
        self._session = session
        self.targets = dict(targets)
        self._devices: dict[str, Device | None] = {}
        self._buses: dict[str, tuple[int, ...]] = {}
        self._fixed: dict[str, Any] = {}

    async def capabilities(self, domain: str) -> Capabilities:
        """What this QEMU can do, read once.

        Raises:
            MissingCapability: it lacks a command that everything here stands on.
        """
        if "capabilities" not in self._fixed:
            answer = await self._session.execute("query-commands")
            found = Capabilities(version=self._session.version, commands=frozenset(each["name"] for each in answer))
            for command in REQUIRED:
                if command not in found.commands:
                    raise errors.MissingCapability(domain=domain, capability=command, version=found.version)
            self._fixed["capabilities"] = found
        capabilities: Capabilities = self._fixed["capabilities"]
        return capabilities

    async def work(self, seen: Observation) -> Observation:
        """The same observation, with the disks that the guest has read or written within the last quarter of a second.

        `idle_time_ns` of query-blockstats (QEMU's QAPI, BlockDeviceStats): it is not there before the first request.

        Args:
            seen: the domain as observed.

        Raises:
            LostReply: the connection broke.
        """
        answer = await self._session.execute("query-blockstats")
        idle = {each.get("qdev"): each["stats"].get("idle_time_ns", AT_WORK_NS) for each in answer}
        at_work = (disk.target for disk in seen.disks if idle.get(disk.drive, AT_WORK_NS) < AT_WORK_NS)
        return msgspec.structs.replace(seen, at_work=frozenset(at_work))

    async def observe(self, domain: str) -> Observation:
        """Everything that a plan is made from.

        Raises:
            LostReply: the connection broke.
            MissingCapability: see `capabilities`.
        """
        capabilities = await self.capabilities(domain)
        ask = self._session.execute
        listed, block_jobs, status, drives = await asyncio.gather(
            ask("query-jobs"), ask("query-block-jobs"), ask("query-status"), ask("query-block")
        )
        graph = await self._graph(listed)
        about = await self._about()
        return Observation(
            status=status["status"],
            running=status["running"],
            graph=graph,
            disks=await self._disks(graph, drives),
            jobs=read_jobs(listed, block_jobs),
            capabilities=capabilities,
            pid=self._session.pid,
            forgets=await self._forgets(),
            **about,
        )

    async def jobs(self) -> dict[str, Job]:
        """Every job by its id."""
        ask = self._session.execute
        return read_jobs(*await asyncio.gather(ask("query-jobs"), ask("query-block-jobs")))

    async def graph(self) -> Graph:
        """Nodes and edges alone, as of one moment.

        Raises:
            JobNotDismissed: somebody's stream has ended and is kept: to ask for the nodes now would crash QEMU.
        """
        return await self._graph(await self._session.execute("query-jobs"))

    async def _graph(self, jobs: list[dict[str, Any]]) -> Graph:
        """See `graph`; `jobs` is what query-jobs has just said."""
        ask = self._session.execute
        for job in jobs:
            if job["type"] == "stream" and job["status"] == "concluded":
                # Tried on 7.2 and 10.0: query-named-block-nodes then ends in a segmentation fault. Ours are never kept.
                raise errors.JobNotDismissed(job=job["id"])
        for _look in range(LOOKS):
            named, shape = await asyncio.gather(
                ask("query-named-block-nodes", flat=True), ask("x-debug-query-block-graph")
            )
            graph = read_graph(named, shape, self._folder())
            shown = {node["name"] for node in shape["nodes"] if node["type"] == "block-driver"}
            if shown == set(graph.nodes):
                break
        require_sound(graph)
        return graph

    async def roots(self) -> dict[str, str]:
        """The node directly under each device's backend: a small part of `graph`, for the time in which the guest stands still."""
        shape = await self._session.execute("x-debug-query-block-graph")
        return {edge.parent: edge.child for edge in _edges(shape) if edge.role == "root"}

    def _folder(self) -> Path | None:
        """QEMU's working directory, which relative file names are relative to."""
        if self._session.pid is None:
            return None
        try:
            return Path(f"/proc/{self._session.pid}/cwd").readlink()
        except OSError:
            return None

    async def _about(self) -> dict[str, Any]:
        if "about" not in self._fixed:
            uuid = await self._session.execute("query-uuid")
            memory = await self._session.execute("query-memory-size-summary")
            processors = await self._session.execute("query-cpus-fast")
            size = memory["base-memory"] + memory.get("plugged-memory", 0)
            self._fixed["about"] = {"uuid": uuid["UUID"], "memory": size, "vcpus": len(processors)}
        about: dict[str, Any] = self._fixed["about"]
        return about

    async def _forgets(self) -> bool:
        """See Observation; iothreads come and go with the disks that are plugged in."""
        numbers = re.match(r"(\d+)\.(\d+)", self._session.version)
        if numbers is not None and (int(numbers[1]), int(numbers[2])) < FORGETS_FROM:
            return False
        return bool(await self._session.execute("query-iothreads"))

    async def _disks(self, graph: Graph, drives: list[dict[str, Any]]) -> tuple[Disk, ...]:
        found: list[tuple[Device, str, dict[str, Any]]] = []
        for drive in drives:
            qdev = drive.get("qdev")
            if not qdev:
                continue
            if qdev not in self._devices:
                self._devices[qdev] = await self._device(qdev)
            device = self._devices[qdev]
            if device is not None:
                found.append((device, qdev, drive))
        found.sort(key=lambda each: (each[0].order, each[1]))
        for device, qdev, _drive in found:
            # Devices of guests that we start are named by their ids.
            if qdev not in self.targets and _id(qdev) in self.targets:
                self.targets[qdev] = self.targets[_id(qdev)]
            if device.slot is not None and qdev not in self.targets:
                name = target_name(device.bus, device.slot)
                if name not in self.targets.values():
                    self.targets[qdev] = name
        given = assign_targets([(qdev, device.bus) for device, qdev, _drive in found], self.targets)
        self.targets.update(given)
        return tuple(_disk(graph, device, qdev, drive, given[qdev]) for device, qdev, drive in found)

    async def _device(self, qdev: str) -> Device | None:
        """Find out what a drive is plugged into; None for what is not a disk of a kind that libvirt names."""
        path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        kind = await self._property(path, "type")
        if not isinstance(kind, str):
            return None
        place = path
        bus: str | None = None
        slot: int | None = None
        order: tuple[int, ...] = ()
        if kind.startswith("virtio-blk"):
            bus = "virtio"
        elif kind.startswith("nvme"):
            bus = "nvme"
        elif kind.startswith("scsi"):
            place = _owner(str(await self._property(path, "parent_bus")))
            bus = "usb" if (await self._kind(place)).startswith("usb") else "scsi"
            order = tuple([int(await self._property(path, each) or 0) for each in ("channel", "scsi-id", "lun")])
        elif kind.startswith("ide"):
            plugged = str(await self._property(path, "parent_bus"))
            place = _owner(plugged)
            digits = re.search(r"\d+$", plugged)
            number = int(digits[0]) if digits else 0
            unit = int(await self._property(path, "unit") or 0)
            order = (number, unit)
            bus = "sata" if "ahci" in await self._kind(place) else "ide"
            slot = 2 * number + unit if bus == "ide" else None
        elif kind == "floppy":
            place, bus = _owner(str(await self._property(path, "parent_bus"))), "fdc"
            slot = int(await self._property(path, "unit") or 0)
            order = (slot,)
        if bus is None:
            return None
        address = await self._pci_address(place)
        return Device(bus=bus, device=DEVICES.get(kind, "disk"), order=(*address, *order), slot=slot)

    async def _property(self, path: str, name: str) -> Any:
        try:
            return await self._session.execute("qom-get", path=path, property=name)
        except CommandRefused as error:
            if "not found" not in error.words:
                raise  # a disk that is not recognized would be left out, without a word
            return None

    async def _kind(self, path: str) -> str:
        return str(await self._property(path, "type"))

    async def _pci_address(self, place: str, hops: int = 0) -> tuple[int, ...]:
        """Slot and function of the nearest device on a PCI bus at or above `place`, bridges' first."""
        if hops > HOPS_MAX:
            raise BadReply("qom-get", "its devices are plugged into each other in a circle")
        for each in _ancestors(place):
            if each.endswith("/virtio-backend"):
                continue  # in the device above it, which has the address
            # What is plugged into nothing, as buses and folders are, has no address either.
            bus = await self._property(each, "parent_bus")
            if not isinstance(bus, str) or not bus:
                continue
            address = await self._property(each, "addr")
            if isinstance(address, int):
                return (*await self._above(bus, hops), address)
            if not place.startswith(bus):
                # Plugged into a bus elsewhere in the tree, as a USB device is: on from the device that has the bus.
                return await self._pci_address(_owner(bus), hops + 1)
        return ()

    async def _above(self, bus: str, hops: int) -> tuple[int, ...]:
        """The address of the bridge that has a PCI bus; asked for once, however many disks are on it."""
        if bus not in self._buses:
            bridge = _owner(bus)
            plugged = await self._property(bridge, "addr") is not None
            self._buses[bus] = await self._pci_address(bridge, hops + 1) if plugged else ()
        return self._buses[bus]


def require_sound(graph: Graph) -> None:
    """See that every chain has an end, and is made of nodes that are there.

    Raises:
        LostReply: QEMU's answers were of several moments, or are none of QEMU's.
    """
    below: dict[str, list[str]] = {}
    for edge in graph.edges:
        if edge.role in ("backing", "file"):
            below.setdefault(edge.parent, []).append(edge.child)
    for child in (each for children in below.values() for each in children):
        if child not in graph.nodes:
            raise LostReply("x-debug-query-block-graph", f"node {child!r} is in a chain, and is none")
    try:
        # Also where the node above is a device's or a job's: those have no such edges.
        TopologicalSorter(below).prepare()
    except CycleError as error:
        raise BadReply("x-debug-query-block-graph", "a chain of nodes comes back to itself") from error


def _owner(bus: str) -> str:
    """The device that a bus is of."""
    return bus.rpartition("/")[0]


def _ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 2, -1)]


def read_graph(named: list[dict[str, Any]], shape: dict[str, Any], folder: Path | None) -> Graph:
    """The graph of query-named-block-nodes and x-debug-query-block-graph."""
    return Graph(nodes={each["node-name"]: _node(each, folder) for each in named}, edges=_edges(shape))


def _edges(shape: dict[str, Any]) -> frozenset[Edge]:
    names = {each["id"]: each["name"] for each in shape["nodes"]}
    return frozenset(
        Edge(parent=names[each["parent"]], role=each["name"], child=names[each["child"]])
        for each in shape["edges"]
        if each["parent"] in names and each["child"] in names
    )


def _node(answer: dict[str, Any], folder: Path | None) -> Node:
    filename = answer.get("file", "")
    if answer["drv"] == "file" and filename and not filename.startswith("/") and folder is not None:
        filename = str(folder / filename)
    # The bitmap that nobody named is a job's own: what a mirror has left is in there, and nowhere else.
    bitmaps = answer.get("dirty-bitmaps", [])
    cache = answer.get("cache", {})
    return Node(
        name=answer["node-name"],
        driver=answer["drv"],
        filename=filename,
        virtual_size=answer.get("image", {}).get("virtual-size", 0),
        read_only=answer["ro"],
        dirty=sum(each["count"] for each in bitmaps if not each.get("name")),
        direct=cache.get("direct", False),
        no_flush=cache.get("no-flush", False),
        detect_zeroes=answer.get("detect_zeroes", "off"),
        snapshots=internal_snapshots(answer.get("image", {})),
        encrypted=answer.get("encrypted", False),
        bitmaps={
            each["name"]: Bitmap(count=each["count"], recording=each["recording"], busy=each["busy"])
            for each in bitmaps
            if each.get("name")
        },
    )


def _disk(graph: Graph, device: Device, qdev: str, drive: dict[str, Any], target: str) -> Disk:
    backend = drive["device"] or qdev
    root = graph.child(backend, "root") or (drive.get("inserted") or {}).get("node-name")
    node = graph.nodes.get(root) if root is not None else None
    return Disk(
        target=target,
        backend=backend,
        qdev=_id(qdev),
        drive=qdev,
        bus=device.bus,
        device=device.device,
        root=root if node is not None else None,
        chain=graph.chain(root) if root is not None and node is not None else (),
        read_only=bool((drive.get("inserted") or {}).get("ro", False)),
    )


def _id(qdev: str) -> str:
    """The id in `/machine/peripheral/ID/virtio-backend`: virtio disks are shown by their inner half."""
    parts = qdev.split("/")
    return parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else qdev


def read_jobs(jobs: list[dict[str, Any]], block_jobs: list[dict[str, Any]]) -> dict[str, Job]:
    """The jobs of query-jobs and query-block-jobs."""
    more = {each["device"]: each for each in block_jobs}
    return {
        each["id"]: Job(
            id=each["id"],
            type=each["type"],
            status=each["status"],
            current=each["current-progress"],
            total=each["total-progress"],
            error=each.get("error"),
            ready=more.get(each["id"], {}).get("ready", False),
            speed=more.get(each["id"], {}).get("speed", 0),
            io_status=more.get(each["id"], {}).get("io-status", "ok"),
        )
        for each in jobs
    }
