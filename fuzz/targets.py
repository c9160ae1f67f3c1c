"""What is fuzzed: everything that reads what somebody else has written. Each target takes bytes and lets only refusals pass.

Shared by fuzz/run.py, and by tests/unit/test_fuzz_corpus.py that gives each its seeds once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Callable

import msgspec

from blockferry.errors import BlockferryError
from blockferry.formats import definition as domain_xml
from blockferry.formats.defined import inactive_xml, with_uuid
from blockferry.formats.names import path_flaw, valid_name
from blockferry.formats.redefinition import parse_redefinition
from blockferry.formats.snapshot import parse_snapshot
from blockferry.interfaces.cli.session import read_bytes
from blockferry.model.request import Request
from blockferry.plan.copy import nbd_options
from blockferry.plan.machine import arguments, option
from blockferry.qemu.header import BadHeader, parse_header, parse_snapshots
from blockferry.qemu.observe import read_graph, read_jobs, require_sound
from blockferry.qemu.qcow2 import empty_image
from blockferry.qemu.replies import NotUnderstood, check_reply
from blockferry.qemu.session import BadReply, LostReply, parse_message

UUID = "1b4f2a53-6f0e-4d4e-9e7b-1c7a3f8f0a11"
# QEMU's options that are put before a value of ours; what follows one of these is never taken for an option.
_JSON_OPTIONS = ("-blockdev", "-netdev", "-object")


def domain(data: bytes) -> None:
    """A `<domain>`: parsed, made into a command line, written again and parsed again."""
    _domain(data.decode(errors="replace"))


def disk(data: bytes) -> None:
    """The devices of a `<domain>` that is in order but for them."""
    devices = data.decode(errors="replace")
    _domain(
        "<domain type='qemu'><name>a</name><memory>65536</memory><os><type arch='x86_64' machine='pc'>hvm</type></os>"
        f"<devices>{devices}</devices></domain>"
    )


def _domain(xml: str) -> None:
    with contextlib.suppress(BlockferryError):
        found = domain_xml.parse_definition(xml)
        words = arguments(found, {})
        for flag, value in itertools.pairwise(words):
            if flag in _JSON_OPTIONS and value.startswith("{"):
                json.loads(value)
        assert not any("\0" in word for word in words)
        again = domain_xml.parse_definition(inactive_xml(with_uuid(xml, UUID), {}, frozenset()))
        assert again == msgspec.structs.replace(found, uuid=again.uuid)


def snapshot(data: bytes) -> None:
    """A `<domainsnapshot>` that is asked for, and one that is redefined."""
    xml = data.decode(errors="replace")
    for parse in (parse_snapshot, parse_redefinition):
        with contextlib.suppress(BlockferryError):
            parse(xml)


def qcow2(data: bytes) -> None:
    """A qcow2 header, and a table of snapshots behind it."""
    with contextlib.suppress(BadHeader):
        header = parse_header(data)
        assert 0 <= header.virtual_size < 1 << 63
        parse_snapshots(data[header.snapshots_offset :], header.snapshots)


def qmp(data: bytes) -> None:
    """Lines from QEMU: a greeting, events, and replies to all that is asked to see a domain."""
    replies = []
    for line in data.split(b"\n"):
        with contextlib.suppress(NotUnderstood):
            replies.append(parse_message(line).get("return"))
    names = ("query-named-block-nodes", "x-debug-query-block-graph", "query-jobs", "query-block-jobs")
    with contextlib.suppress(NotUnderstood, LostReply, BadReply):
        for name, reply in zip(names, replies, strict=False):
            check_reply(name, reply)
        if len(replies) >= len(names):
            nodes, shape, jobs, block_jobs = replies[:4]
            graph = read_graph(nodes, shape, None)
            require_sound(graph)
            for node in graph.nodes:
                graph.chain(node)
            msgspec.json.encode((graph, read_jobs(jobs, block_jobs)))


def api(data: bytes) -> None:
    """The body of a request, read and written again."""
    with contextlib.suppress(msgspec.MsgspecError):
        request = msgspec.json.decode(data, type=Request)
        assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request


def words(data: bytes) -> None:
    """What is one word to the command: names, paths, sizes, rates, URIs."""
    text = data.decode(errors="surrogateescape")
    valid_name(text)
    count = read_bytes(text)
    assert count is None or count >= 0
    assert option(text).replace(",,", "") == text.replace(",", "")
    if path_flaw(text) is None:
        text.encode()
        assert text.startswith("/")
    with contextlib.suppress(BlockferryError):
        json.dumps(nbd_options(text))


_HEAD = "<domain type='qemu'><name>a</name><memory unit='MiB'>64</memory>"
_DISK = "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/a'/><target dev='vda' bus='virtio'/></disk>"
_NODE = {"node-name": "d0", "drv": "qcow2", "ro": False, "file": "/a", "image": {"virtual-size": 512}}
_SHAPE = {
    "nodes": [{"id": 1, "name": "d0", "type": "block-driver"}, {"id": 2, "name": "d1", "type": "block-driver"}],
    "edges": [{"parent": 1, "child": 2, "name": "backing"}],
}
_JOB = {"id": "j", "type": "mirror", "status": "ready", "current-progress": 1, "total-progress": 2}
_BLOCK_JOB = {"device": "j", "offset": 0, "len": 1, "speed": 0, "ready": True, "io-status": "ok"}
_REPLIES = ([_NODE, {**_NODE, "node-name": "d1"}], _SHAPE, [_JOB], [_BLOCK_JOB])


def _reply(value: object) -> bytes:
    return json.dumps({"return": value, "id": "__qmp#00001"}).encode()


# Each target with what mutation begins with, and the words that it puts in.
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes], str]] = {
    "domain": (
        domain,
        [
            f"{_HEAD}<devices>{_DISK}</devices></domain>".encode(),
            f"{_HEAD}<os><type arch='x86_64' machine='q35'>hvm</type></os><cpu mode='host-passthrough'/></domain>".encode(),
            f"{_HEAD}<seclabel type='static' model='dac'><label>a:b</label></seclabel></domain>".encode(),
            b'<!DOCTYPE a [<!ENTITY b "c">]><domain>&b;</domain>',
            b"<domain type='qemu'>" + b"<a>" * 300,
        ],
        "domain name memory vcpu os type loader nvram kernel cmdline cpu clock iothreads seclabel label devices qemu:arg",
    ),
    "disk": (
        disk,
        [
            _DISK.encode(),
            (
                b"<disk type='network'><driver type='raw'/><source protocol='nbd' name='x'><host name='h' port='1'/></source>"
                b"<target dev='sda' bus='scsi'/><address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>"
            ),
            b"<interface type='user'><model type='virtio'/></interface><graphics type='vnc' port='-1' listen='::1'/>",
            b"<channel type='unix'><source mode='bind' path='/a,b=c'/><target type='virtio' name='x'/></channel>",
            b"<controller type='pci' index='1' model='pcie-root-port'/><serial type='file'><source path='/-a'/></serial>",
        ],
        "disk driver source target address serial iotune backingStore controller interface channel graphics video rng boot",
    ),
    "snapshot": (
        snapshot,
        [
            (
                b"<domainsnapshot><name>a</name><disks><disk name='vda' snapshot='external'><driver type='qcow2'/>"
                b"<source file='/a'/><mirror file='/b'/></disk></disks></domainsnapshot>"
            ),
            (
                b"<domainsnapshot><name>a</name><state>running</state><creationTime>1</creationTime><parent><name>b</name>"
                b"</parent><disks><disk name='vda'><source file='/a'/></disk></disks></domainsnapshot>"
            ),
        ],
        "domainsnapshot name description disks disk source mirror driver memory state creationTime parent cookie",
    ),
    "qcow2": (
        qcow2,
        [
            empty_image(1 << 20, "/base", "raw")[:1024],
            empty_image(1 << 20, None, None)[:1024],
            struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 9, 512, 0, 1, 0, 0, 1, 1, 128, 4, 0, 0, 4, 104)
            + bytes(24)
            + struct.pack(">QIHHIIQII", 0, 0, 1, 1, 1, 1, 0, 0, 8),
        ],
        "QFI raw qcow2 json:",
    ),
    "qmp": (
        qmp,
        [
            b"\n".join(_reply(value) for value in _REPLIES),
            b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 1}}\n{"error": {"class": "a", "desc": "b"}}',
            b'{"return": {"a": "\\ud800"}, "id": "x"}\n{"return": {}, "id": []}\n' + b"[" * 2000,
        ],
        "return id event data timestamp seconds node-name drv ro image backing file nodes edges parent child",
    ),
    "api": (
        api,
        [
            b'{"request": "start", "domain": "a"}',
            b'{"request": "copy", "domain": "a", "disk": "vda", "dest": "/a", "flags": 1}',
            b'{"request": "snapshot-create", "domain": "a", "wish": {"disks": [{"name": "vda", "file": "/a"}]}}',
        ],
        "request domain disk disks wish mirror dest flags xml name file timeout bandwidth",
    ),
    "words": (
        words,
        [b"50M", b"1.5GiB", b"/a,b=c", b"nbd://[::1]:10809/x?y", b"nbd+unix:///x?socket=/a", b"-vm", b"9" * 400],
        "nbd:// nbd+unix:/// ?socket=/ %00 .. KiB /s",
    ),
}
