"""kill -9 of the host process at every boundary of a quiesced snapshot, and of its recovery: the guest is thawed."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from calm import FORMATS, Calm, open_calm

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import ask_agent, find_qemu
from blockferry.testing.crash import Crasher, CrashResult

FROZEN = ("after guest-fsfreeze-freeze", "before guest-fsfreeze-thaw")


async def new_state(calm: Calm, name: str, attach: ask.Attach | None = None) -> Path:
    """A state directory with the guest attached; nobody has it open."""
    state = calm.path / name
    state.mkdir()
    service = await Service.open(state)
    await service.submit(attach or calm.attach)
    await service.close()
    return state


async def die(crasher: Crasher, state: Path, requests: list[ask.Request], **more: Any) -> CrashResult:
    """In a thread: the proxy and the relay are in this one."""
    return await asyncio.to_thread(crasher.run, state, requests, **more)


async def recovered(calm: Calm, state: Path) -> tuple[str, dict[str, str]]:
    """Recovery has been: how the snapshot ended, and the image that each disk is on."""
    calm.service = await Service.open(state)
    try:
        await calm.is_thawed()
        again = await calm.service.submit(ask.Recover())
        assert isinstance(again, view.RecoveryReport)
        assert again.operations == ()
        (*_none, (_what, ended)) = [("", "never begun"), *await calm.operations()]
        return ended, await calm.active()
    finally:
        await calm.service.close()


@pytest.mark.guest
@pytest.mark.timeout(300)
async def test_killed_at_every_boundary(tmp_path: Path) -> None:
    async with open_calm(find_qemu("qemu10"), tmp_path) as calm:
        await calm.service.close()
        with Crasher() as crasher:
            whole = await die(crasher, await new_state(calm, "whole"), [calm.wish("whole")], at=None)
            assert whole.error is None
            first, last = (whole.boundaries.index(boundary) for boundary in FROZEN)
            assert 0 < first < last
            assert [each for each in worth_dying(whole.boundaries) if first <= each <= last] == [first + 1, last]
            assert whole.boundaries[first + 1] == "before transaction"
            for number in worth_dying(whole.boundaries):
                boundary = whole.boundaries[number]
                state = await new_state(calm, f"at{number}")
                assert (await die(crasher, state, [calm.wish(f"at{number}")], at=number)).killed
                frozen = first <= number <= last
                assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status") == ["frozen" if frozen else "thawed"]
                ended, on = await recovered(calm, state)
                names = {f"{target}.at{number}" for target in FORMATS}
                assert ended in ("never begun", "undone", "done"), boundary
                assert names & set(on.values()) == (names if ended == "done" else set()), boundary
                assert not (frozen and ended == "done"), "nobody knows whether the freeze held"
            await recovery_killed(calm, crasher, last)
            await qemu_killed(calm, crasher, last)


def worth_dying(boundaries: Sequence[str]) -> list[int]:
    """Those before something that changes anything, and the last: between two changes it does not matter where."""
    asking = ("before query-", "before qom-get", "before x-debug-query-", "before guest-fsfreeze-status")
    found = [n for n, each in enumerate(boundaries) if each.startswith("before") and not each.startswith(asking)]
    return [*found, len(boundaries) - 1]


async def recovery_killed(calm: Calm, crasher: Crasher, frozen: int) -> None:
    """Killed when all is frozen and switched, and then again until it undoes as every recovery does."""

    async def interrupted(name: str) -> Path:
        state = await new_state(calm, name)
        assert (await die(crasher, state, [calm.wish(name)], at=frozen)).killed
        assert await ask_agent(calm.guest.agent, "guest-fsfreeze-status") == ["frozen"]
        return state

    whole = await die(crasher, await interrupted("recovered"), [], at=None, from_open=True)
    assert "before guest-fsfreeze-thaw" in whole.boundaries
    thawed = whole.boundaries.index("before block-commit")
    numbers = [number for number in worth_dying(whole.boundaries) if number <= thawed]
    assert len(numbers) > 2
    for number in numbers:
        state = await interrupted(f"again{number}")
        assert (await die(crasher, state, [], at=number, from_open=True)).killed
        ended, _on = await recovered(calm, state)
        assert ended == "undone"


async def qemu_killed(calm: Calm, crasher: Crasher, frozen: int) -> None:
    """With QEMU gone as well there is nothing to thaw, and nobody waits for it."""
    # Not through the proxy: who listens is how a QEMU that is gone is known.
    direct = ask.Attach(domain="vm1", qmp=str(calm.guest.qemu.qmp), agent=str(calm.guest.agent))
    state = await new_state(calm, "gone", direct)
    before = {path.name for path in calm.path.iterdir()}
    assert (await die(crasher, state, [calm.wish("gone")], at=frozen)).killed
    await calm.guest.kill()
    calm.service = await Service.open(state)
    assert await calm.operations() == [("snapshot", "undone")]
    assert not calm.service.has_work()
    await calm.service.close()
    assert {path.name for path in calm.path.iterdir()} == before
