"""The application: requests in, views out; what was submitted is carried through whoever listens."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import re
import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from blockferry import errors
from blockferry.interfaces.api.events import EventStream
from blockferry.interfaces.api.status import http_status
from blockferry.model import request as requests
from blockferry.model import view as views
from blockferry.service import Service

logger = logging.getLogger("blockferry.api")
BODY_MAX = 4 * 1024 * 1024  # a snapshot's XML with a thousand disks is 300 KiB
# Who and the password in a URI.
_USER = re.compile(r"://[^/@\s\"]*@")
READING = (
    requests.ListDomains,
    requests.ShowDomain,
    requests.ListSnapshots,
    requests.ShowSnapshot,
    requests.ListJobs,
    requests.ListEvents,
    requests.ListOperations,
    requests.ShowOperation,
)  # these change nothing and are not logged


class Api:
    """The service over HTTP.

    Args:
        service: the one door.

    Attributes:
        app: the ASGI application.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._submitted: set[asyncio.Task[views.View]] = set()
        self._closing = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/request", self._request, methods=["POST"]),
                Route("/v1/events", self._events, methods=["GET"]),
                Route("/v1/health", self._health, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _not_found, Exception: _bug},
        )

    @property
    def busy(self) -> bool:
        """Whether something that was submitted is not done yet."""
        return bool(self._submitted)

    def close(self) -> None:
        """End all event streams."""
        self._closing.set()

    async def drain(self, seconds: float) -> None:
        """Wait for what was submitted; what is not done by then is left to the journal."""
        if self._submitted:
            _done, left = await asyncio.wait(self._submitted, timeout=seconds)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _request(self, http: HttpRequest) -> Response:
        try:
            request = msgspec.json.decode(await _body(http), type=requests.Request)
        except msgspec.MsgspecError as error:
            return error_response(errors.BadRequest(reason=str(error)))
        except errors.BadRequest as error:
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=400)  # gone before it had said what it wants
        # A task of its own, waited for and never awaited: a client that goes away cancels nothing.
        task = asyncio.create_task(self._submit(request))
        self._submitted.add(task)
        task.add_done_callback(self._submitted.discard)
        await asyncio.wait([task])
        failure = errors.InternalError(detail="the host process was stopped") if task.cancelled() else task.exception()
        if failure is None:
            return json_response(task.result())
        if isinstance(failure, errors.BlockferryError):
            return error_response(failure)
        logger.error("bug %s", _short(request), exc_info=failure)
        return error_response(_internal(failure))

    async def _submit(self, request: requests.Request) -> views.View:
        changes = not isinstance(request, READING)
        started = time.monotonic()
        ended = "not done"
        if changes:
            logger.info("begin %s", _short(request))
        try:
            view: views.View = await self._service.submit(request)
            ended = "done"
        except errors.BlockferryError as error:
            ended = f"{error.outcome} code={error.code}"
            raise
        finally:
            if changes:
                logger.info(
                    "end request=%s %s ms=%d", request.__struct_config__.tag, ended, (time.monotonic() - started) * 1000
                )
        return view

    async def _events(self, http: HttpRequest) -> Response | EventStream:
        since = http.query_params.get("since")
        if since is not None and not since.isdecimal():
            return error_response(errors.BadRequest(reason=f"since={since!r} is not an event's number"))
        number = None if since is None else int(since)
        return EventStream(self._service.watch(http.query_params.get("domain"), number), self._closing)

    async def _health(self, _http: HttpRequest) -> Response:
        package = importlib.metadata.version("blockferry")
        return json_response({"version": views.VERSION, "kind": "health", "pid": os.getpid(), "blockferry": package})


def json_response(value: Any, status: int = 200) -> Response:
    """Answer with a view, or with plain values."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def error_body(error: errors.BlockferryError) -> dict[str, Any]:
    """The error's JSON form."""
    return {"version": views.VERSION, "kind": "error", "error": error.to_dict()}


def error_response(error: errors.BlockferryError) -> Response:
    """Answer with an error."""
    return json_response(error_body(error), http_status(error))


async def _body(http: HttpRequest) -> bytes:
    body, length = b"", 0
    async for chunk in http.stream():
        length += len(chunk)
        # Read to its end all the same: a client that is still sending would not see the answer.
        body = body + chunk if length <= BODY_MAX else b""
    if length > BODY_MAX:
        raise errors.BadRequest(reason=f"it is over {BODY_MAX} bytes")
    return body


def _short(request: requests.Request) -> str:
    """The request on one line of the log, XML by its length."""
    fields = msgspec.to_builtins(request)
    if isinstance(fields.get("xml"), str):
        fields["xml"] = f"({len(fields['xml'])} characters)"
    words = " ".join(
        f"{name}={msgspec.json.encode(value).decode()}" for name, value in fields.items() if value is not None
    )
    return _USER.sub("://***@", words)


def _internal(error: BaseException) -> errors.InternalError:
    return errors.InternalError(detail=f"{type(error).__name__}: {error}")


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    """A path or method that there isn't."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    refusal = errors.BadRequest(reason=f"there is no {http.method} {http.url.path}")
    return json_response(error_body(refusal), status)


async def _bug(_http: HttpRequest, error: Exception) -> Response:
    """Anything else that went wrong here: Starlette raises it again, and uvicorn logs it with its traceback."""
    return error_response(_internal(error))
