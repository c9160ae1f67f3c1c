"""Commit, rebase and the merge of deleted snapshots: whatever the order, the guest sees what it wrote."""

import itertools
from pathlib import Path

import pytest
from rig import ALL, MIB, Rig, header, open_rig

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import BlockCommit, SnapshotDelete
from blockferry.testing import Fault, FaultKind, QemuBinaries, check_image

SLOW = 64 * 1024  # bytes per second


async def whole(rig: Rig, *targets: str) -> None:
    """What each of these disks stands on holds what the guest wrote, after a clean end of QEMU."""
    active = {target: (await rig.disks())[target].chain[0] for target in targets}
    assert await rig.qemu_jobs() == {}
    await rig.guest.stop()
    for target, image in active.items():
        assert rig.holds(target, image.file, image.format), target
        check_image(rig.qemu, image.file, image.format)


@pytest.mark.parametrize("target", ALL)
async def test_active_commit_to_the_bottom(either: Rig, target: str) -> None:
    before = await either.status()
    await either.layers(3, only=[target])
    await either.pauses_heard()
    job = await either.commit(target)
    assert (job.type, job.dest, job.source) == ("active-commit", either.layer(target, 0), either.layer(target, 3))
    assert (await either.ended(target)).state == "done"
    assert await either.chain(target) == [either.layer(target, 0)]
    assert await either.status() == before
    assert await either.pauses_heard() == ([] if before == "prelaunch" else either.pauses_of_a_window)
    assert await either.our_nodes() == set()
    assert await either.snapshots() == {}, "what they kept was written over"
    await either.write(target, 0x77, 5 * MIB)
    await whole(either, target)


@pytest.mark.parametrize("target", ALL)
async def test_commit_in_the_middle(rig: Rig, target: str) -> None:
    await rig.layers(4, only=[target])
    job = await rig.commit(target, top=rig.layer(target, 3), base=rig.layer(target, 1))
    assert job.type == "commit"
    ended = await rig.ended(target)
    assert (ended.state, ended.reason) == ("done", None)
    assert await rig.chain(target) == [rig.layer(target, number) for number in (4, 1, 0)]
    assert await rig.pauses_heard() == []
    above = header(rig.qemu, rig.layer(target, 4))
    assert (above["backing-filename"], above["backing-filename-format"]) == (rig.layer(target, 1), "qcow2")
    # s2 and s3 kept what is written over; s4 kept s3's image, which is in s1's now.
    found = await rig.snapshots()
    assert list(found) == ["s1", "s4"]
    assert (found["s4"].parent, found["s4"].disks[0].backing) == ("s1", rig.layer(target, 1))
    await whole(rig, target)


async def test_shallow_commit_removes_the_file_when_asked(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    flags = BlockCommit.SHALLOW | BlockCommit.DELETE | BlockCommit.ACTIVE
    await rig.commit("vda", flags=flags)
    await rig.ended("vda")
    assert await rig.chain("vda") == [rig.layer("vda", 1), rig.layer("vda", 0)]
    assert not (rig.path / "vda.s2").exists()
    await whole(rig, "vda")


async def test_a_limit_that_is_refused_or_not_answered(faulty: Rig) -> None:
    """The job goes on, and nobody calls it a mirror that was lost; a broken connection only has it asked again."""
    await faulty.layers(1, only=["vda"])
    await faulty.commit("vda", bandwidth=SLOW)
    faulty.proxy.inject(Fault("block-job-set-speed", FaultKind.ERROR))
    with pytest.raises(errors.SpeedRefused, match=r"the active-commit of vda can't be limited now: .*job list vm1"):
        await faulty.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=MIB))
    job = (await faulty.jobs())["vda"]
    assert (job.state, job.speed) == ("running", SLOW)
    for kind in (FaultKind.CUT_BEFORE, FaultKind.CUT_AFTER):
        faulty.proxy.inject(Fault("block-job-set-speed", kind))
        await faulty.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=2 * SLOW))
        assert (await faulty.jobs())["vda"].speed == 2 * SLOW
    await faulty.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    assert (await faulty.ended("vda")).state == "done"
    await whole(faulty, "vda")


async def test_a_limit_for_a_job_that_ends(rig: Rig) -> None:
    """QEMU's own refusal: somebody else has told the mirror to complete, and it waits to be finalized."""
    await rig.copy("vda")
    await rig.ready("vda")
    (job,) = await rig.qemu_jobs()
    await rig.guest.command("job-complete", {"id": job})
    with pytest.raises(errors.SpeedRefused, match=r"the copy of vda can't be limited now: .*pending"):
        await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=MIB))


async def test_commit_goes_on_while_the_guest_writes(rig: Rig) -> None:
    await rig.layers(1, only=["vda"])
    await rig.commit("vda", bandwidth=SLOW)
    for number in range(4):
        await rig.write("vda", 0x31 + number, number * MIB)
    await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    assert (await rig.ended("vda")).state == "done"
    await whole(rig, "vda")


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("base", [None, 0, 1])
async def test_rebase(rig: Rig, target: str, base: int | None) -> None:
    await rig.layers(3, only=[target])
    await rig.pauses_heard()
    below = rig.layer(target, base) if base is not None else None
    job = await rig.rebase(target, base=below)
    assert (job.type, job.base) == ("rebase", below)
    ended = await rig.ended(target)
    assert (ended.state, ended.reason) == ("done", None)
    rest = range(base, -1, -1) if base is not None else ()
    assert await rig.chain(target) == [rig.layer(target, 3), *(rig.layer(target, number) for number in rest)]
    assert list(await rig.snapshots()) == ["s1", "s2", "s3"], "their images are there still"
    assert header(rig.qemu, rig.layer(target, 3)).get("backing-filename") == below
    await rig.write(target, 0x78, 4 * MIB)
    await whole(rig, target)


@pytest.mark.parametrize("base", [None, 0])
async def test_rebase_and_qemu_killed_right_after(rig: Rig, base: int | None) -> None:
    """What was pulled in is on disk when the header says so: nothing was flushed by the guest."""
    await rig.layers(3, only=["vda"])
    await rig.rebase("vda", base=rig.layer("vda", base) if base is not None else None)
    await rig.ended("vda")
    await rig.guest.kill()
    assert rig.holds("vda", rig.layer("vda", 3), "qcow2")


async def test_rebase_joins_a_copy_onto_the_same_base(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    base = rig.layer("vda", 0)
    started = await rig.copy("vda", base=base, bandwidth=SLOW)
    joined = await rig.rebase("vda", base=base)
    assert (joined.operation, joined.dest) == (started.operation, started.dest)
    with pytest.raises(errors.RebaseElsewhere, match=f"backs onto {base}; a rebase onto no base"):
        await rig.rebase("vda")
    with pytest.raises(errors.RebaseElsewhere, match=rig.layer("vda", 1)):
        await rig.rebase("vda", base=rig.layer("vda", 1))
    await rig.ask(ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=0))
    await rig.pivot("vda")
    assert await rig.chain("vda") == [str(rig.dest("vda")), base]
    await whole(rig, "vda")


async def test_rebase_joins_a_whole_copy(rig: Rig) -> None:
    await rig.layers(1, only=["vda"])
    started = await rig.copy("vda", bandwidth=SLOW)
    assert (await rig.rebase("vda")).operation == started.operation
    with pytest.raises(errors.RebaseElsewhere, match="backs onto no base"):
        await rig.rebase("vda", base=rig.layer("vda", 0))


@pytest.mark.parametrize("verb", ["commit", "rebase"])
async def test_cancel(rig: Rig, verb: str) -> None:
    await rig.layers(2, only=["vda", "vdb"])
    for target in ("vda", "vdb"):
        await getattr(rig, verb)(target, bandwidth=SLOW)
    before = await rig.chain("vda")
    with pytest.raises(errors.BadRequest, match="ends by itself"):
        await rig.pivot("vda")
    with pytest.raises(errors.DiskBusy):
        await rig.snapshot("s9", only=["vda"])
    done = await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda", "vdb")))
    assert "the chain is as it was" in done.text
    assert await rig.states() == {"vda": "cancelled", "vdb": "cancelled"}
    assert await rig.chain("vda") == before
    assert list(await rig.snapshots()) == ["s1", "s2"]
    await whole(rig, "vda", "vdb")


async def test_a_lost_commit_says_why(rig: Rig) -> None:
    await rig.layers(1, only=["vda"])
    await rig.commit("vda", bandwidth=SLOW)
    (job,) = await rig.qemu_jobs()
    await rig.guest.command("job-cancel", {"id": job})
    ended = await rig.ended("vda")
    assert (ended.state, bool(ended.reason)) == ("lost", True)
    assert await rig.chain("vda") == [rig.layer("vda", 1), rig.layer("vda", 0)]
    await rig.commit("vda")
    assert (await rig.ended("vda")).state == "done"
    await whole(rig, "vda")


@pytest.mark.parametrize("order", list(itertools.permutations("1234")), ids="".join)
async def test_delete_in_every_order(qemu: QemuBinaries, tmp_path: Path, order: tuple[str, ...]) -> None:
    async with open_rig(qemu, tmp_path) as rig:
        await rig.layers(4)
        left = list("1234")
        for number in order:
            done = await rig.delete(f"s{number}", 0)
            assert f"s{number}" in done.text
            left.remove(number)
            found = await rig.snapshots()
            assert list(found) == [f"s{each}" for each in left]
            assert [found[f"s{each}"].parent for each in left] == [None, *(f"s{each}" for each in left)][:-1]
            for target in ALL:
                chain = await rig.chain(target)
                assert chain == [*(rig.layer(target, int(each)) for each in reversed(left)), rig.layer(target, 0)]
                kept = [disk.backing for each in left for disk in found[f"s{each}"].disks if disk.target == target]
                assert kept == list(reversed(chain))[:-1], "each snapshot names the image that keeps it"
                assert not (rig.path / f"{target}.s{number}").exists()
        assert await rig.our_nodes() == set()
        await whole(rig, *ALL)


@pytest.mark.parametrize(
    ("flag", "left"), [(SnapshotDelete.CHILDREN, ["s1"]), (SnapshotDelete.CHILDREN_ONLY, ["s1", "s2"])]
)
async def test_delete_with_children(rig: Rig, flag: SnapshotDelete, left: list[str]) -> None:
    await rig.layers(4)
    await rig.delete("s2", int(flag))
    found = await rig.snapshots()
    assert list(found) == left
    assert found[left[-1]].current
    for target in ALL:
        assert await rig.chain(target) == [rig.layer(target, number) for number in range(len(left), -1, -1)]
    await whole(rig, *ALL)


async def test_delete_costs_what_was_written(rig: Rig) -> None:
    """The merge of a snapshot reads and writes what its overlay holds, not the disk."""
    await rig.layers(2, only=["vda"])
    before = (rig.path / "vda.img").stat().st_blocks
    await rig.delete("s1", 0)
    assert (rig.path / "vda.img").stat().st_blocks - before <= 2 * 2 * 64 * 1024 // 512 + 4 * 128
    await whole(rig, "vda")


async def test_snapshots_know_parent_current_and_children(rig: Rig) -> None:
    await rig.layers(3, only=["vda"])
    found = await rig.snapshots()
    assert [(each.parent, each.children, each.current) for each in found.values()] == [
        (None, ("s2",), False),
        ("s1", ("s3",), False),
        ("s2", (), True),
    ]
    await rig.delete("s2", SnapshotDelete.METADATA_ONLY)
    found = await rig.snapshots()
    assert [(each.parent, each.children) for each in found.values()] == [(None, ("s3",)), ("s1", ())]


async def test_delete_of_what_is_in_the_chain_no_more(rig: Rig) -> None:
    await rig.layers(2, only=["vda"])
    await rig.rebase("vda", base=rig.layer("vda", 0))
    await rig.ended("vda")
    before = await rig.state()
    with pytest.raises(errors.SnapshotNotMergeable, match="is not in the chain of vda any more"):
        await rig.delete("s1", 0)
    with pytest.raises(errors.SnapshotNotMergeable, match="does not back onto"):
        await rig.delete("s2", 0)
    with pytest.raises(errors.SnapshotNotMergeable, match="has no children"):
        await rig.delete("s2", SnapshotDelete.CHILDREN_ONLY)
    assert await rig.state() == before
    await rig.delete("s1", SnapshotDelete.METADATA_ONLY)
