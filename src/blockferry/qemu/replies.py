"""What QEMU may say: its messages are checked where they come in, so that nobody else has to.

A QEMU that its guest has taken over says anything. What is used of a reply has its type here, and one that is otherwise
ends the connection; what nobody uses is passed over.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec

# Numbers are kept in SQLite and sent as JSON.
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_WORDS = 200


class NotUnderstood(Exception):
    """A message that QEMU does not send, with what is wrong with it."""


class _Said(msgspec.Struct, frozen=True, rename="kebab"):
    """A part of a reply."""


class _Named(_Said, frozen=True):
    name: str


class _Status(_Said, frozen=True):
    status: str
    running: bool


class _Inserted(_Said, frozen=True):
    node_name: str | None = None
    ro: bool = False


class _Drive(_Said, frozen=True):
    device: str
    qdev: str | None = None
    inserted: _Inserted | None = None


class _Job(_Said, frozen=True):
    id: str
    type: str
    status: str
    current_progress: Whole
    total_progress: Whole
    error: str | None = None


class _BlockJob(_Said, frozen=True):
    device: str
    offset: Whole
    len: Whole
    speed: Whole
    ready: bool
    io_status: str


class _Snapshot(_Said, frozen=True):
    id: str
    name: str
    date_sec: Whole
    date_nsec: Whole
    vm_state_size: Whole


class _Image(_Said, frozen=True):
    virtual_size: Whole
    snapshots: list[_Snapshot] = []


class _Bitmap(_Said, frozen=True):
    count: Whole
    recording: bool
    busy: bool
    name: str | None = None


class _Cache(_Said, frozen=True):
    direct: bool
    no_flush: bool


class _Node(msgspec.Struct, frozen=True):
    drv: str
    ro: bool
    node_name: str = msgspec.field(name="node-name")
    file: str = ""
    image: _Image | None = None
    dirty_bitmaps: list[_Bitmap] = msgspec.field(name="dirty-bitmaps", default_factory=list)
    cache: _Cache | None = None
    detect_zeroes: str = "off"
    encrypted: bool = False


class _Vertex(_Said, frozen=True):
    id: Whole
    name: str
    type: str


class _Edge(_Said, frozen=True):
    parent: Whole
    child: Whole
    name: str


class _Shape(_Said, frozen=True):
    nodes: list[_Vertex]
    edges: list[_Edge]


class _Uuid(msgspec.Struct, frozen=True):
    uuid: str = msgspec.field(name="UUID")


class _Memory(_Said, frozen=True):
    base_memory: Whole
    plugged_memory: Whole = 0


class _Counts(msgspec.Struct, frozen=True):
    rd_operations: Whole
    failed_rd_operations: Whole
    idle_time_ns: Whole | None = None


class _Counted(_Said, frozen=True):
    stats: _Counts
    qdev: str | None = None


_REPLIES: dict[str, Any] = {
    "query-commands": list[_Named],
    "query-status": _Status,
    "query-block": list[_Drive],
    "query-jobs": list[_Job],
    "query-block-jobs": list[_BlockJob],
    "query-named-block-nodes": list[_Node],
    "x-debug-query-block-graph": _Shape,
    "query-uuid": _Uuid,
    "query-memory-size-summary": _Memory,
    "query-cpus-fast": list[dict[str, Any]],
    "query-blockstats": list[_Counted],
}


class _Clock(_Said, frozen=True):
    seconds: Whole
    microseconds: Whole


class _JobEnd(_Said, frozen=True):
    device: str
    error: str | None = None


class _JobStatus(_Said, frozen=True):
    id: str
    status: str


class _Shutdown(_Said, frozen=True):
    reason: str = ""


_EVENTS: dict[str, Any] = {
    "BLOCK_JOB_COMPLETED": _JobEnd,
    "BLOCK_JOB_CANCELLED": _JobEnd,
    "JOB_STATUS_CHANGE": _JobStatus,
    "SHUTDOWN": _Shutdown,
}


def check_message(raw: bytes, message: dict[str, Any]) -> None:
    """See that a message can be handed on.

    Args:
        raw: as it came.
        message: what it says.

    Raises:
        NotUnderstood: it is of another form, or what nobody could print.
    """
    # JSON can write halves of characters, which can be neither printed nor kept.
    if b"\\u" in raw and not _is_text(message):
        raise NotUnderstood("it has text in it that is none")
    if "event" not in message:
        if not isinstance(message.get("id"), str | None):
            raise NotUnderstood("its id is none of ours")
        return
    event = message["event"]
    if not isinstance(event, str) or not isinstance(message.get("data", {}), dict):
        raise NotUnderstood("it is no event")
    _convert(message.get("timestamp"), _Clock, "an event's timestamp")
    if event in _EVENTS:
        _convert(message.get("data", {}), _EVENTS[event], event)


def check_reply(command: str, reply: Any) -> None:
    """See that a reply has what is used of it.

    Raises:
        NotUnderstood: it has not.
    """
    if command in _REPLIES:
        _convert(reply, _REPLIES[command], command)


def _convert(value: Any, wanted: Any, what: str) -> None:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise NotUnderstood(f"{what}: {shorten(str(error))}") from error


def _is_text(message: dict[str, Any]) -> bool:
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(words: str) -> str:
    """Words of QEMU's, short and fit for a terminal."""
    shown = "".join(each if each.isprintable() else "?" for each in words[:_WORDS])
    return shown if len(words) <= _WORDS else f"{shown}..."
