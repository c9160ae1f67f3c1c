"""The way to a host process: JSON over HTTP on its Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from blockferry import hostprocess
from blockferry.errors import BadRequest, BlockferryError, HostProcessUnreachable, InternalError, from_dict
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.sockets import short_path

if TYPE_CHECKING:
    import httpx


T = TypeVar("T")


class HttpTransport:
    """A connection to the host process of a state directory, which is started again when it went away idle.

    Args:
        state: whose host process.
    """

    def __init__(self, state: hostprocess.StateDir) -> None:
        import httpx

        self._state = state
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(short_path(state.socket))
            # No kept connections: one more costs nothing here, and none is found closed by the other side.
            limits = httpx.Limits(max_keepalive_connections=0)
            transport = httpx.AsyncHTTPTransport(uds=address, limits=limits)
            self._http = httpx.AsyncClient(transport=transport, base_url="http://blockferry", timeout=None)  # noqa: S113 (a pivot waits as long as its own timeout says)
            self._cleanup = stack.pop_all()

    async def submit(self, request: requests.Request) -> views.View:
        """Carry out a request.

        Raises:
            BadRequest: it has text that is no text.
            HostProcessUnreachable: the host process went away before it answered.
            BlockferryError: what it answered.
        """
        try:
            content = msgspec.json.encode(request)
        except UnicodeEncodeError as error:
            raise BadRequest(reason=f"{error.object[:200]!r} is not UTF-8") from error
        message = self._http.build_request("POST", "/v1/request", content=content)
        async with self._sent(message) as response:
            view: views.View = msgspec.json.decode(await response.aread(), type=views.View)
            return view

    async def watch(self, domain: str | None, since: int | None) -> AsyncIterator[views.Event]:
        """Events as the host process sends them, until it ends.

        Raises:
            HostProcessUnreachable: it went away without an end.
            BlockferryError: what it answered.
        """
        wanted = {"domain": domain, "since": since}
        params = {name: value for name, value in wanted.items() if value is not None}
        message = self._http.build_request("GET", "/v1/events", params=params)
        async with self._sent(message) as response:
            rest = b""
            # Not httpx's aiter_lines: JSON may hold characters that count as line ends elsewhere.
            chunks = response.aiter_bytes()
            while (chunk := await self._unless_stopped(anext(chunks, None))) is not None:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        yield _event(line.removeprefix(b"data: "))

    async def close(self) -> None:
        """End it; the host process stays."""
        await self._http.aclose()
        self._cleanup.close()

    @contextlib.asynccontextmanager
    async def _sent(self, message: httpx.Request) -> AsyncIterator[httpx.Response]:
        """Send a request and give its answer; what goes wrong in the block too is an error of ours."""
        import httpx

        try:
            try:
                response = await self._unless_stopped(self._http.send(message, stream=True))
            except httpx.ConnectError:
                # Nobody listens, so nothing was sent: it is safe to say it to the next one.
                await reach(self._state)
                response = await self._unless_stopped(self._http.send(message, stream=True))
            async with contextlib.aclosing(response):
                if response.is_error:
                    raise _told(await response.aread())
                yield response
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise HostProcessUnreachable(state_dir=str(self._state), reason=reason) from error

    async def _unless_stopped(self, said: Awaitable[T]) -> T:
        """What the host process says next, however long that takes, as long as it answers others."""
        saying = asyncio.ensure_future(said)
        try:
            while not (await asyncio.wait([saying], timeout=hostprocess.LOOK_SECONDS))[0]:
                if not await asyncio.to_thread(hostprocess.answers, self._state):
                    reason = "it does not answer any more: is it stopped, or does its host hang?"
                    raise HostProcessUnreachable(state_dir=str(self._state), reason=reason)
            return saying.result()
        finally:
            saying.cancel()


class _ErrorBody(msgspec.Struct, tag_field="kind", tag="error"):
    error: dict[str, object]


def _event(data: bytes) -> views.Event:
    event = msgspec.json.decode(data, type=views.Event | _ErrorBody)
    if isinstance(event, _ErrorBody):
        raise from_dict(event.error)
    return event


def _told(body: bytes) -> BlockferryError:
    """The error that an answer's body describes."""
    try:
        return from_dict(msgspec.json.decode(body, type=_ErrorBody).error)
    except msgspec.MsgspecError:
        return InternalError(detail=f"the host process answered {body[:200]!r}")


async def reach(state: hostprocess.StateDir) -> None:
    """See that a host process listens."""
    connection = await asyncio.to_thread(hostprocess.ensure_running, state)
    connection.close()
