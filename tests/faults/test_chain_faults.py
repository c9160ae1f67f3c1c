"""Every QMP command that changes something, of every operation on chains and files: it answers an error, its reply is lost, the connection breaks.

Each operation is carried out once to the end, which tells what it sends; then once for every command and kind of fault, on one
guest that is brought back to where it was in between. After each: done or undone, as it says; the guest runs, every disk
holds what was written, and nothing of ours is left.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import ALL, KIB, MIB, Rig, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.qemu.session import Session
from blockferry.testing import Fault, FaultKind, QemuBinaries

# Those that change something. Their reply can be lost while the connection stands; to the others a cut is the same.
CHANGING = frozenset(
    [
        "blockdev-add",
        "blockdev-del",
        "blockdev-reopen",
        "blockdev-snapshot",
        "transaction",
        "blockdev-mirror",
        "block-commit",
        "block-stream",
        "job-complete",
        "job-finalize",
        "job-dismiss",
        "job-cancel",
        "stop",
        "cont",
    ]
)
REPLY_SECONDS = 0.5  # for a reply that never comes; QEMU's are here within milliseconds
Request = Callable[[Rig], ask.Request]


@dataclass(frozen=True)
class Operation:
    """How many layers it finds, and itself."""

    layers: int
    itself: Request


OPERATIONS = {
    "rebase": Operation(2, lambda rig: ask.Rebase(domain="vm1", disk="vda", base=rig.layer("vda", 0))),
    "commit-middle": Operation(2, lambda rig: ask.Commit(domain="vm1", disk="vda", top=rig.layer("vda", 1))),
}


async def over(rig: Rig) -> None:
    """Wait until no commit and no rebase works any more."""
    async with asyncio.timeout(20):
        last = (await rig.ask(ask.ListEvents(domain="vm1", since=2**62))).last
        async for _event in rig.service.watch("vm1", last - 1):
            await rig.settled()
            jobs = await rig.jobs()
            if all(job.state in ("done", "lost", "cancelled") for job in jobs.values()):
                return


async def reset(rig: Rig) -> None:
    """Without faults: no snapshot, every disk on its first image again."""
    for name in await rig.snapshots():
        await rig.delete(name, SnapshotDelete.METADATA_ONLY)
    for target in ALL:
        if (await rig.chain(target))[0] != str(rig.source(target)):
            await rig.commit(target)
            await over(rig)
        assert await rig.chain(target) == [str(rig.source(target))]
    for left in rig.path.glob("*.s?"):
        left.unlink()


async def attempt(rig: Rig, operation: Operation) -> errors.BlockferryError | None:
    """Carry it out with whatever faults are set; what was answered."""
    try:
        await rig.ask(operation.itself(rig))
    except errors.BlockferryError as error:
        return error
    return None


async def consistent(rig: Rig, number: int) -> None:
    """Done or undone, as it says; and nothing of ours that nobody uses."""
    assert await rig.status() == "running"
    assert (await rig.ask(ask.Recover())).unreachable == {}
    settled = (await rig.ask(ask.Recover())).operations
    assert {row.state for row in settled} <= {"in-progress"}, "nothing is left to settle"
    jobs = await rig.jobs()
    assert not [job for job in jobs.values() if job.state == "running"]
    chains = {target: await rig.chain(target) for target in ALL}
    in_chain = {name for name, node in (await rig.nodes()).items() if _in(node, chains)}
    assert await rig.our_nodes() - in_chain == set()
    await rig.write("vda", 0x10 + number % 200, 3 * MIB, 4 * KIB)


def _in(node: dict, chains: dict[str, list[str]]) -> bool:
    return any(node["file"] == file for chain in chains.values() for file in chain)


KINDS = (FaultKind.ERROR, FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER, FaultKind.DROP_REPLY)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_every_command(qemu: QemuBinaries, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "COMMAND_SECONDS", REPLY_SECONDS * 20)
    operation = OPERATIONS[name]
    async with open_rig(qemu, tmp_path, proxy=True) as rig:
        sent = await commands_of(rig, operation)
        number = cases = 0
        for kind in KINDS:
            for command, count in sent.items():
                for nth in range(1, count + 1):
                    number += 1
                    cases += await one_case(rig, operation, Fault(command, kind, nth=nth), number, monkeypatch)
        assert cases >= 0.9 * number, "the faults struck"
        await rig.guest.stop()
        for target in ALL:
            assert rig.holds(target, rig.source(target), "raw" if target == "vdb" else "qcow2")


async def commands_of(rig: Rig, operation: Operation) -> Counter[str]:
    """What it sends, from the request to the end of its jobs."""
    await rig.layers(operation.layers)
    begun = len(rig.proxy.commands())
    assert await attempt(rig, operation) is None
    await over(rig)
    sent = Counter(command for command in rig.proxy.commands()[begun:] if command in CHANGING)
    await consistent(rig, 0)
    await reset(rig)
    return sent


async def one_case(rig: Rig, operation: Operation, fault: Fault, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """One fault; whether it struck."""
    await rig.layers(operation.layers)
    fired = len(rig.proxy.fired)
    rig.proxy.inject(fault)
    if fault.kind is FaultKind.DROP_REPLY:
        monkeypatch.setattr(Session, "COMMAND_SECONDS", REPLY_SECONDS)
    try:
        answer = await attempt(rig, operation)
        await over(rig)
    finally:
        monkeypatch.setattr(Session, "COMMAND_SECONDS", REPLY_SECONDS * 20)
        rig.proxy.clear()
    struck = len(rig.proxy.fired) > fired
    try:
        await rig.settled()
        await consistent(rig, number)
        await reset(rig)
    except (AssertionError, errors.BlockferryError, TimeoutError) as problem:
        raise AssertionError(f"{fault}, answered {answer}") from problem
    return struck
