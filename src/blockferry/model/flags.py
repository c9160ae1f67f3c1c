"""Flags of the calls, with libvirt's values where libvirt has the flag, ours from bit 24 up.

Source of the values: libvirt's include/libvirt/libvirt-domain.h and libvirt-domain-snapshot.h.
"""

from __future__ import annotations

from enum import IntFlag

from blockferry import errors


class SnapshotCreate(IntFlag):
    """virDomainSnapshotCreateFlags."""

    REDEFINE = 1 << 0
    CURRENT = 1 << 1
    NO_METADATA = 1 << 2
    HALT = 1 << 3
    DISK_ONLY = 1 << 4
    REUSE_EXT = 1 << 5
    QUIESCE = 1 << 6
    ATOMIC = 1 << 7
    LIVE = 1 << 8
    VALIDATE = 1 << 9


class SnapshotDelete(IntFlag):
    """virDomainSnapshotDeleteFlags, and the two of the 2012 proposal."""

    CHILDREN = 1 << 0
    METADATA_ONLY = 1 << 1
    CHILDREN_ONLY = 1 << 2
    REOPEN_MIRROR = 1 << 24
    REMOVE_MIRROR = 1 << 25


class BlockCopy(IntFlag):
    """virDomainBlockCopyFlags, and the proposal's CREATE_RAW."""

    SHALLOW = 1 << 0
    REUSE_EXT = 1 << 1
    TRANSIENT_JOB = 1 << 2
    SYNCHRONOUS_WRITES = 1 << 3
    CREATE_RAW = 1 << 24


class BlockRebase(IntFlag):
    """virDomainBlockRebaseFlags."""

    SHALLOW = 1 << 0
    REUSE_EXT = 1 << 1
    COPY_RAW = 1 << 2
    COPY = 1 << 3
    RELATIVE = 1 << 4
    COPY_DEV = 1 << 5
    BANDWIDTH_BYTES = 1 << 6


class BlockCommit(IntFlag):
    """virDomainBlockCommitFlags."""

    SHALLOW = 1 << 0
    DELETE = 1 << 1
    ACTIVE = 1 << 2
    RELATIVE = 1 << 3
    BANDWIDTH_BYTES = 1 << 4


def require_flags(call: str, flags: IntFlag, carried_out: IntFlag) -> None:
    """Refuse every flag that the call does not carry out, those that nobody has named included.

    Raises:
        UnsupportedFlag: with the first of them.
    """
    rest = int(flags) & ~int(carried_out)
    if rest:
        lowest = rest & -rest
        raise errors.UnsupportedFlag(call=call, flag=type(flags)(lowest).name or hex(lowest))
