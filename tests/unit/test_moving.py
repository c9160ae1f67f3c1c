"""A move as whoever follows it sees it, and as it is printed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from blockferry import errors
from blockferry.interfaces.cli import moved
from blockferry.model import view as views
from blockferry.model.moving import Following, how_it_ended

MIB = 1 << 20


def a_move(**more: Any) -> dict[str, Any]:
    """A move of vda (offload) and vdb (mirror), as JSON has it."""
    disks = tuple(
        views.MoveDiskView(
            target=target, source=f"/old/{target}", dest=f"/new/{target}", format="raw", strategy=strategy, why="so"
        )
        for target, strategy in (("vda", "offload"), ("vdb", "mirror"))
    )
    files = (
        views.MoveFileView(source="/old/base", file="/new/base", copied=MIB, total=MIB, method="reflink"),
        views.MoveFileView(source="/old/vda", file="/new/vda", copied=0, total=4 * MIB),
    )
    fields = {"state": "working", "phase": "copy", "disks": disks, "files": files} | more
    return msgspec.to_builtins(views.MoveView(domain="vm1", operation=7, **fields))  # type: ignore[no-any-return]


def heard(kind: str, disk: str | None = None, *, seq: int = 0, **data: Any) -> dict[str, Any]:
    return {"kind": "event", "seq": seq, "type": kind, "domain": "vm1", "disk": disk, "data": data}


def copying(current: int, rate: float | None = None) -> dict[str, Any]:
    figures = {"current": current, "total": 4 * MIB, "rate": rate}
    return heard("move-progress", operation=7, phase="copy", file="/new/vda", **figures)


def mirroring(disk: str, current: int, **more: Any) -> dict[str, Any]:
    return heard("progress", disk, state="copying", current=current, total=8 * MIB, rate=1.0 * MIB, **more)


def seen(following: Following) -> views.MoveProgress:
    return msgspec.convert(following.progress(), views.MoveProgress)


def test_files_then_disks_are_added_up() -> None:
    following = Following(a_move())
    assert (seen(following).current, seen(following).total, seen(following).rate) == (MIB, 5 * MIB, None)
    assert following.hear(copying(2 * MIB, rate=1.0 * MIB))
    at = seen(following)
    assert [(part.name, part.state) for part in at.parts] == [("/new/base", "done"), ("/new/vda", "copying")]
    assert (at.phase, at.current, at.rate, at.remaining_seconds) == ("copy", 3 * MIB, MIB, 2.0)
    following.look(a_move())
    assert seen(following).current == 3 * MIB, "a view is as of the last sync"
    following.hear(mirroring("vdb", 1))  # a job of before: of this phase are the files alone
    assert [part.name for part in seen(following).parts] == ["/new/base", "/new/vda"]
    following.look(a_move(phase="pivot"))
    assert seen(following).parts == ()
    assert not following.hear(mirroring("vda", MIB))
    assert not following.hear(mirroring("vdz", MIB)), "a disk that is not moved"
    assert following.hear(mirroring("vdb", 3 * MIB)), "now all have told of themselves"
    assert not following.hear(mirroring("vda", 2 * MIB))
    assert following.hear(mirroring("vda", 3 * MIB)), "once more, though vdb is silent"
    at = seen(following)
    assert (at.current, at.total, at.rate, at.remaining_seconds) == (6 * MIB, 16 * MIB, 2 * MIB, 5.0)


def test_a_mirror_that_is_outrun_has_no_time_left() -> None:
    following = Following(a_move(phase="pivot"))
    following.hear(mirroring("vda", MIB))
    following.hear(mirroring("vdb", MIB, converging=False))
    at = seen(following)
    assert (at.converging, at.remaining_seconds, at.parts[0].converging) == (False, None, None)
    line = moved.progress(following.progress())
    assert line is not None
    assert line.startswith("mirroring  12 %")
    assert line.endswith("not converging")
    assert " left" not in line


def test_a_comparison_is_of_all_disks_together() -> None:
    following = Following(a_move(phase="verify", pivoted=True))
    figures = {"current": 2 * MIB, "total": 8 * MIB, "rate": 2.0 * MIB, "remaining_seconds": 3.0}
    assert following.hear(heard("move-progress", operation=7, phase="verify", **figures))
    at = seen(following)
    assert [(part.name, part.state, part.current) for part in at.parts] == [("comparison", "comparing", 2 * MIB)]
    assert (at.phase, at.total, at.remaining_seconds) == ("verify", 8 * MIB, 3.0)
    assert moved.progress(following.progress()) == "comparing  25 %  2.0 MiB of 8.0 MiB  2.0 MiB/s  0:03 left"


@pytest.mark.parametrize(("different", "says"), [(0, "all equal"), (512, "512 B differ")])
def test_a_verdict_is_said(different: int, says: str) -> None:
    event = heard("move-verified", operation=7, how="full", compared=8 * MIB, different=different)
    assert moved.event(event) == f"verify  full: 8.0 MiB compared, {says}"


def test_what_is_worth_another_look() -> None:
    following = Following(a_move())
    assert following.concerns(heard("move-copied", seq=3, operation=7))
    assert following.concerns(heard("mirror-ready", "vdb", seq=4, operation=8))
    for event in (
        heard("move-copied", seq=3, operation=6),
        heard("mirror-ready", "vdc", seq=4, operation=8),
        copying(MIB),
        heard("snapshot-created", seq=5, operation=7),
    ):
        assert not following.concerns(event)


DIFFERENT = tuple(views.MoveDifference(target="vdb", offset=at * MIB, length=512) for at in range(20))


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"state": "done", "pivoted": True}, None, ""),
        ({"state": "cancelled", "reason": "on request"}, errors.MoveCancelled, "given up: on request"),
        ({"state": "standing still", "reason": "full"}, errors.MoveStands, r"stands still \(copy\): full"),
        ({"state": "standing still"}, errors.MoveStands, "the process that drove it has ended"),
        (
            {"state": "standing still", "pivoted": True, "differences": DIFFERENT},
            errors.MoveDiffers,
            "vdb from byte 0 on .512 bytes., .*, 17 more",
        ),
    ],
)
def test_how_it_ended(more: dict[str, Any], error: type[errors.BlockferryError] | None, says: str) -> None:
    found = how_it_ended(a_move(**more))
    if error is None:
        assert found is None
    else:
        assert type(found) is error
        with pytest.raises(error, match=says):
            raise found


def test_sources_are_to_be_removed_only_after_all_went_well() -> None:
    left = ("/old/vda", "/old/vdb")
    well = moved.ended(a_move(state="done", pivoted=True, left=left, verified="full", compared=12 * MIB))
    assert "compared (full): 12.0 MiB, equal" in well
    assert well.endswith("  rm /old/vda\n  rm /old/vdb")
    assert "were not compared" in moved.ended(a_move(state="done", pivoted=True))
    for more in ({"state": "standing still"}, {"state": "done", "verified": "full", "differences": DIFFERENT}):
        bad = moved.ended(a_move(pivoted=True, left=left, **more))
        assert "  /old/vda" in bad
        assert "rm " not in bad
    assert "  vdb: 512 bytes from 1048576 on\n" in bad
    assert "and 10 more" in bad


def test_a_move_that_has_gone_over_is_not_said_to_be_given_up() -> None:
    assert "operations cancel 7" in moved.left_alone(a_move())
    over = moved.left_alone(a_move(pivoted=True, phase="verify"))
    assert "The guest is on the destinations. It goes on by itself" in over
    assert "cancel" not in over
    assert "operations show 7" in over
