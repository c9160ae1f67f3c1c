"""Disks, destinations and image files."""

from __future__ import annotations

from dataclasses import dataclass

from blockferry.errors.tree import Refused


@dataclass(eq=False)
class NoSuchDisk(Refused):
    """The name is no target, qdev id or image of the domain."""

    domain: str
    disk: str
    known: str
    code = "no-such-disk"
    exit_status = 30
    template = "{domain} has no disk {disk!r}, by target, qdev id or image path. It has: {known}."


@dataclass(eq=False)
class AmbiguousDisk(Refused):
    """The image is in the chains of several disks."""

    domain: str
    disk: str
    targets: str
    code = "ambiguous-disk"
    exit_status = 31
    template = "{disk} is in the chains of several disks of {domain}: {targets}. Name one of these."


@dataclass(eq=False)
class DiskUnsuitable(Refused):
    """The disk can't take part: empty, read-only, a filter, a node that can't be followed."""

    domain: str
    disk: str
    reason: str
    code = "disk-unsuitable"
    exit_status = 32
    template = "{domain}: disk {disk} can't take part: {reason}. Nothing was done."


@dataclass(eq=False)
class DiskBusy(Refused):
    """The disk has a job on it."""

    domain: str
    disk: str
    job: str
    code = "disk-busy"
    exit_status = 33
    template = (
        "{domain}: disk {disk} has a job on it already: {job}. `blockferry job list {domain}` shows it; pivot, finish "
        "or cancel it first."
    )


@dataclass(eq=False)
class DestinationExists(Refused):
    """A destination that must not exist does."""

    path: str
    code = "destination-exists"
    exit_status = 34
    template = "{path} exists already, and nothing is ever overwritten unasked. Name another file, or remove it first."


@dataclass(eq=False)
class DestinationUnusable(Refused):
    """A destination can't be created or opened."""

    path: str
    reason: str
    code = "destination-unusable"
    exit_status = 35
    template = "{path} can't be a destination: {reason}. Nothing was done."


@dataclass(eq=False)
class ImageUnsuitable(Refused):
    """An existing image is not what was said of it."""

    path: str
    reason: str
    code = "image-unsuitable"
    exit_status = 36
    template = "{path} can't be used: {reason}. Nothing was done."


@dataclass(eq=False)
class NoRoom(Refused):
    """The destination's file system is too full."""

    path: str
    needed: int
    available: int
    code = "no-room"
    exit_status = 37
    template = "{path} needs {needed} bytes and its file system has {available}. Nothing was done."


@dataclass(eq=False)
class DuplicateFile(Refused):
    """Two images of one request are the same file: as named, or by the names that they get unless told."""

    path: str
    code = "duplicate-file"
    exit_status = 38
    template = (
        "{path} is named twice in this request, or is what two of its images would be called. Nothing was done. Name another "
        "file for one of them (TARGET=FILE)."
    )
