"""A block job that works."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from blockferry.client.asking import TIMEOUT_S, Asking, closing
from blockferry.errors import HostProcessUnreachable, NoSuchJob
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.model.job import Progress
from blockferry.model.states import CAUGHT_UP, LOST, NEWEST, lost


class BlockJob:
    """A block job that works. Iterate over it for its progress until it is ready (a copy) or done (a commit, a rebase).

    Args:
        ferry: whose it is.
        view: how it looked when it was started or looked up.
    """

    def __init__(self, ferry: Asking, view: views.JobView) -> None:
        self._ferry = ferry
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
        self.view = await job_of(self._ferry, self.view.domain, self.disk)
        return self.view

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """Give its progress, about once a second and at least once, until the mirror is ready or has been used.

        It goes on through a restart of the host process.

        Raises:
            JobLost: a copy or mirror was lost, removed or cancelled.
            JobFailed: a commit or rebase was lost or cancelled.
        """
        # From here on recorded events are numbered after `since`: none is missed, whenever the watching begins.
        request = requests.ListEvents(domain=self.view.domain, since=NEWEST)
        since = (await self._ferry.ask(request, views.EventList)).last
        cut_off = False
        while True:
            try:
                progress = _progress(await self.info())
                yield progress
                if self._over(progress):
                    return
                cut_off = False
                async with closing(self._ferry.watch(self.view.domain, since)) as events:
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
            raise lost(self.view.domain, self.disk, self.view.type, progress.state, progress.reason)
        return progress.state in CAUGHT_UP

    async def pivot(self, timeout: float = TIMEOUT_S) -> views.Done:
        """Let the guest go on on the destination."""
        request = requests.PivotJobs(domain=self.view.domain, disks=(self.disk,), timeout=timeout)
        return await self._ferry.ask(request, views.Done)

    async def finish(self, timeout: float = TIMEOUT_S) -> views.Done:
        """Make the destination a copy of one instant; the guest stays where it is."""
        request = requests.FinishJobs(domain=self.view.domain, disks=(self.disk,), timeout=timeout)
        return await self._ferry.ask(request, views.Done)

    async def cancel(self) -> views.Done:
        """Stop it; what was written of the destination stays."""
        return await self._ferry.ask(requests.CancelJobs(domain=self.view.domain, disks=(self.disk,)), views.Done)

    async def set_speed(self, bandwidth: int) -> views.Done:
        """Limit it to that many bytes per second; 0 lifts the limit."""
        request = requests.SetJobSpeed(domain=self.view.domain, disk=self.disk, bandwidth=bandwidth)
        return await self._ferry.ask(request, views.Done)


def _progress(view: views.JobView) -> Progress:
    return Progress(
        domain=view.domain,
        disk=view.disk,
        state=view.state,
        current=view.current,
        total=view.total,
        reason=view.reason,
    )


async def job_of(ferry: Asking, domain: str, disk: str) -> views.JobView:
    """The block job of a disk, by its target.

    Raises:
        NoSuchJob: it has none.
    """
    jobs = (await ferry.ask(requests.ListJobs(domain=domain), views.JobList)).jobs
    found = next((view for view in jobs if view.disk == disk), None)
    if found is None:
        raise NoSuchJob(domain=domain, disk=disk)
    return found
