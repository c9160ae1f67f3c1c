"""A move of a guest's storage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from blockferry.client.asking import Asking, closing
from blockferry.errors import HostProcessUnreachable
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.model.moving import ENDS, Following, how_it_ended
from blockferry.model.states import NEWEST


class StorageMove:
    """A move that was begun; it goes on by itself. Iterate over it for its progress until it is over.

    Args:
        ferry: whose it is.
        view: how it looked when it was begun or looked up.
    """

    def __init__(self, ferry: Asking, view: views.MoveView) -> None:
        self._ferry = ferry
        self.view = view

    @property
    def operation(self) -> int:
        """Its number, by which `Ferry.move` finds it again."""
        return self.view.operation

    async def info(self) -> views.MoveView:
        """How far it is now, or how it ended."""
        self.view = await self._ferry.ask(requests.ShowMove(operation=self.operation), views.MoveView)
        return self.view

    async def __aiter__(self) -> AsyncIterator[views.MoveProgress]:
        """Give its progress, about once a second and at least once, until the move is over.

        It goes on through a restart of the host process.

        Raises:
            MoveStands: it stands still, with the reason; see `resume`.
            MoveCancelled: it was given up.
            MoveDiffers: source and destination are not equal.
        """
        # From here on recorded events are numbered after `since`: none is missed, whenever the watching begins.
        request = requests.ListEvents(domain=self.view.domain, since=NEWEST)
        since = (await self._ferry.ask(request, views.EventList)).last
        following = Following(msgspec.to_builtins(self.view))
        cut_off = False
        while True:
            try:
                await self._look(following)
                yield _progress(following)
                if following.over:
                    return
                cut_off = False
                async with closing(self._ferry.watch(self.view.domain, since)) as events:
                    async for event in events:
                        since = max(since, event.seq)
                        heard = msgspec.to_builtins(event)
                        news = following.concerns(heard)
                        if news:
                            await self._look(following, ended=event.type in ENDS)
                        if following.hear(heard) or news:
                            yield _progress(following)
                        if news and event.type in ENDS:
                            return
            except HostProcessUnreachable:
                # As of a block job: another host process is started by the next question, unless that can't be.
                if cut_off:
                    raise
                cut_off = True

    async def _look(self, following: Following, *, ended: bool = False) -> None:
        """See how it is now.

        Raises:
            BlockferryError: it is over, and not all went well.
        """
        following.look(msgspec.to_builtins(await self.info()))
        error = how_it_ended(following.move) if ended or following.over else None
        if error is not None:
            raise error

    async def wait(self) -> views.MoveView:
        """Wait until it is over.

        Raises:
            MoveStands, MoveCancelled, MoveDiffers: as when it is iterated over.
        """
        async for _progress_made in self:
            pass
        return self.view

    async def resume(self, *, verify: Literal["none"] | None = None) -> views.MoveView:
        """Go on with it where it stands still: what was copied stays copied.

        Args:
            verify: none, where source and destination can't be compared any more: then the sources stay where they are.

        Raises:
            MoveNotPossible: it is over.
        """
        request = requests.ResumeOperation(operation=self.operation, verify=verify)
        self.view = await self._ferry.ask(request, views.MoveView)
        return self.view

    async def cancel(self) -> views.MoveView:
        """Give it up: every disk is on the image that it was on, at the cost of what was written since it began.

        Raises:
            MoveNotPossible: it is over, or the guest has gone over.
        """
        request = requests.CancelOperation(operation=self.operation)
        self.view = await self._ferry.ask(request, views.MoveView)
        return self.view


def _progress(following: Following) -> views.MoveProgress:
    return msgspec.convert(following.progress(), views.MoveProgress)
