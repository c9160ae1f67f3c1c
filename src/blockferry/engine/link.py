"""One domain's QEMU: the connection to it, made anew where it breaks, and whether it still lives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from blockferry import errors
from blockferry.engine.executor import Executor
from blockferry.journal.journal import Journal
from blockferry.journal.records import DomainRecord
from blockferry.model.domain import Observation, names_that_last
from blockferry.model.job import Job
from blockferry.qemu.agent import Agent
from blockferry.qemu.images import Images
from blockferry.qemu.launch import Home
from blockferry.qemu.observe import Observer
from blockferry.qemu.process import born, ends
from blockferry.qemu.session import BadReply, CommandRefused, LostReply, Session, Witness

CONNECT_SECONDS = 5.0

T = TypeVar("T")


class Link:
    """The connection to a domain's QEMU: what the runner needs of a domain. The keeper is one.

    Args:
        name: the domain's.
        journal: the state directory's.
        images: the host's image files.
        witness: told of every QMP command.
        home: where its QEMU lives, when it is one that we start.

    Attributes:
        problem: why it can't be asked.
        seen: the domain as it was observed last.
    """

    def __init__(self, name: str, journal: Journal, images: Images, witness: Witness, *, home: Home) -> None:
        self.name = name
        self.home = home
        self.problem: errors.BlockferryError | None = None
        self.seen: Observation | None = None
        self._journal = journal
        self._images = images
        self._witness = witness
        self._connecting = asyncio.Lock()
        self._session: Session | None = None
        self._observer: Observer | None = None

    def _connected(self, session: Session, started: int | None) -> None:
        """There is a new connection, to a process that was started then."""
        raise NotImplementedError

    def _guest_gone(self, reason: str) -> None:
        """The QEMU that there was has ended."""
        raise NotImplementedError

    @property
    def record(self) -> DomainRecord:
        """The domain as the journal has it."""
        record = self._journal.domain(self.name)
        if record is None:
            raise errors.NoSuchDomain(domain=self.name)
        return record

    async def connect(self, timeout: float = CONNECT_SECONDS) -> Session:
        """The connection, made anew where it broke.

        Raises:
            QmpUnreachable, QmpBusy: see `Session.connect`.
            NotRunning: a domain that we start, and it is shut off.
            MissingCapability: this QEMU lacks what everything stands on.
        """
        async with self._connecting:
            if self._session is not None and self._session.alive:
                return self._session
            return await self._connect(timeout)

    async def _connect(self, timeout: float) -> Session:
        record = self.record
        if record.defined and (record.gone or not self.home.taken()):
            raise errors.NotRunning(domain=self.name)
        try:
            session = await Session.connect(record.qmp, timeout, self._witness)
            observer = await self._observer_of(session, record)
        except errors.BlockferryError as problem:
            self.problem = problem
            raise
        started = born(session.pid)
        if record.pid is not None and (record.pid, record.born) != (session.pid, started):
            if self._journal.open_operations(self.name):
                # They were begun with the QEMU before: what is in this one says nothing of them.
                await session.close()
                raise errors.QmpUnreachable(qmp=record.qmp, reason="another QEMU process answers there now")
            self._guest_gone("another QEMU process answers on its socket now")
            observer.targets = names_that_last(observer.targets)
        try:
            self._journal.put_domain(msgspec.structs.replace(self.record, pid=session.pid, born=started, gone=False))
        except errors.JournalUnwritable:
            await session.close()
            raise
        self._session, self._observer, self.problem = session, observer, None
        self._connected(session, started)
        return session

    async def _observer_of(self, session: Session, record: DomainRecord) -> Observer:
        """Look at a new connection; one that is no use must not hold the socket, which serves one client."""
        observer = Observer(session, record.targets)
        try:
            await observer.capabilities(self.name)
        except errors.BlockferryError:
            await session.close()
            raise
        except (LostReply, CommandRefused) as error:
            await session.close()
            raise errors.QmpUnreachable(qmp=record.qmp, reason=str(error)) from error
        return observer

    def _connects(self) -> bool:
        """Whether the present connection stands."""
        return self._session is not None and self._session.alive

    def session(self) -> Session | None:
        """The present connection; None where there is none."""
        return self._session

    async def executor(self) -> Executor:
        """Carries steps out on the present connection, made anew where it broke."""
        session = await self.connect()
        return Executor(self.name, session, self._observer, self._images, self.home, agent=self.agent())

    def nobody(self) -> Executor:
        """Carries steps out where there is no QEMU."""
        return Executor(self.name, None, None, self._images, self.home, agent=self.agent())

    def agent(self) -> Agent | None:
        """The guest's agent; None where its socket is not known."""
        path = self.record.agent
        return Agent(Path(path), self._witness) if path is not None else None

    @contextlib.contextmanager
    def stopwatch(self, held: Collection[str] = ()) -> Iterator[Any]:
        """Measure a pause; see qemu.session.Session.stopwatch."""
        if self._session is None:
            yield lambda: None
            return
        with self._session.stopwatch(held) as milliseconds:
            yield milliseconds

    async def is_gone(self, seconds: float = 0.0) -> bool:
        """Whether the QEMU that we were attached to has ended, or does within `seconds`."""
        record = self.record
        if record.gone:
            return True
        ended = record.pid is not None and await ends(record.pid, record.born, seconds)
        # Of one that we start its lock says so, also of one that died before we knew its process.
        return not self.home.taken() if record.defined else ended

    async def observe(self) -> Observation:
        """The domain now; its targets are kept from here on.

        Raises:
            GuestGone: QEMU went away while it was asked.
            QmpTimeout: it lives, and does not answer.
            QmpUnreachable, QmpBusy: it can't be asked.
        """
        return await self._asked(self._look)

    async def observe_work(self, seen: Observation) -> Observation:
        """The same observation, with the disks that the guest is working on now.

        Args:
            seen: the domain as observed.

        Raises:
            GuestGone, QmpTimeout, QmpUnreachable, QmpBusy: see `observe`.
        """
        return await self._asked(lambda: self._looking().work(seen))

    async def jobs(self) -> dict[str, Job]:
        """The jobs now, and nothing else: a whole look takes five times as much of the thread in which QEMU copies.

        Raises:
            GuestGone, QmpUnreachable, QmpBusy: see `observe`.
        """
        return await self._asked(lambda: self._looking().jobs())

    async def _asked(self, look: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._twice(look)
        except CommandRefused as refusal:
            raise errors.QmpUnreachable(qmp=self.record.qmp, reason=str(refusal)) from refusal

    async def _twice(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask what may be asked twice: the second try is for a connection that had broken without our noticing."""
        await self.connect()
        try:
            try:
                return await ask()
            except BadReply:
                raise
            except LostReply as lost:
                if lost.seconds is not None:
                    raise
                await self.connect()
                return await ask()
        except BadReply as bad:
            raise errors.QmpUnreachable(qmp=self.record.qmp, reason=str(bad)) from bad
        except LostReply as lost:
            if lost.seconds is not None:
                raise errors.QmpTimeout(domain=self.name, command=lost.command, seconds=lost.seconds) from lost
            raise errors.GuestGone(domain=self.name, reason=lost.reason) from lost

    def _looking(self) -> Observer:
        if self._observer is None:
            raise LostReply("observe", "not connected")
        return self._observer

    async def _look(self) -> Observation:
        observer = self._looking()
        self.seen = seen = await observer.observe(self.name)
        record = self.record
        if observer.targets != record.targets:
            self._journal.put_domain(msgspec.structs.replace(record, targets=dict(observer.targets)))
        return seen
