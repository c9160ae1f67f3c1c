"""The library: a ferry, its domains, their snapshots and copies, over a service in this process or over HTTP.

The names are libvirt's, in snake_case; what comes back are the views of model.view.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from typing import Protocol, TypeVar

import msgspec

from blockferry import hostprocess
from blockferry.errors import (
    HostProcessUnreachable,
    InternalError,
    NoSuchJob,
)
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.model.job import Progress
from blockferry.model.snapshot import SnapshotWish
from blockferry.model.states import CAUGHT_UP, LOST, NEWEST, lost
from blockferry.transport import HttpTransport, reach

T = TypeVar("T", bound=views.View)
TIMEOUT_S = 60.0  # as the command's --timeout


class Transport(Protocol):
    """What the library talks through: the service itself, or a connection to the host process."""

    async def submit(self, request: requests.Request) -> views.View:
        """Carry out a request, or raise a BlockferryError."""
        ...

    def watch(self, domain: str | None, since: int | None) -> AsyncIterator[views.Event]:
        """Events of a domain or of all, recorded ones after `since` first, then as they happen."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


# --- the facade -----------------------------------------------------------------------------------------------


class Ferry:
    """All domains of a state directory: what `blockferry.open` and `blockferry.connect` give.

    Args:
        transport: what it talks through.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

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
                qmp=_absolute(qmp),
                timeout=timeout,
                agent=_absolute(agent) if agent is not None else None,
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

    async def events(self, domain: str | None = None, since: int = 0) -> tuple[views.Event, ...]:
        """The recorded events after number `since`."""
        return (await self.ask(requests.ListEvents(domain=domain, since=since), views.EventList)).events

    def watch(self, domain: str | None = None, since: int | None = None) -> AsyncIterator[views.Event]:
        """Events as they happen, of a domain or of all; `since` a number, those recorded after it come first."""
        return self._transport.watch(domain, since)

    async def recover(self) -> views.RecoveryReport:
        """Look at every operation that is not settled, and settle it."""
        return await self.ask(requests.Recover(), views.RecoveryReport)

    async def doctor(self, name: str | None = None) -> views.Findings:
        """What is wrong with a domain, or (None) with the host and any of its domains; changes nothing."""
        return await self.ask(requests.Doctor(domain=name), views.Findings)

    async def submit(self, request: requests.Request) -> views.View:
        """Carry out any request: what the other methods are made of."""
        return await self._transport.submit(request)

    async def ask(self, request: requests.Request, kind: type[T]) -> T:
        """Carry out a request that is answered with that kind of view."""
        answer = await self.submit(request)
        if not isinstance(answer, kind):
            raise InternalError(detail=f"{type(request).__name__} was answered with a {type(answer).__name__}")
        return answer


class Domain:
    """A guest. Methods that change something raise what docs/errors.md lists.

    Args:
        ferry: whose it is.
        name: as it was attached.
    """

    def __init__(self, ferry: Ferry, name: str) -> None:
        self._ferry = ferry
        self.name = name

    async def info(self) -> views.DomainView:
        """Its state, disks, chains and mirrors."""
        return await self._ferry.ask(requests.ShowDomain(domain=self.name), views.DomainView)

    async def xml_desc(self, *, inactive: bool = False) -> str:
        """Its XML: as it runs, or (`inactive`) as it is started next."""
        request = requests.ShowDomain(domain=self.name, inactive=inactive)
        return (await self._ferry.ask(request, views.DomainView)).xml or ""

    async def graph(self) -> views.GraphView:
        """Its block graph: devices, nodes, who uses what, and the jobs that work on it."""
        return await self._ferry.ask(requests.ShowGraph(domain=self.name), views.GraphView)

    async def create(self, *, paused: bool = False, require_mirrors: bool = False) -> views.DomainView:
        """Start it, with its mirrors.

        Args:
            paused: leave it paused before its first instruction.
            require_mirrors: don't start it when a mirror can't be established again.

        Raises:
            MirrorGone: one can't.
            OperationFailed: QEMU did not start, with its last words.
            AlreadyRunning: it runs.
        """
        request = requests.Start(domain=self.name, paused=paused, require_mirrors=require_mirrors)
        return await self._ferry.ask(request, views.DomainView)

    async def shutdown(self, timeout: float = TIMEOUT_S) -> None:
        """Ask the guest to shut down, and wait for it, `timeout` seconds.

        Raises:
            StillRunning: it has not.
        """
        await self._ferry.submit(requests.Stop(domain=self.name, timeout=timeout))

    async def destroy(self) -> None:
        """End its QEMU, whatever the guest does."""
        await self._ferry.submit(requests.Stop(domain=self.name, force=True))

    async def suspend(self) -> None:
        """Pause its processors."""
        await self._ferry.submit(requests.Suspend(domain=self.name))

    async def resume(self) -> None:
        """Let it run."""
        await self._ferry.submit(requests.Resume(domain=self.name))

    async def undefine(self) -> None:
        """Forget it, shut off; its images stay."""
        await self._ferry.submit(requests.Undefine(domain=self.name))

    async def snapshot_create_xml(self, xml: str, flags: int = 0) -> DomainSnapshot:
        """Take a snapshot as the XML says; with REDEFINE (1) none is taken: the one that the XML describes is remembered.

        Args:
            xml: `<domainsnapshot>`, with `<mirror file= backing=>` in any `<disk>`.
            flags: of SnapshotCreate.
        """
        return await self._snapshot(requests.CreateSnapshot(domain=self.name, xml=xml, flags=int(flags)))

    async def snapshot_create(self, wish: SnapshotWish, flags: int = 0) -> DomainSnapshot:
        """Take a snapshot without XML; `flags` are SnapshotCreate's."""
        return await self._snapshot(requests.CreateSnapshot(domain=self.name, wish=wish, flags=int(flags)))

    async def _snapshot(self, request: requests.CreateSnapshot) -> DomainSnapshot:
        return DomainSnapshot(self._ferry, await self._ferry.ask(request, views.SnapshotView))

    async def snapshots(self) -> tuple[DomainSnapshot, ...]:
        """Its snapshots, oldest first."""
        answer = await self._ferry.ask(requests.ListSnapshots(domain=self.name), views.SnapshotList)
        return tuple(DomainSnapshot(self._ferry, view) for view in answer.snapshots)

    async def snapshot(self, name: str) -> DomainSnapshot:
        """Look up a snapshot.

        Raises:
            NoSuchSnapshot: it has none of that name.
        """
        request = requests.ShowSnapshot(domain=self.name, snapshot=name)
        return DomainSnapshot(self._ferry, await self._ferry.ask(request, views.SnapshotView))

    async def block_copy(
        self,
        disk: str,
        dest: str | os.PathLike[str],
        base: str | None = None,
        bandwidth: int = 0,
        flags: int = 0,
        *,
        format: str | None = None,  # noqa: A002 (QEMU's and libvirt's word)
        granularity: int | None = None,
        buf_size: int | None = None,
        resume: bool = False,
    ) -> BlockJob:
        """Start a copy of a disk that follows all writes.

        Args:
            disk: a target, a qdev id, or the path of an image in its chain.
            dest: the image to make: a path, a block device's, `nbd+unix:///EXPORT?socket=PATH` or `nbd://HOST/EXPORT`.
            base: an image of the chain, however far down, that the destination is to back onto; None for a whole copy.
            bandwidth: bytes per second, 0 for no limit.
            flags: of BlockCopy.
            format: the destination's, the source's unless told.
            granularity: bytes that are copied at once, a power of two; QEMU's own choice unless told.
            buf_size: bytes in flight at most; QEMU's own choice unless told.
            resume: go on with the copy to `dest` that was cancelled or lost: only what it lacks is moved.

        Raises:
            NotResumable: it is not known what it lacks.
        """
        request = requests.StartCopy(
            domain=self.name,
            disk=disk,
            dest=_absolute(dest),
            base=_absolute(base) if base is not None else None,
            bandwidth=bandwidth,
            flags=int(flags),
            format=format,
            granularity=granularity,
            buf_size=buf_size,
            resume=resume,
        )
        return BlockJob(self._ferry, await self._ferry.ask(request, views.JobView))

    async def block_rebase(self, disk: str, base: str | None = None, bandwidth: int = 0, flags: int = 0) -> BlockJob:
        """Pull into a disk's image what lies between it and `base`, while the guest runs.

        On a disk that is being copied onto the same base it joins that copy, and gives it.

        Args:
            disk: a target, a qdev id, or the path of an image in its chain.
            base: the image that the disk is to back onto; None for none, so that its image holds everything itself.
            bandwidth: bytes per second, 0 for no limit.
            flags: virDomainBlockRebaseFlags; BANDWIDTH_BYTES is how it is anyway.

        Raises:
            RebaseElsewhere: it is being copied onto another base.
        """
        request = requests.Rebase(
            domain=self.name,
            disk=disk,
            base=_absolute(base) if base is not None else None,
            bandwidth=bandwidth,
            flags=int(flags),
        )
        return BlockJob(self._ferry, await self._ferry.ask(request, views.JobView))

    async def block_commit(
        self, disk: str, base: str | None = None, top: str | None = None, bandwidth: int = 0, flags: int = 0
    ) -> BlockJob:
        """Write the layers from `top` to above `base` down into the base, while the guest runs.

        A commit of the active image ends by itself: the guest goes over to the base, in a pause of milliseconds.

        Args:
            disk: a target, a qdev id, or the path of an image in its chain.
            base: what is written to; None for the bottom of the chain, as libvirt's.
            top: the topmost layer that is written; None for the active image.
            bandwidth: bytes per second, 0 for no limit.
            flags: virDomainBlockCommitFlags: SHALLOW (1), DELETE (2); ACTIVE (4) is found out anyway.
        """
        request = requests.Commit(
            domain=self.name,
            disk=disk,
            base=_absolute(base) if base is not None else None,
            top=_absolute(top) if top is not None else None,
            bandwidth=bandwidth,
            flags=int(flags),
        )
        return BlockJob(self._ferry, await self._ferry.ask(request, views.JobView))

    async def jobs(self) -> tuple[views.JobView, ...]:
        """Its block jobs, by target."""
        return (await self._ferry.ask(requests.ListJobs(domain=self.name), views.JobList)).jobs

    async def job(self, disk: str) -> BlockJob:
        """Look up the block job of a disk, by its target.

        Raises:
            NoSuchJob: it has none.
        """
        for view in await self.jobs():
            if view.disk == disk:
                return BlockJob(self._ferry, view)
        raise NoSuchJob(domain=self.name, disk=disk)

    async def pivot(self, disks: Iterable[str], timeout: float = TIMEOUT_S) -> views.Done:
        """Let the guest go on on the destinations of these disks: all at one instant, or none.

        Args:
            disks: any number of them.
            timeout: seconds for their mirrors to be ready.
        """
        request = requests.PivotJobs(domain=self.name, disks=tuple(disks), timeout=timeout)
        return await self._ferry.ask(request, views.Done)

    async def finish(self, disks: Iterable[str], timeout: float = TIMEOUT_S) -> views.Done:
        """Make the destinations of these disks copies of one instant; the guest stays where it is.

        Args:
            disks: any number of them.
            timeout: seconds for their mirrors to be ready.
        """
        request = requests.FinishJobs(domain=self.name, disks=tuple(disks), timeout=timeout)
        return await self._ferry.ask(request, views.Done)

    async def cancel(self, disks: Iterable[str]) -> views.Done:
        """Stop the copies or mirrors of these disks; what was written of the destinations stays."""
        return await self._ferry.ask(requests.CancelJobs(domain=self.name, disks=tuple(disks)), views.Done)

    async def set_speed(self, disk: str, bandwidth: int) -> views.Done:
        """Limit a copy to that many bytes per second; 0 lifts the limit."""
        request = requests.SetJobSpeed(domain=self.name, disk=disk, bandwidth=bandwidth)
        return await self._ferry.ask(request, views.Done)

    def watch(self, since: int | None = None) -> AsyncIterator[views.Event]:
        """Its events as they happen; `since` a number, those recorded after it come first."""
        return self._ferry.watch(self.name, since)


class DomainSnapshot:
    """A snapshot that was taken.

    Args:
        ferry: whose it is.
        view: how it looked when it was taken or looked up.
    """

    def __init__(self, ferry: Ferry, view: views.SnapshotView) -> None:
        self._ferry = ferry
        self.view = view

    @property
    def name(self) -> str:
        """Unique in its domain."""
        return self.view.name

    @property
    def parent(self) -> str | None:
        """The snapshot that was current when it was taken; as of when it was looked up."""
        return self.view.parent

    @property
    def children(self) -> tuple[str, ...]:
        """The snapshots that were taken directly on top of it; as of when it was looked up."""
        return self.view.children

    @property
    def current(self) -> bool:
        """Whether the guest writes to its images; as of when it was looked up."""
        return self.view.current

    async def xml_desc(self) -> str:
        """Its XML, with its mirrors as they are now."""
        request = requests.ShowSnapshot(domain=self.view.domain, snapshot=self.name)
        self.view = await self._ferry.ask(request, views.SnapshotView)
        return self.view.xml or ""

    async def delete(self, flags: int = 0, timeout: float = TIMEOUT_S) -> views.Done:
        """Delete it; without flags by merging its images down into what they back onto, and wait for that.

        Args:
            flags: of SnapshotDelete; CHILDREN and CHILDREN_ONLY merge those, METADATA_ONLY leaves the images as they are,
                REOPEN_MIRROR lets the guest go on on the mirrors, all at one instant or none.
            timeout: seconds for the mirrors to be ready.
        """
        request = requests.DeleteSnapshot(
            domain=self.view.domain,
            snapshot=self.name,
            flags=int(flags),
            timeout=timeout,
        )
        return await self._ferry.ask(request, views.Done)

    async def revert(self, *, start: bool = False, pause: bool = False) -> views.DomainView:
        """Bring its guest back to it; a guest that runs is ended first.

        Args:
            start: start it again.
            pause: start it again, and leave it paused.
        """
        request = requests.RevertSnapshot(domain=self.view.domain, snapshot=self.name, start=start, pause=pause)
        return await self._ferry.ask(request, views.DomainView)


class BlockJob:
    """A block job that works. Iterate over it for its progress until it is ready (a copy) or done (a commit, a rebase).

    Args:
        ferry: whose it is.
        view: how it looked when it was started or looked up.
    """

    def __init__(self, ferry: Ferry, view: views.JobView) -> None:
        self._ferry = ferry
        self._domain = Domain(ferry, view.domain)
        self.view = view

    @property
    def disk(self) -> str:
        """The target of its disk."""
        return self.view.disk

    async def info(self) -> views.JobView:
        """How far it is now, or how it ended.

        Raises:
            NoSuchJob: nothing is known of it any more.
        """
        self.view = (await self._domain.job(self.disk)).view
        return self.view

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """Give its progress, about once a second and at least once, until the mirror is ready or has been used.

        It goes on through a restart of the host process.

        Raises:
            JobLost: a copy or mirror was lost, removed or cancelled.
            JobFailed: a commit or rebase was lost or cancelled.
        """
        # From here on recorded events are numbered after `since`: none is missed, whenever the watching begins.
        request = requests.ListEvents(domain=self._domain.name, since=NEWEST)
        since = (await self._ferry.ask(request, views.EventList)).last
        cut_off = False
        while True:
            try:
                progress = _progress(await self.info())
                yield progress
                if self._over(progress):
                    return
                cut_off = False
                async with _closing(self._domain.watch(since)) as events:
                    async for event in events:
                        since = max(since, event.seq)
                        if event.disk != self.disk:
                            continue
                        progress = await self._seen(event)
                        yield progress
                        if self._over(progress):
                            return
            except HostProcessUnreachable:
                # It was killed. The copy is QEMU's and goes on, only questions were cut off, and the next one starts
                # another host process, unless that can't be: then it is cut off twice without an answer between.
                if cut_off:
                    raise
                cut_off = True

    async def _seen(self, event: views.Event) -> Progress:
        if event.type == "progress":
            return msgspec.convert(event.data, Progress)
        return _progress(await self.info())

    def _over(self, progress: Progress) -> bool:
        if progress.state in LOST:
            raise lost(self._domain.name, self.disk, self.view.type, progress.state, progress.reason)
        return progress.state in CAUGHT_UP

    async def pivot(self, timeout: float = TIMEOUT_S) -> views.Done:
        """Let the guest go on on the destination."""
        return await self._domain.pivot([self.disk], timeout)

    async def finish(self, timeout: float = TIMEOUT_S) -> views.Done:
        """Make the destination a copy of one instant; the guest stays where it is."""
        return await self._domain.finish([self.disk], timeout)

    async def cancel(self) -> views.Done:
        """Stop it; what was written of the destination stays."""
        return await self._domain.cancel([self.disk])

    async def set_speed(self, bandwidth: int) -> views.Done:
        """Limit it to that many bytes per second; 0 lifts the limit."""
        return await self._domain.set_speed(self.disk, bandwidth)


def _progress(view: views.JobView) -> Progress:
    return Progress(
        domain=view.domain,
        disk=view.disk,
        state=view.state,
        current=view.current,
        total=view.total,
        reason=view.reason,
    )


def _absolute(path: str | os.PathLike[str]) -> str:
    """The path as the host process has to see it; a URI is left as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


@contextlib.asynccontextmanager
async def _closing(events: AsyncIterator[views.Event]) -> AsyncIterator[AsyncIterator[views.Event]]:
    """End a subscription with the block, not when it is collected."""
    try:
        yield events
    finally:
        aclose = getattr(events, "aclose", None)
        if aclose is not None:
            await aclose()


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
