"""`<domainsnapshot>` as a dump of a snapshot that was taken, ours or libvirt's, to the model."""

from __future__ import annotations

import re

import msgspec

from blockferry.formats import xmlio
from blockferry.formats.names import PATH_BYTES_MAX, path_flaw, valid_name
from blockferry.formats.snapshot import COOKIE, DISK_SNAPSHOT, parse_snapshot
from blockferry.formats.xmlio import Element
from blockferry.model.snapshot import DiskWish, RedefinedDisk, Redefinition

# libvirt's words for what the guest did (virDomainSnapshotState); without <memory snapshot='no'/> all but these two
# mean a snapshot of the memory as well.
_WITHOUT_MEMORY = frozenset({DISK_SNAPSHOT, "shutoff"})
_STATES = _WITHOUT_MEMORY | {"running", "blocked", "paused", "shutdown", "crashed", "pmsuspended"}

_SECONDS = re.compile(r"[0-9]{1,12}")
_EXACT = re.compile(r"[0-9]{1,12}\.[0-9]{1,9}")
_WORD = re.compile(r"[a-z][a-z0-9-]{0,39}")
# What an image is that is no file, such as nbd://host/export.
_URI = re.compile(r"[a-z][a-z0-9+.-]*:[^\x00-\x20\x7f]+")
_FORMAT = re.compile(r"[a-z0-9_-]{1,40}")

# How a <disk> of a <domain> names its image, by its type.
_SOURCES = {"file": "file", "block": "dev"}


class _Backing(msgspec.Struct, frozen=True):
    """The image as of the snapshot, and its format."""

    file: str
    format: str


class _Cookie(msgspec.Struct, frozen=True, kw_only=True):
    """What our own dumps say beside libvirt's."""

    created: float | None = None
    state: str | None = None
    backings: dict[str, _Backing] = {}
    reverted: dict[str, tuple[str, ...]] = {}


def parse_redefinition(xml: str) -> Redefinition:
    """A snapshot as `snapshot show --xml` or `virsh snapshot-dumpxml` wrote it.

    Args:
        xml: the document, from anybody.

    Raises:
        InvalidXml: it is malformed or hostile, is no dump of a snapshot, or of one that this version can't have.
        InvalidName: its name can't be a snapshot's.
    """
    wish = parse_snapshot(xml)
    root = xmlio.parse(xml, "domainsnapshot")
    cookie = _cookie(root)
    seconds = _seconds(root)
    exact = cookie.created is not None and int(cookie.created) == int(seconds)
    domain = root.find("domain")
    return Redefinition(
        name=wish.name,
        description=wish.description,
        created=cookie.created if exact and cookie.created is not None else seconds,
        exact=exact,
        state=cookie.state or _state(root),
        parent=_parent(root),
        reverted=cookie.reverted,
        disks=_disks(root, wish.disks, cookie),
        left_out=tuple(disk.name for disk in wish.disks if disk.snapshot == "no"),
        domain=None if domain is None else xmlio.text(domain, "name"),
        uuid=None if domain is None else xmlio.text(domain, "uuid"),
    )


def _seconds(root: Element) -> float:
    text = xmlio.text(root, "creationTime")
    if text is None:
        raise xmlio.invalid(root, "a redefinition says when the snapshot was taken: it has no <creationTime>")
    if not _SECONDS.fullmatch(text):
        raise xmlio.invalid(root, f"<creationTime> {xmlio.shorten(text)!r} is no number of seconds since 1970")
    return float(text)


def _state(root: Element) -> str | None:
    """The run state that libvirt's <state> says; None where it only says that there is none."""
    state = xmlio.text(root, "state")
    if state is None:
        raise xmlio.invalid(root, "a redefinition says what the guest did: it has no <state>")
    if state not in _STATES:
        raise xmlio.invalid(root, f"<state> {xmlio.shorten(state)!r} is none of {', '.join(sorted(_STATES))}")
    if state not in _WITHOUT_MEMORY and root.find("memory") is None:
        words = f"<state> {state} without <memory snapshot='no'/> is a snapshot of the memory as well"
        raise xmlio.invalid(root, f"{words}, which is not carried out in this version")
    return None if state == DISK_SNAPSHOT else state


def _parent(root: Element) -> str | None:
    parent = root.find("parent")
    if parent is None:
        return None
    xmlio.expect(parent, once={"name"})
    name = xmlio.text(parent, "name")
    if name is None or not valid_name(name):
        raise xmlio.invalid(parent, f"{xmlio.shorten(name or '')!r} can't be the name of a snapshot")
    return name


def _disks(root: Element, wishes: tuple[DiskWish, ...], cookie: _Cookie) -> tuple[RedefinedDisk, ...]:
    domain = root.find("domain")
    backings = ({} if domain is None else _backings(domain)) | cookie.backings
    found = []
    for element, wish in zip(root.findall("disks/disk"), wishes, strict=True):
        if wish.snapshot == "no":
            continue
        if wish.file is None:
            raise xmlio.invalid(element, "a redefinition names every overlay: it has no <source>")
        backing = backings.get(wish.name)
        found.append(
            RedefinedDisk(
                target=wish.name,
                file=wish.file,
                block=element.get("type") == "block",
                backing=None if backing is None else backing.file,
                backing_format=None if backing is None else backing.format,
                mode=None if wish.mode == "absolute" else wish.mode,
                mirror=wish.mirror,
            )
        )
    if not found:
        raise xmlio.invalid(root, "it has no external disk: of what it is a snapshot, it does not say")
    return tuple(found)


def _cookie(root: Element) -> _Cookie:
    element = root.find(f"cookie/{COOKIE}")
    if element is None:
        return _Cookie()
    xmlio.expect(element, attributes={"created", "state"}, many={"backing", "reverted"})
    created, state = element.get("created"), element.get("state")
    if created is not None and not _EXACT.fullmatch(created):
        raise xmlio.invalid(element, f"created {xmlio.shorten(created)!r} is no number of seconds since 1970")
    if state is not None and not _WORD.fullmatch(state):
        raise xmlio.invalid(element, f"state {xmlio.shorten(state)!r} is no run state")
    return _Cookie(
        created=None if created is None else float(created),
        state=state,
        backings=dict(map(_backing, element.findall("backing"))),
        reverted=_reverted(element),
    )


def _reverted(cookie: Element) -> dict[str, tuple[str, ...]]:
    """The overlays that the guest has gone on on when it was brought back, by the disk's target."""
    found: dict[str, tuple[str, ...]] = {}
    for element in cookie.findall("reverted"):
        xmlio.expect(element, attributes={"disk", "file"})
        target, file = element.get("disk", ""), element.get("file", "")
        flaw = path_flaw(file)
        if flaw or not target:
            raise xmlio.invalid(element, f"{xmlio.shorten(file)!r} {flaw}" if flaw else "it has no disk")
        found[target] = (*found.get(target, ()), file)
    return found


def _backing(element: Element) -> tuple[str, _Backing]:
    """The image as of the snapshot that a dump of ours names, by the disk's target."""
    xmlio.expect(element, attributes={"disk", "file", "format"})
    target, file, image_format = (element.get(name, "") for name in ("disk", "file", "format"))
    flaw = path_flaw(file)
    if flaw and (not _URI.fullmatch(file) or len(file) > PATH_BYTES_MAX):
        raise xmlio.invalid(element, f"{xmlio.shorten(file)!r} {flaw}")
    if not target or not _FORMAT.fullmatch(image_format):
        raise xmlio.invalid(element, "it has no disk, or no format")
    return target, _Backing(file, image_format)


def _backings(domain: Element) -> dict[str, _Backing]:
    """The images as of the snapshot in libvirt's dump: its <domain> is how the guest was just before."""
    found = {}
    for disk in domain.findall("devices/disk"):
        target, driver, source = (disk.find(tag) for tag in ("target", "driver", "source"))
        if target is None or driver is None or source is None:
            continue
        file = source.get(_SOURCES.get(disk.get("type", ""), ""), "")
        image_format = driver.get("type", "")
        if not path_flaw(file) and _FORMAT.fullmatch(image_format):
            found[target.get("dev", "")] = _Backing(file, image_format)
    return found
