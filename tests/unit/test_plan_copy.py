"""Destinations of copies: formats, NBD URIs, room."""

from typing import Any

import pytest
from test_plan_snapshot import GIB, SIZE, Plug, fact, observed

from blockferry import errors
from blockferry.model.files import FileFact
from blockferry.model.flags import BlockCopy
from blockferry.model.request import StartCopy
from blockferry.plan.copy import nbd_options, plan_cancel, plan_copy
from blockferry.plan.destinations import Files, buffer_of, is_uri
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.plan import Names, Plan
from blockferry.plan.steps import AddNode, CancelJob, RemoveNode, RequireSize, StartMirror

SEEN = observed(Plug("vda"), Plug("vdb", fmt="raw", direct=True), Plug("vdc", filter="mirror_top"))


def plan(disk: str = "vda", dest: str = "/d", *, facts: dict[str, FileFact] | None = None, **more: Any) -> Plan:
    known = {path: fact(path, kind="file", allocated=SIZE) for path in ("/img/vda.img", "/img/vdb.img", "/img/vdc.img")}
    known |= {dest: fact(dest)} | (facts or {})
    request = StartCopy(domain="vm1", disk=disk, dest=dest, **more)
    return plan_copy("vm1", SEEN, request, names=Names("abcd", 3), operation=3, files=Files(facts=known))


@pytest.mark.parametrize(
    ("uri", "server", "export"),
    [
        ("nbd://host/x", {"type": "inet", "host": "host", "port": "10809"}, "x"),
        ("nbd://host:1234/", {"type": "inet", "host": "host", "port": "1234"}, ""),
        ("nbd://[::1]:9/a/b", {"type": "inet", "host": "::1", "port": "9"}, "a/b"),
        ("nbd://host/a%20b", {"type": "inet", "host": "host", "port": "10809"}, "a b"),
        ("nbd+unix:///x?socket=/s", {"type": "unix", "path": "/s"}, "x"),
        ("nbd+unix:///?socket=/s%2Ct", {"type": "unix", "path": "/s,t"}, ""),
    ],
)
def test_nbd_options(uri: str, server: dict[str, str], export: str) -> None:
    assert is_uri(uri)
    assert nbd_options(uri) == {"driver": "nbd", "server": server, "export": export}


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://",
        "nbd:///x",
        "nbd://host:port/x",
        "nbd://host:99999/x",
        "nbd://host/x?socket=/s",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=relative",
        "nbd+unix://host/x?socket=/s",
        "nbd+unix:///x?socket=/a&socket=/b",
        "nbd://host/" + "x" * 4097,
    ],
)
def test_nbd_that_is_none(uri: str) -> None:
    with pytest.raises(errors.DestinationUnusable):
        nbd_options(uri)


def test_path_is_no_uri() -> None:
    assert not is_uri("/nbd://x")
    assert not is_uri("http://x")


@pytest.mark.parametrize(
    ("disk", "wanted", "flags", "made"),
    [
        ("vda", None, 0, "qcow2"),
        ("vdb", None, 0, "raw"),
        ("vda", "raw", 0, "raw"),
        ("vdb", "qcow2", 0, "qcow2"),
        ("vda", None, BlockCopy.CREATE_RAW, "raw"),
        ("vda", "raw", BlockCopy.CREATE_RAW, "raw"),
    ],
)
def test_format(disk: str, wanted: str | None, flags: int, made: str) -> None:
    found = plan(disk, format=wanted, flags=int(flags))
    (created,) = [step for step in found.prepare if isinstance(step, CreateImage)]
    assert (created.format, created.size, created.backing) == (made, SIZE, None)
    (mirror,) = found.record.jobs
    assert (mirror.format, mirror.backing, mirror.source) == (made, None, f"/img/{disk}.img")


@pytest.mark.parametrize(
    ("dest", "size", "together", "mebibytes"),
    [
        ("/d", GIB, GIB, 4),
        ("/d", GIB, 2 * GIB, 4),
        ("/d", GIB, 3 * GIB, 2),
        ("/d", GIB, 8 * GIB, 1),
        ("/d", GIB, 26 * GIB, 1),  # less would be smaller pieces
        ("/d", 100 * GIB, 107 * GIB, 4),  # a large one beside seven small ones is not held up by their number
        ("/d", 0, 0, 1),
        ("nbd://far/away", GIB, 8 * GIB, None),
    ],
)
def test_what_is_in_flight(dest: str, size: int, together: int, mebibytes: int | None) -> None:
    """By the disk's part of what is mirrored; QEMU's own to an export."""
    wanted = {} if mebibytes is None else {"buf-size": mebibytes << 20}
    working = {} if mebibytes is None else {"buf-size": 512 << 10}
    assert buffer_of(dest, size, together, at_work=True) == working
    assert buffer_of(dest, size, together, at_work=False) == wanted


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"format": "qcow2", "flags": BlockCopy.CREATE_RAW}, errors.BadRequest),
        ({"format": "vmdk"}, errors.BadRequest),
        ({"flags": BlockCopy.REUSE_EXT | BlockCopy.CREATE_RAW}, errors.BadRequest),
        ({"granularity": 3000}, errors.BadRequest),
        ({"buf_size": 0}, errors.BadRequest),
        ({"base": "/img/vda.img"}, errors.ImageUnsuitable),
        ({"base": "/elsewhere"}, errors.ImageUnsuitable),
        ({"flags": 1 << 10}, errors.UnsupportedFlag),
        ({"flags": BlockCopy.REUSE_EXT}, errors.ImageUnsuitable),
        ({"dest": "nbd://h/x", "format": "qcow2"}, errors.DestinationUnusable),
        ({"disk": "vdc"}, errors.DiskBusy),
        ({"disk": "vdd"}, errors.NoSuchDisk),
        ({"facts": {"/d": fact("/d", kind="file")}}, errors.DestinationExists),
        ({"facts": {"/d": fact("/d", problem="no")}}, errors.DestinationUnusable),
        ({"facts": {"/d": fact("/d", real="/img/vda.img")}}, errors.DestinationUnusable),
        ({"facts": {"/d": fact("/d", free=SIZE - 1)}}, errors.NoRoom),
    ],
)
def test_refused(more: dict[str, Any], kind: type[errors.Refused]) -> None:
    with pytest.raises(kind):
        plan(**more)


def test_room_is_what_is_allocated_but_not_more_than_the_disk() -> None:
    for allocated, free in ((4096, 4096), (GIB, SIZE)):
        source = fact("/img/vda.img", kind="file", allocated=allocated)
        plan(format="raw", facts={"/d": fact("/d", free=free), "/img/vda.img": source})
        with pytest.raises(errors.NoRoom):
            plan(format="raw", facts={"/d": fact("/d", free=free - 1), "/img/vda.img": source})


def test_steps_of_a_file() -> None:
    made = plan("vdb", bandwidth=5)
    assert [type(step) for step in made.prepare] == [ClaimFile, CreateImage, AddNode, StartMirror]
    (node,) = [step.options for step in made.prepare if isinstance(step, AddNode)]
    for options in (node, node["file"]):  # holes are kept, the source's cache mode too
        assert (options["discard"], options["cache"]["direct"]) == ("unmap", True)
    start = made.prepare[-1]
    assert isinstance(start, StartMirror)
    assert (start.device, start.sync, start.speed) == ("vdb-n", "full", 5)
    assert made.record.authoritative == {"vdb": "/img/vdb.img"}


def test_steps_of_an_export() -> None:
    made = plan(dest="nbd://h/x")
    assert [type(step) for step in made.prepare] == [AddNode, RequireSize, StartMirror]
    (check,) = [step for step in made.prepare if isinstance(step, RequireSize)]
    assert check.size == SIZE
    assert made.record.jobs[0].format == "raw"


def test_cancel_records_before_it_closes() -> None:
    """Once it is recorded that nobody wants it, it is taken away, in that order and as often as need be."""
    (mirror,) = plan().record.jobs
    made = plan_cancel((mirror,), "cancel", "cancelled")
    assert (made.prepare, made.window) == ((), None)
    assert (made.record.ended, made.record.authoritative) == ({"vda": "cancelled"}, {"vda": "/img/vda.img"})
    assert made.settle == (CancelJob(job=mirror.job), RemoveNode(node=mirror.node))
