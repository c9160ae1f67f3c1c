"""A guest, and what can be done with its disks."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Literal

from blockferry.client.asking import TIMEOUT_S, Asking, absolute
from blockferry.client.jobs import BlockJob, job_of
from blockferry.client.moves import StorageMove
from blockferry.client.snapshots import DomainSnapshot
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.model.snapshot import SnapshotWish


class Domain:
    """A guest. Methods that change something raise what docs/errors.md lists.

    Args:
        ferry: whose it is.
        name: as it was attached.
    """

    def __init__(self, ferry: Asking, name: str) -> None:
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
            buf_size: bytes in flight at most; ours unless told (docs/adr/0021-in-flight.md).
            resume: go on with the copy to `dest` that was cancelled or lost: only what it lacks is moved.

        Raises:
            NotResumable: it is not known what it lacks.
        """
        request = requests.StartCopy(
            domain=self.name,
            disk=disk,
            dest=absolute(dest),
            base=absolute(base) if base is not None else None,
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
            base=absolute(base) if base is not None else None,
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
            base=absolute(base) if base is not None else None,
            top=absolute(top) if top is not None else None,
            bandwidth=bandwidth,
            flags=int(flags),
        )
        return BlockJob(self._ferry, await self._ferry.ask(request, views.JobView))

    async def move(
        self,
        dest: str | os.PathLike[str],
        disks: Mapping[str, str | None] | Iterable[str] = (),
        bandwidth: int = 0,
        *,
        format: Literal["keep", "qcow2", "raw"] = "keep",  # noqa: A002 (QEMU's and libvirt's word)
        chain: Literal["keep", "flatten"] = "keep",
        strategy: Literal["auto", "mirror", "offload"] = "auto",
        max_pause_ms: int | None = None,
        verify: Literal["none", "sample", "full"] = "full",
        delete_source: bool = False,
        converge: bool = False,
        deadline: float | None = None,
    ) -> StorageMove:
        """Move its disks to a directory while it runs; all go over at one instant, or none does.

        It goes on by itself; iterate over it, or `wait` for it.

        Args:
            dest: the directory.
            disks: targets; or target -> a file's name there, a block device, an NBD URI, or None for its own name. None
                named means all.
            bandwidth: bytes per second of the whole move, 0 for no limit.
            format: the new images', `keep` each its own.
            chain: `keep` the images under the active ones, or make one image of each disk.
            strategy: `mirror`: QEMU copies; `offload`: images are copied outside QEMU; `auto` the best for each disk.
            max_pause_ms: go on mirroring while a longer pause is to be expected.
            verify: how source and destination are compared afterwards.
            delete_source: remove the sources at the end; with `verify` full, or none.
            converge: make the guest's writes wait for the destination.
            deadline: seconds; a move whose guest has not gone over by then is given up, and the guest stays where it was.

        Raises:
            Refused: any of its kinds, with nothing done.
        """
        request = requests.MoveStorage(
            domain=self.name,
            dest=absolute(dest),
            disks=dict(disks) if isinstance(disks, Mapping) else dict.fromkeys(disks),
            bandwidth=bandwidth,
            format=format,
            chain=chain,
            strategy=strategy,
            max_pause_ms=max_pause_ms,
            verify=verify,
            delete_source=delete_source,
            converge=converge,
            deadline=deadline,
        )
        return StorageMove(self._ferry, await self._ferry.ask(request, views.MoveView))

    async def jobs(self) -> tuple[views.JobView, ...]:
        """Its block jobs, by target."""
        return (await self._ferry.ask(requests.ListJobs(domain=self.name), views.JobList)).jobs

    async def job(self, disk: str) -> BlockJob:
        """Look up the block job of a disk, by its target.

        Raises:
            NoSuchJob: it has none.
        """
        return BlockJob(self._ferry, await job_of(self._ferry, self.name, disk))

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
