"""Reading a sector of a disk as its device would: whether what it stands on answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from blockferry.qemu.session import Session

# A destination that has not answered a read of one sector by then is not one to leave a guest on.
READ_BACK_SECONDS = 2.0


async def read_back(session: Session, disks: Mapping[str, str], seconds: float = READ_BACK_SECONDS) -> dict[str, str]:
    """Read a sector of each disk (target -> drive) as its device; those that do not answer, with the reason.

    QMP has no command that reads. HMP's `qemu-io -d` does, on the device's own backend, whose counters say how it
    went; never its `aio_flush`: that hangs QEMU 7.2 when the disk has an iothread. The guest stands still, so that
    nothing else moves the counters.

    Args:
        session: to its QEMU.
        disks: those to read.
        seconds: the bound of the wait.
    """
    if not disks:
        return {}
    before = await _reads(session)
    lines = [f'qemu-io -d {qdev} "aio_read -q 0 512"' for qdev in disks.values()]
    await session.execute_each("human-monitor-command", [{"command_line": line} for line in lines])
    waiting: dict[str, str] = dict(disks)
    dead: dict[str, str] = {}
    deadline = asyncio.get_running_loop().time() + seconds
    while waiting and asyncio.get_running_loop().time() < deadline:
        now = await _reads(session)
        for target, qdev in list(waiting.items()):
            if now.get(qdev) != before.get(qdev):
                failed = now[qdev][1] > before[qdev][1]
                dead |= {target: "a read fails"} if failed else {}
                del waiting[target]
    return dead | dict.fromkeys(waiting, f"a read is not answered within {seconds:.2g} s")


async def _reads(session: Session) -> dict[str, tuple[int, int]]:
    """Reads that were answered and reads that failed, by qdev."""
    answer = await session.execute("query-blockstats")
    return {
        each["qdev"]: (each["stats"]["rd_operations"], each["stats"]["failed_rd_operations"])
        for each in answer
        if "qdev" in each
    }
