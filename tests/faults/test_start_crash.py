"""kill -9 of the host process at every boundary of a start: afterwards the guest runs, or nothing of it is left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from defined import DISK, XML

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import QemuBinaries, find_qemu, make_image
from blockferry.testing.crash import Crasher

MIB = 1 << 20
LIMIT = "<iotune><total_iops_sec>100000</total_iops_sec></iotune></disk>"
SHOW = ask.ShowDomain(domain="g1")


@dataclass(frozen=True)
class Bench:
    binaries: QemuBinaries
    crasher: Crasher


@pytest.fixture(scope="module", params=["distribution", "qemu10"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    binaries = find_qemu(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKFERRY_QEMU_DIR", str(binaries.system.parent))
        with Crasher() as crasher:
            yield Bench(binaries, crasher)


@pytest.mark.timeout(500)
def test_a_start_killed_at_every_boundary(bench: Bench, tmp_path: Path) -> None:
    boundaries, _ran = asyncio.run(one_case(bench, tmp_path / "whole", at=None))
    assert any(boundary.startswith("before record") for boundary in boundaries), boundaries
    running = 0
    for at in range(len(boundaries)):
        try:
            running += asyncio.run(one_case(bench, tmp_path / str(at), at=at))[1]
        except BaseException as error:
            error.add_note(f"killed at boundary {at}: {boundaries[at]}")
            raise
    assert 0 < running < len(boundaries), "before its record a start is undone, after it it is done"
    print(f"\nstart: {len(boundaries)} kills, {running} started, the others shut off")  # noqa: T201 - the figure


async def one_case(bench: Bench, folder: Path, *, at: int | None) -> tuple[tuple[str, ...], bool]:
    """The boundaries that were passed, and whether the guest ran when the next process had looked."""
    (folder / "state").mkdir(parents=True)
    image = make_image(bench.binaries, folder / "a", "raw", MIB)
    xml = XML.format(disks=DISK.format(target="vda", format="raw", file=image).replace("</disk>", LIMIT))
    service = await Service.open(folder / "state")
    await service.submit(ask.Define(xml=xml))
    await service.close()
    result = await asyncio.to_thread(bench.crasher.run, folder / "state", [ask.Start(domain="g1")], at=at)
    assert result.killed or at is None or len(result.boundaries) <= at, result
    assert result.error is None
    service = await Service.open(folder / "state")
    try:
        ran = await look(service, whole=at is None)
        await service.submit(ask.Stop(domain="g1", force=True))
        await start(service)
        await service.submit(ask.Stop(domain="g1", force=True))
    finally:
        await service.close()
    return result.boundaries, ran


async def look(service: Service, *, whole: bool) -> bool:
    """It runs, or its lock is free; nothing is left to settle. Afterwards it runs."""
    shown = await service.submit(SHOW)
    listed = await service.submit(ask.ListOperations())
    assert isinstance(shown, view.DomainView)
    assert isinstance(listed, view.OperationList)
    assert {each.state for each in listed.operations} <= {"done", "undone"}
    taken = service._desk.keepers["g1"].home.taken()
    assert taken == (shown.state != "shut off")
    assert whole <= taken
    if not taken:
        await start(service)
    # A guest that was started and not let run yet is let run by the settling of its start.
    assert shown.state in ("running", "shut off")
    with pytest.raises(errors.AlreadyRunning):
        await service.submit(ask.Start(domain="g1"))
    return taken


async def start(service: Service) -> None:
    shown = await service.submit(ask.Start(domain="g1"))
    assert isinstance(shown, view.DomainView)
    assert shown.state == "running"
