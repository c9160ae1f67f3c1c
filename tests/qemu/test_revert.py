"""Reverting a guest to a snapshot: a new overlay on each image as of then; what is left behind stays whole."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from defined import KIB, MIB, Defined, open_defined

from blockferry import errors
from blockferry.model import request as ask
from blockferry.testing import QemuBinaries, check_image

BOTH = ("vda", "vdb")


@pytest.fixture
async def guest(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    """Running, with snapshots s1 and s2, and something of its own in every layer."""
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        await guest.start()
        for number, name in enumerate(("s1", "s2"), start=1):
            for target in BOTH:
                await guest.write(target, 0x20 + number, number * MIB)
            remember(guest, name)
            await guest.snapshot(name)
        for target in BOTH:
            await guest.write(target, 0x2F, 7 * MIB)
        yield guest


def remember(guest: Defined, name: str) -> None:
    """What the disks held when that snapshot was taken."""
    guest.as_of[name] = {target: bytes(contents) for target, contents in guest.written.items()}


async def revert(guest: Defined, name: str, **more: bool) -> str:
    shown = await guest.ask(ask.RevertSnapshot(domain="g1", snapshot=name, **more))
    for target, contents in guest.as_of[name].items():
        guest.written[target][:] = contents
    return str(shown.state)


def files(guest: Defined) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in guest.path.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("more", "state"), [({}, "shut off"), ({"start": True}, "running"), ({"pause": True}, "prelaunch")]
)
@pytest.mark.parametrize("running", [True, False])
async def test_the_guest_finds_what_was_there(
    guest: Defined, more: dict[str, bool], state: str, *, running: bool
) -> None:
    if not running:
        await guest.stop()
    assert await revert(guest, "s1", **more) == state
    if state == "running":
        await guest.write("vda", 0x31, 5 * MIB, KIB * 64)
    if state != "shut off":
        await guest.stop()
    for target in BOTH:
        disk = await guest.disk(target)
        assert Path(disk.source).name.startswith(f"{target}.s1-r")
        assert [Path(image.file).name for image in disk.chain[1:]] == [target]
        check_image(guest.qemu, Path(disk.source), "qcow2")
        assert guest.holds(target, Path(disk.source), "qcow2")


async def test_what_is_left_behind_stays_and_can_be_gone_back_to(guest: Defined) -> None:
    await guest.stop()
    latest = {target: bytes(contents) for target, contents in guest.written.items()}
    before = files(guest)
    await revert(guest, "s1", start=True)
    await guest.write("vda", 0x32, 3 * MIB)
    await guest.snapshot("s3")
    rows = {row.name: row for row in (await guest.ask(ask.ListSnapshots(domain="g1"))).snapshots}
    assert {name: (row.parent, row.current) for name, row in rows.items()} == {
        "s1": (None, False),
        "s2": ("s1", False),
        "s3": ("s1", True),
    }
    await revert(guest, "s2")
    for target in BOTH:
        assert guest.holds(target, Path((await guest.disk(target)).source), "qcow2")
        assert guest.holds(target, guest.path / f"{target}.s2", "qcow2", latest[target])
    assert {path: now for path, now in files(guest).items() if path in before} == before


async def test_nothing_is_merged_into_what_others_stand_on(guest: Defined) -> None:
    await revert(guest, "s1", start=True)
    before = files(guest)
    with pytest.raises(errors.DiskUnsuitable, match="a revert left behind"):
        await guest.ask(ask.Commit(domain="g1", disk="vda"))
    with pytest.raises(errors.SnapshotNotMergeable):
        await guest.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1"))
    unchanged = {path for path, contents in files(guest).items() if before[path] == contents}
    assert {guest.path / "vda", guest.path / "vda.s1", guest.path / "vda.s2"} <= unchanged


async def test_refused_before_the_guest_is_ended(guest: Defined) -> None:
    (guest.path / "vdb").rename(guest.path / "away")
    with pytest.raises(errors.ImageUnsuitable, match="No such file"):
        await guest.ask(ask.RevertSnapshot(domain="g1", snapshot="s1"))
    assert (await guest.show()).state == "running"
    (guest.path / "away").rename(guest.path / "vdb")
    with pytest.raises(errors.NoSuchSnapshot):
        await guest.ask(ask.RevertSnapshot(domain="g1", snapshot="s9"))
    assert (await guest.show()).state == "running"


async def test_its_mirrors_are_dropped(guest: Defined) -> None:
    await guest.snapshot("s3", ("vda",))
    await revert(guest, "s1", start=True)
    mirror = await guest.mirror("vda")
    assert mirror is not None
    assert (mirror.state, mirror.reason) == ("lost", "the guest was reverted to snapshot s1")


async def test_not_to_what_a_commit_has_written_into(guest: Defined) -> None:
    """What the base of a commit that did not end holds was never on the disk."""
    commit = ask.Commit(domain="g1", disk="vda", top=str(guest.path / "vda.s1"), bandwidth=KIB)
    await guest.ask(commit)
    cancelled = await guest.ask(ask.CancelJobs(domain="g1", disks=("vda",)))
    assert cancelled.text.endswith(
        f"written in part: {guest.path / 'vda'}; not what they were any more: snapshots s1"
    ), cancelled.text
    snapshots = (await guest.ask(ask.ListSnapshots(domain="g1"))).snapshots
    marked = {(each.name, disk.target) for each in snapshots for disk in each.disks if disk.written_into}
    assert marked == {("s1", "vda")}, "what s2 keeps is the same, whatever of s1's image is in the base as well"
    with pytest.raises(errors.ImageUnsuitable, match=f"{guest.path / 'vda'} .*a commit that did not end"):
        await revert(guest, "s1")
    assert (await guest.show()).state == "running"
    await revert(guest, "s2")
    for target in BOTH:
        assert guest.holds(target, Path((await guest.disk(target)).source), "qcow2")
