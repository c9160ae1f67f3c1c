"""The block graph as QEMU shows it: nodes, edges, backing chains, disks; and what differs between two graphs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

# Filters that QEMU itself puts above a node while a job runs; they go away with the job.
JOB_FILTERS = frozenset({"mirror_top", "commit_top", "copy-before-write"})
# Filters that somebody puts between a device and its image on purpose; they stay where they are, whatever is under them.
# A stream has a copy-on-read of its own as well, which goes away with it.
FILTERS = JOB_FILTERS | {"throttle", "copy-on-read"}
# Drivers whose node reads and writes bytes somewhere, rather than giving another node a format.
PROTOCOL_DRIVERS = frozenset({"file", "host_device", "nbd", "null-co", "blkdebug"})


class InternalSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot inside a qcow2 image, as `qemu-img snapshot -c` and `savevm` make them.

    Attributes:
        name: its name; whoever made it chose it, from any characters.
        id: its number in that image.
        created: seconds since 1970.
        memory: bytes of the guest's memory that it holds; 0 when it is of the disk alone.
    """

    name: str
    id: str
    created: float
    memory: int = 0


class Bitmap(msgspec.Struct, frozen=True, kw_only=True):
    """A dirty bitmap with a name: what was written to its node, in pieces of 64 KiB.

    Attributes:
        count: bytes that it counts as written.
        recording: whether it is kept up to date.
        busy: whether a job uses it.
    """

    count: int
    recording: bool = True
    busy: bool = False


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A block node.

    Attributes:
        name: QEMU's node name; `#blockNNN` when nobody gave one (random per process: never persisted).
        driver: QEMU's driver, such as `qcow2`, `raw`, `file`, `mirror_top`.
        filename: what QEMU calls the file; for formats it is the protocol node's.
        virtual_size: bytes.
        read_only: whether it is open for reading only.
        dirty: bytes that an anonymous bitmap on it still counts; what a mirror has left lies in one of these.
        direct: cache.direct, O_DIRECT.
        no_flush: cache.no-flush.
        detect_zeroes: `off`, `on` or `unmap`.
        snapshots: those inside it, of a qcow2.
        encrypted: whether what is in its file can be read with a key only.
        bitmaps: by name, the dirty bitmaps on it that somebody has named.
    """

    name: str
    driver: str
    filename: str
    virtual_size: int
    read_only: bool
    dirty: int = 0
    direct: bool = False
    no_flush: bool = False
    detect_zeroes: str = "off"
    snapshots: tuple[InternalSnapshot, ...] = ()
    encrypted: bool = False
    bitmaps: dict[str, Bitmap] = {}


class Edge(msgspec.Struct, frozen=True, order=True):
    """That `parent` (a node's name, or a device's) uses `child` as its `role` (`file`, `backing`, `root`...)."""

    parent: str
    role: str
    child: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of a backing chain.

    Attributes:
        node: the format node's name.
        file: the path, or the URI of something that is not a file.
        format: `qcow2`, `raw`...
        virtual_size: bytes.
    """

    node: str
    file: str
    format: str
    virtual_size: int


class Graph(msgspec.Struct, frozen=True):
    """Nodes and edges at one moment."""

    nodes: dict[str, Node]
    edges: frozenset[Edge]

    def child(self, parent: str, role: str) -> str | None:
        """The node that `parent` uses as its `role`, or None."""
        return next((edge.child for edge in self.edges if edge.parent == parent and edge.role == role), None)

    def parents(self, child: str) -> frozenset[Edge]:
        """Everything that uses the node."""
        return frozenset(edge for edge in self.edges if edge.child == child)

    def below_filters(self, name: str) -> str:
        """The first node at or under `name` that is not a filter."""
        while (node := self.nodes.get(name)) is not None and node.driver in FILTERS:
            below = self.child(name, "backing") or self.child(name, "file")
            if below is None:
                return name
            name = below
        return name

    def protocol(self, name: str) -> str:
        """The node at the bottom of the `file` children of `name`: the one that reads and writes bytes."""
        while (below := self.child(name, "file")) is not None:
            name = below
        return name

    def chain(self, name: str) -> tuple[Image, ...]:
        """The backing chain from `name` down, the active image first."""
        return tuple(self._layers(name))

    def _layers(self, name: str | None) -> Iterator[Image]:
        while name is not None:
            name = self.below_filters(name)
            node = self.nodes[name]
            file = self.nodes[self.protocol(name)].filename or node.filename
            yield Image(node=name, file=file, format=node.driver, virtual_size=node.virtual_size)
            name = self.child(name, "backing")


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's disk.

    Attributes:
        target: libvirt's name for it, `vda`.
        backend: what QEMU's graph calls the device: its id, or the qdev's id or path.
        qdev: the qdev id, or the QOM path where it has no id.
        drive: what query-block calls its qdev: the id, or a path inside the device; other commands want that.
        bus: `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`, `fdc`.
        device: `disk`, `cdrom`, `floppy`, or `lun` for the host's own device, passed through.
        root: the node that the device itself uses; None when the drive is empty.
        chain: its backing chain, active image first; empty when the drive is.
        read_only: whether the guest can't write to it.
    """

    target: str
    backend: str
    qdev: str
    drive: str
    bus: str
    device: str = "disk"
    root: str | None = None
    chain: tuple[Image, ...] = ()
    read_only: bool = False

    @property
    def active(self) -> Image:
        """The image that the guest writes to; callers look at `chain` first for an empty drive."""
        return self.chain[0]

    @property
    def filtered(self) -> str | None:
        """The topmost filter above the active image, None without one: QEMU takes only a root as a job's device."""
        return self.root if self.root != self.active.node else None

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this disk's target, qdev id or path, device id, or an image in its chain."""
        return name in (self.target, self.qdev, self.drive, self.backend) or any(
            image.file == name for image in self.chain
        )


def images_of(disks: tuple[Disk, ...]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Per target, (file, format) of every layer: what must be equal again after an undo.

    Node names are left out on purpose: a node that nobody named is opened again under a name of ours.
    """
    return {disk.target: tuple((image.file, image.format) for image in disk.chain) for disk in disks}
