"""All domains of a state directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from blockferry import hostprocess
from blockferry.client.asking import Asking, absolute
from blockferry.client.domain import Domain
from blockferry.client.moves import StorageMove
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.transport import HttpTransport, reach


class Ferry(Asking):
    """All domains of a state directory: what `blockferry.open` and `blockferry.connect` give.

    Args:
        transport: what it talks through.
    """

    async def attach(
        self,
        name: str,
        qmp: str | os.PathLike[str],
        timeout: float = 5.0,
        agent: str | os.PathLike[str] | None = None,
        *,
        resume_mirrors: bool = False,
    ) -> Domain:
        """Take charge of a running guest.

        Args:
            name: what to call it from now on.
            qmp: its QMP socket.
            timeout: seconds to wait for QEMU's greeting.
            agent: the socket of its guest agent's channel, which QUIESCE needs.
            resume_mirrors: establish the mirrors again that it had when its QEMU ended.

        Raises:
            QmpBusy: something else holds the socket.
            QmpUnreachable: no QEMU answers there.
            DomainExists: the name is taken.
        """
        await self.submit(
            requests.Attach(
                domain=name,
                qmp=absolute(qmp),
                timeout=timeout,
                agent=absolute(agent) if agent is not None else None,
                resume_mirrors=resume_mirrors,
            )
        )
        return Domain(self, name)

    async def define_xml(self, xml: str) -> Domain:
        """Remember a guest that is started here, from libvirt's domain XML; see `Domain.create`.

        Raises:
            InvalidXml: it is malformed, or a disk or value of it can't be carried out.
            AlreadyRunning: one of that name runs.
        """
        shown = await self.ask(requests.Define(xml=xml), views.DomainView)
        return Domain(self, shown.name)

    async def domain(self, name: str) -> Domain:
        """Look up a domain.

        Raises:
            NoSuchDomain: there is none of that name.
        """
        domain = Domain(self, name)
        await domain.info()
        return domain

    async def detach(self, name: str) -> None:
        """Let go of a guest; it runs on.

        Raises:
            DomainInUse: a copy or mirror of ours works.
        """
        await self.submit(requests.Detach(domain=name))

    async def list(self) -> tuple[views.DomainRow, ...]:
        """All domains, by name."""
        return (await self.ask(requests.ListDomains(), views.DomainList)).domains

    async def operations(self, domain: str | None = None) -> tuple[views.OperationView, ...]:
        """What was done, oldest first, without the steps."""
        return (await self.ask(requests.ListOperations(domain=domain), views.OperationList)).operations

    async def operation(self, number: int) -> views.OperationView:
        """One operation with its steps."""
        return await self.ask(requests.ShowOperation(operation=number), views.OperationView)

    async def move(self, operation: int) -> StorageMove:
        """Look up a move, by the number of its operation.

        Raises:
            NoSuchOperation: there is none, or it is no move.
        """
        return StorageMove(self, await self.ask(requests.ShowMove(operation=operation), views.MoveView))

    async def events(self, domain: str | None = None, since: int = 0) -> tuple[views.Event, ...]:
        """The recorded events after number `since`."""
        return (await self.ask(requests.ListEvents(domain=domain, since=since), views.EventList)).events

    async def recover(self) -> views.RecoveryReport:
        """Look at every operation that is not settled, and settle it."""
        return await self.ask(requests.Recover(), views.RecoveryReport)

    async def doctor(self, name: str | None = None) -> views.Findings:
        """What is wrong with a domain, or (None) with the host and any of its domains; changes nothing."""
        return await self.ask(requests.Doctor(domain=name), views.Findings)


@contextlib.asynccontextmanager
async def connect(state_dir: str | os.PathLike[str] | None = None) -> AsyncIterator[Ferry]:
    """Connect to the host process of a state directory, which is started when none runs.

    Args:
        state_dir: where state is kept; the default is the command's.

    Raises:
        StateDirBusy: a program has it open (`blockferry.open`), and serves nobody.
        StateDirUnusable: it can't be made, read or trusted.
        HostProcessUnreachable: the host process did not start.
    """
    state = hostprocess.StateDir(state_dir or hostprocess.default_state_dir())
    await reach(state)
    transport = HttpTransport(state)
    try:
        yield Ferry(transport)
    finally:
        await transport.close()
