"""A snapshot that was taken."""

from __future__ import annotations

from blockferry.client.asking import TIMEOUT_S, Asking
from blockferry.model import request as requests
from blockferry.model import view as views


class DomainSnapshot:
    """A snapshot that was taken.

    Args:
        ferry: whose it is.
        view: how it looked when it was taken or looked up.
    """

    def __init__(self, ferry: Asking, view: views.SnapshotView) -> None:
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
