"""Server-sent events: one stream a watcher, ended by whoever leaves first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.types import Receive, Scope, Send

from blockferry import errors
from blockferry.model.view import VERSION, Event

OPENED = b": subscribed\n\n"


class EventStream:
    """An ASGI response that sends events until the client leaves, the service ends them, or we close.

    Not Starlette's StreamingResponse: that one notices a client that left only when it sends the next event.

    Args:
        events: from Service.watch.
        closing: set when the server ends.
    """

    def __init__(self, events: AsyncIterator[Event], closing: asyncio.Event) -> None:
        self._events = events
        self._closing = closing

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        ends = [asyncio.create_task(self._closing.wait()), asyncio.create_task(_left(receive))]
        upcoming = asyncio.ensure_future(self._next())
        try:
            # The subscription is opened before anything is awaited: after one turn of the loop it is open.
            await asyncio.sleep(0)
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": OPENED, "more_body": True})
            while True:
                await asyncio.wait([upcoming, *ends], return_when=asyncio.FIRST_COMPLETED)
                if any(end.done() for end in ends):
                    break
                chunk = upcoming.result()
                if chunk is None:
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                upcoming = asyncio.ensure_future(self._next())
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (upcoming, *ends):
                task.cancel()
            await asyncio.gather(upcoming, *ends, return_exceptions=True)
            aclose = getattr(self._events, "aclose", None)
            if aclose is not None:
                await aclose()

    async def _next(self) -> bytes | None:
        try:
            return encode(await anext(self._events))
        except StopAsyncIteration:
            return None
        except errors.BlockferryError as error:
            # The stream has begun, so its status can't say it any more.
            body = {"version": VERSION, "kind": "error", "error": error.to_dict()}
            return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"


def encode(event: Event) -> bytes:
    """One event as the stream has it. Progress has no number, so it has no id that a client could resume from."""
    number = f"id: {event.seq}\n" if event.seq else ""
    return f"{number}event: {event.type}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
