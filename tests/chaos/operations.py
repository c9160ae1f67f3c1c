"""The operations that the matrix is made of: what leads up to each, and itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from worlds import TARGETS, World

from blockferry.model import request as ask
from blockferry.model.flags import BlockCommit, SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import DiskWish, MirrorWish, SnapshotWish

Requests = Callable[[World], list[ask.Request]]


@dataclass(frozen=True)
class Operation:
    """One of them.

    Attributes:
        before: what leads up to it.
        itself: the operation, in one request or two.
        alone: whether each of its disks is done for itself, rather than all at one instant or none.
        defined: whether its guest is one that blockferry starts. It may be shut off before, and afterwards.
        crashed: whether its QEMU was killed before.
        forgets: whether what was written before it is not to be there after it.
        moves: whether it is a move, or of one: it may be in progress with overlays of its own.
        undoes: whether an operation is undone by it.
        served: whether what it writes to is an export of a server that fails, holds requests, or dies.
        shares: whether it is played on a file system whose files can share their blocks.
        disks: those that a move is of.
    """

    before: Requests
    itself: Requests
    alone: bool = False
    defined: bool = False
    crashed: bool = False
    forgets: bool = False
    moves: bool = False
    undoes: bool = False
    served: bool = False
    shares: bool = False
    disks: tuple[str, ...] = TARGETS


def snapshot(name: str, *, mirrors: tuple[str, ...] = (), disks: tuple[str, ...] = TARGETS) -> Requests:
    def requests(world: World) -> list[ask.Request]:
        wishes = tuple(
            DiskWish(
                name=target,
                file=str(world.folder / "src" / f"{target}.{name}"),
                mirror=MirrorWish(file=world.dest(f"{target}.{name}")) if target in mirrors else None,
            )
            for target in disks
        )
        wish = SnapshotWish(name=name, only_these=True, disks=wishes)
        return [ask.CreateSnapshot(domain="vm", wish=wish, flags=int(SnapshotCreate.ATOMIC))]

    return requests


def copies(*targets: str) -> Requests:
    def requests(world: World) -> list[ask.Request]:
        return [
            ask.StartCopy(domain="vm", disk=each, dest=world.dest(f"{each}.copy"), format="raw") for each in targets
        ]

    return requests


def to_server(world: World) -> list[ask.Request]:
    return [ask.StartCopy(domain="vm", disk="vda", dest=world.export)]


def on(request: Callable[..., ask.Request], **more: object) -> Requests:
    """A request that needs nothing of the world."""
    return lambda _world: [request(domain="vm", **more)]


def each(*parts: Requests) -> Requests:
    """One after the other."""
    return lambda world: [request for part in parts for request in part(world)]


def source(request: Callable[..., ask.Request], **more: object) -> Requests:
    """A request on vda, down to its first image."""
    return lambda world: [request(domain="vm", disk="vda", base=str(world.source("vda")), **more)]


def middle(world: World) -> list[ask.Request]:
    """A commit of the layer between vda's first image and its active one."""
    folder = world.folder / "src"
    return [ask.Commit(domain="vm", disk="vda", top=str(folder / "vda.s1"), base=str(world.source("vda")))]


def resume(world: World) -> list[ask.Request]:
    again = ask.StartCopy(domain="vm", disk="vda", dest=world.dest("vda.copy"), resume=True)
    return [again, ask.PivotJobs(domain="vm", disks=("vda",))]


def move(strategy: str, **more: object) -> Requests:
    return lambda world: [
        ask.MoveStorage(domain="vm", dest=str(world.folder / "dst"), strategy=strategy, verify="none", **more)  # type: ignore[arg-type]
    ]


# One that will not get far: one byte a second. It has the first number, whatever the attaching before it.
BEGUN = move("offload", bandwidth=1)


def of_move(*requests: Callable[..., ask.Request]) -> Requests:
    return lambda _world: [request(operation=1) for request in requests]


def unlimited(operation: int) -> ask.Request:
    return ask.SetMoveSpeed(operation=operation, bandwidth=0)


TWO_LAYERS = each(snapshot("s1", disks=("vda", "vdb")), snapshot("s2", disks=("vda", "vdb")))
MIRRORED = snapshot("s1", mirrors=("vda", "sda"))
PIVOT = on(ask.PivotJobs, disks=("vda",))
DELETE = on(ask.DeleteSnapshot, snapshot="s1")
REOPEN = on(ask.DeleteSnapshot, snapshot="s1", flags=int(SnapshotDelete.REOPEN_MIRROR))
REMOVE = on(ask.DeleteSnapshot, snapshot="s1", flags=int(SnapshotDelete.REMOVE_MIRROR))
START = on(ask.Start)
STOP = on(ask.Stop, force=True)


def nothing(_world: World) -> list[ask.Request]:
    return []


OPERATIONS = {
    "snapshot": Operation(nothing, snapshot("s1")),
    "mirrored-snapshot": Operation(nothing, snapshot("s1", mirrors=TARGETS)),
    "copy": Operation(nothing, copies("vda")),
    "pivot": Operation(copies("vda"), PIVOT),
    "pivot-3": Operation(copies(*TARGETS), on(ask.PivotJobs, disks=TARGETS)),
    "finish": Operation(copies("vda", "vdb"), on(ask.FinishJobs, disks=("vda", "vdb"))),
    "cancel": Operation(copies("vda", "sda"), on(ask.CancelJobs, disks=("vda", "sda"))),
    "copy-nbd": Operation(nothing, to_server, served=True),
    "pivot-nbd": Operation(each(to_server, copies("vdb")), on(ask.PivotJobs, disks=("vda", "vdb")), served=True),
    "finish-nbd": Operation(to_server, on(ask.FinishJobs, disks=("vda",)), served=True),
    "reopen": Operation(MIRRORED, REOPEN),
    "remove-mirror": Operation(MIRRORED, REMOVE),
    "rebase": Operation(TWO_LAYERS, source(ask.Rebase)),
    "commit-active": Operation(TWO_LAYERS, on(ask.Commit, disk="vdb", flags=int(BlockCommit.SHALLOW))),
    "commit-middle": Operation(TWO_LAYERS, middle),
    "delete": Operation(TWO_LAYERS, DELETE, alone=True),
    "resume": Operation(each(copies("vda"), on(ask.CancelJobs, disks=("vda",))), resume),
    "move": Operation(nothing, move("offload"), moves=True),
    "move-mirror": Operation(nothing, move("mirror", delete_source=True), moves=True),
    "move-chain": Operation(TWO_LAYERS, move("offload"), moves=True),
    "move-shared": Operation(
        nothing, move("offload", disks={"vdb": None}, delete_source=True), moves=True, shares=True, disks=("vdb",)
    ),
    "move-resume": Operation(BEGUN, of_move(unlimited, ask.ResumeOperation), moves=True),
    "move-cancel": Operation(BEGUN, of_move(ask.CancelOperation), moves=True, undoes=True),
    "start": Operation(each(START, MIRRORED, STOP), START, defined=True),
    "start-after-a-crash": Operation(each(START, MIRRORED), START, defined=True, crashed=True),
    "stop": Operation(each(START, MIRRORED), STOP, defined=True),
    "revert": Operation(
        each(START, snapshot("s1"), copies("vdb")),
        on(ask.RevertSnapshot, snapshot="s1", start=True),
        defined=True,
        forgets=True,
    ),
}
