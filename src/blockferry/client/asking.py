"""What everything in the library asks through."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from blockferry.errors import InternalError
from blockferry.model import request as requests
from blockferry.model import view as views

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


class Asking:
    """Asks a state directory's service.

    Args:
        transport: what it talks through.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def watch(self, domain: str | None = None, since: int | None = None) -> AsyncIterator[views.Event]:
        """Events as they happen, of a domain or of all; `since` a number, those recorded after it come first."""
        return self._transport.watch(domain, since)

    async def submit(self, request: requests.Request) -> views.View:
        """Carry out any request: what the other methods are made of."""
        return await self._transport.submit(request)

    async def ask(self, request: requests.Request, kind: type[T]) -> T:
        """Carry out a request that is answered with that kind of view."""
        answer = await self.submit(request)
        if not isinstance(answer, kind):
            raise InternalError(detail=f"{type(request).__name__} was answered with a {type(answer).__name__}")
        return answer


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as the host process has to see it; a URI is left as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


@contextlib.asynccontextmanager
async def closing(events: AsyncIterator[views.Event]) -> AsyncIterator[AsyncIterator[views.Event]]:
    """End a subscription with the block, not when it is collected."""
    try:
        yield events
    finally:
        aclose = getattr(events, "aclose", None)
        if aclose is not None:
            await aclose()
