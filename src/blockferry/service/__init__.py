"""The one door: a request comes in, a view goes out. One writer per domain; recovery before anything is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from blockferry import errors
from blockferry.hostprocess import WINDOW_SECONDS
from blockferry.journal.journal import Journal
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.qemu.images import Images
from blockferry.qemu.roots import StorageRoots
from blockferry.service.chains import Chains
from blockferry.service.desk import Desk, Witness
from blockferry.service.doctor import Doctor
from blockferry.service.domains import Domains
from blockferry.service.graphs import Graphs
from blockferry.service.history import History
from blockferry.service.jobs import Jobs
from blockferry.service.lifecycle import Lifecycle
from blockferry.service.moves import Moves
from blockferry.service.named import named_files
from blockferry.service.snapshots import Snapshots

__all__ = ["Service"]

Door = Callable[[Any], Coroutine[Any, Any, view.View]]


def _nobody(_when: str, _what: str) -> None:
    pass


class Service:
    """What one state directory can do. Made by `open`; the caller holds the directory's lock.

    Args:
        desk: what its rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._history = History(desk)
        self._jobs = Jobs(desk)
        self._moves = Moves(desk, self._jobs)
        self._doors = self._open_doors()

    @classmethod
    async def open(
        cls,
        state_dir: Path,
        *,
        storage_roots: tuple[str, ...] = (),
        witness: Witness = _nobody,
        window_seconds: float = WINDOW_SECONDS,
    ) -> Service:
        """Open the journal, connect to the domains, and settle what was interrupted.

        Args:
            state_dir: an absolute path that exists and is ours.
            storage_roots: absolute paths of the folders in which images may lie; none: what callers name, and what is near.
            witness: told before and after every durable write and QMP command; for logs and tests.
            window_seconds: how long a guest may stand still before its window is left.

        Raises:
            StateDirUnusable: the journal can't be opened.
            BadRequest: a storage root is no absolute path.
        """
        for root in storage_roots:
            if not root.startswith("/"):
                raise errors.BadRequest(reason=f"storage root {root!r} is not an absolute path")
        journal = Journal(state_dir / "journal.sqlite", witness)
        images = Images(StorageRoots(storage_roots, lambda: named_files(journal)))
        desk = Desk(journal, images, witness, state_dir, window_seconds)
        for record in desk.journal.domains():
            desk.keepers[record.name] = desk.new_keeper(record.name)
        service = cls(desk)
        await service.submit(ask.Recover())
        return service

    def _open_doors(self) -> dict[type, Door]:
        domains, snapshots = Domains(self._desk), Snapshots(self._desk)
        lifecycle = Lifecycle(self._desk, domains)
        jobs, moves, chains = self._jobs, self._moves, Chains(self._desk)
        return {
            ask.Attach: domains.attach,
            ask.Detach: domains.detach,
            ask.Define: lifecycle.define,
            ask.Undefine: lifecycle.undefine,
            ask.Start: lifecycle.start,
            ask.Stop: lifecycle.stop,
            ask.RevertSnapshot: lifecycle.revert,
            ask.Suspend: lifecycle.suspend,
            ask.Resume: lifecycle.resume,
            ask.ListDomains: domains.list,
            ask.ShowDomain: domains.show,
            ask.ShowGraph: Graphs(self._desk).show,
            ask.CreateSnapshot: snapshots.create,
            ask.ListSnapshots: snapshots.list,
            ask.ShowSnapshot: snapshots.show,
            ask.DeleteSnapshot: snapshots.delete,
            ask.StartCopy: jobs.copy,
            ask.ListJobs: jobs.list,
            ask.PivotJobs: jobs.pivot,
            ask.FinishJobs: jobs.finish,
            ask.CancelJobs: jobs.cancel,
            ask.SetJobSpeed: jobs.set_speed,
            ask.Rebase: chains.rebase,
            ask.Commit: chains.commit,
            ask.MoveStorage: moves.move,
            ask.ShowMove: moves.show,
            ask.SetMoveSpeed: moves.set_speed,
            ask.SetStorageSpeed: moves.set_storage_speed,
            ask.ListStorages: moves.list_storages,
            ask.ResumeOperation: moves.resume,
            ask.CancelOperation: moves.cancel,
            ask.ListEvents: self._history.list_events,
            ask.ListOperations: self._history.list_operations,
            ask.ShowOperation: self._history.show_operation,
            ask.Recover: self._history.recover,
            ask.Doctor: Doctor(self._desk).examine,
        }

    async def close(self) -> None:
        """Let go of everything; guests and their jobs go on."""
        await self._moves.close()
        await self._desk.close()

    def has_work(self) -> bool:
        """Whether there is something to watch: an operation, a job that works, a guest to be thawed, a domain that we started."""
        return self._moves.at_work() or any(
            keeper.turns.in_flight
            or keeper.active()
            or keeper.runner.frozen
            or (keeper.record.defined and not keeper.record.gone)
            for keeper in self._desk.keepers.values()
        )

    async def submit(self, request: ask.Request) -> view.View:
        """Do what is asked, and answer.

        Raises:
            BlockferryError: what happened, what state things are in, and what to do next.
        """
        return await self._doors[type(request)](request)

    async def watch(self, domain: str | None, since: int | None) -> AsyncIterator[view.Event]:
        """Events as they happen, progress among them; first the recorded ones after number `since`, if it is given."""
        with self._desk.bus.listen() as queue:
            last = self._desk.journal.last_event()
            if since is not None:
                for event in self._desk.journal.events(domain, since):
                    yield event
            while (heard := await queue.get()) is not None:
                if (heard.seq == 0 or heard.seq > last) and domain in (None, heard.domain):
                    yield heard
