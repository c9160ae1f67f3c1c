"""Blockferry manages the disks of running QEMU guests: atomic snapshots, mirrors and block copy, with nothing lost.

async with blockferry.open("/var/lib/blockferry") as ferry:
    vm = await ferry.attach("vm1", qmp="/run/vm1.qmp")
    job = await vm.block_copy("vda", "/dst/disk.img", flags=blockferry.BlockCopy.CREATE_RAW)
    async for progress in job:
        print(progress.current, progress.total)
    await job.pivot()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockferry.client import BlockJob, Domain, DomainSnapshot, Ferry, StorageMove, connect
    from blockferry.errors import BlockferryError, Failed, Refused, Unknown
    from blockferry.interfaces.daemon import open_ferry as open  # noqa: A004 (as in the issue: blockferry.open)
    from blockferry.model.flags import BlockCopy, SnapshotCreate, SnapshotDelete
    from blockferry.model.snapshot import SnapshotWish

    __version__: str

__all__ = [  # noqa: RUF022 (the most important first)
    "open",
    "connect",
    "Ferry",
    "Domain",
    "DomainSnapshot",
    "BlockJob",
    "StorageMove",
    "SnapshotCreate",
    "SnapshotDelete",
    "BlockCopy",
    "SnapshotWish",
    "BlockferryError",
    "Refused",
    "Failed",
    "Unknown",
]

# Loaded when they are first asked for: the command imports this package and needs none of them.
_WHERE = {
    "open": ("blockferry.interfaces.daemon", "open_ferry"),
    "connect": ("blockferry.client", "connect"),
    "Ferry": ("blockferry.client", "Ferry"),
    "Domain": ("blockferry.client", "Domain"),
    "DomainSnapshot": ("blockferry.client", "DomainSnapshot"),
    "BlockJob": ("blockferry.client", "BlockJob"),
    "StorageMove": ("blockferry.client", "StorageMove"),
    "SnapshotCreate": ("blockferry.model.flags", "SnapshotCreate"),
    "SnapshotDelete": ("blockferry.model.flags", "SnapshotDelete"),
    "BlockCopy": ("blockferry.model.flags", "BlockCopy"),
    "SnapshotWish": ("blockferry.model.snapshot", "SnapshotWish"),
    "BlockferryError": ("blockferry.errors", "BlockferryError"),
    "Refused": ("blockferry.errors", "Refused"),
    "Failed": ("blockferry.errors", "Failed"),
    "Unknown": ("blockferry.errors", "Unknown"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("blockferry")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
