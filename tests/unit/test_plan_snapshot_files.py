"""Snapshots: what headers say, images that are there, block devices, and a QEMU without `transaction`."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_snapshot import GIB, SIZE, Plug, fact, images_of, observed

from blockferry import errors
from blockferry.model.domain import Observation
from blockferry.model.files import FileFact, ImageFact
from blockferry.model.flags import SnapshotCreate
from blockferry.model.graph import Edge
from blockferry.model.snapshot import DiskWish, MirrorWish, Mode, SnapshotWish
from blockferry.plan.destinations import Files, header_name
from blockferry.plan.files import ClaimFile, CreateImage, FlushFiles
from blockferry.plan.plan import Names, Plan
from blockferry.plan.snapshot import choose, existing_files, files_of, in_part, plan_snapshot, require_transaction
from blockferry.plan.steps import AddNode, StartMirror, TakeSnapshots

TWO = observed(Plug("vda"), Plug("vdb", fmt="raw"))
REUSE = SnapshotCreate.REUSE_EXT


def without_transaction(seen: Observation) -> Observation:
    return msgspec.structs.replace(
        seen, capabilities=msgspec.structs.replace(seen.capabilities, commands=frozenset({"blockdev-snapshot"}))
    )


def plan(
    *disks: DiskWish,
    seen: Observation = TWO,
    flags: int = 0,
    facts: tuple[FileFact, ...] = (),
    images: tuple[ImageFact, ...] = (),
    users: dict[str, str] | None = None,
    only_these: bool = True,
) -> Plan:
    """What is not told is absent, with room; what has a header is a file, as are the disks' images."""
    wish = SnapshotWish(disks=disks, only_these=only_these)
    choices, _left_out = choose("vm1", seen, wish, "s1", SnapshotCreate(flags))
    known = {path: fact(path) for path in files_of(choices)} | images_of(choices)
    known |= {head.path: fact(head.path, kind="file") for head in images}
    files = Files(
        facts=known | {each.path: each for each in facts},
        images={head.path: (head,) for head in images},
        users=users or {},
    )
    return plan_snapshot(
        "vm1",
        seen,
        wish,
        names=Names("abcd", 7),
        operation=7,
        name="s1",
        files=files,
        now=1.5,
        parent=None,
        flags=flags,
    )


def header(path: str, backing: str | None = "/img/vda.img", **more: Any) -> ImageFact:
    backed = {"backing": backing, "real_backing": backing, "backing_format": "qcow2"} if backing else {}
    return ImageFact(**{"path": path, "format": "qcow2", "virtual_size": SIZE, **backed, **more})


def vda(file: str = "/snap/o", **more: Any) -> DiskWish:
    return DiskWish(name="vda", file=file, **more)


# --- what headers say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "overlay", "mirror"),
    [
        (None, ("/img/vda.img", "qcow2"), ("/copy/base", "raw")),
        ("absolute", ("/img/vda.img", "qcow2"), ("/copy/base", "raw")),
        ("relative", ("../img/vda.img", "qcow2"), ("../base", "raw")),
        ("none", (None, None), (None, None)),
    ],
)
def test_headers_of_the_overlay_and_its_mirror(
    mode: Mode | None, overlay: tuple[str | None, str | None], mirror: tuple[str | None, str | None]
) -> None:
    wish = MirrorWish(file="/copy/far/m", backing="/copy/base", backing_format="raw")
    made = plan(vda(mode=mode, mirror=wish))
    created = {step.path: (step.backing, step.backing_format) for step in made.prepare if isinstance(step, CreateImage)}
    assert created == {"/snap/o": overlay, "/copy/far/m": mirror}
    # Whatever the headers say, we know what the images stand on.
    (job,) = made.record.jobs
    assert (job.backing, job.backing_format) == ("/copy/base", "raw")
    assert made.record.snapshot is not None
    (kept,) = made.record.snapshot.disks
    assert (kept.backing, kept.backing_format) == ("/img/vda.img", "qcow2")
    assert kept.mode == (mode if mode != "absolute" else None)


def test_a_header_without_a_backing_is_said() -> None:
    made = plan(vda(mode="none", mirror=MirrorWish(file="/m")))
    assert [note.split(" ")[0] for note in made.notes] == ["/snap/o", "/m"]
    assert all("it backs onto /img/vda.img" in note for note in made.notes)


segments = st.lists(st.sampled_from(["a", "b", "cc", "d e"]), min_size=1, max_size=4)


@given(segments, segments)
def test_a_relative_name_leads_from_the_overlays_folder_to_the_backing(one: list[str], other: list[str]) -> None:
    backing, overlay = "/" + "/".join([*one, "image"]), "/" + "/".join([*other, "overlay"])
    name = header_name("relative", backing, overlay)
    assert name is not None
    assert not name.startswith("/")
    at = overlay.split("/")[1:-1]
    for part in name.split("/"):
        at = at[:-1] if part == ".." else [*at, part]
    assert "/" + "/".join(at) == backing


def test_a_relative_name_starts_where_the_overlay_really_is() -> None:
    """The system follows a link before it goes up from it."""
    made = plan(vda("/link/o", mode="relative"), facts=(fact("/link/o", real="/far/down/o"),))
    (created,) = [step for step in made.prepare if isinstance(step, CreateImage)]
    assert created.backing == "../../img/vda.img"


def test_an_uri_is_never_relative() -> None:
    assert header_name("relative", "nbd://h/x", "/snap/o") == "nbd://h/x"


@pytest.mark.parametrize(("mode", "fits"), [(None, False), ("absolute", False), ("relative", True), ("none", True)])
def test_a_backings_name_that_is_longer_than_a_header(mode: Mode | None, fits: bool) -> None:
    folder = "/" + "/".join(["d" * 200] * 6)
    seen = observed(Plug("vda", file=f"{folder}/i"))
    if fits:
        assert plan(vda(f"{folder}/o", mode=mode), seen=seen)
        return
    with pytest.raises(errors.DestinationUnusable, match="relative and none name it shorter"):
        plan(vda(f"{folder}/o", mode=mode), seen=seen)


# --- images that are there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "mode"), [(REUSE, None), (REUSE, "existing"), (0, "existing")])
def test_existing_overlay_is_opened_and_not_made(flags: int, mode: Mode | None) -> None:
    made = plan(vda(mode=mode), flags=flags, images=(header("/snap/o"),))
    assert [type(step) for step in made.prepare] == [AddNode, FlushFiles, TakeSnapshots]
    assert made.record.snapshot is not None
    assert made.record.snapshot.disks[0].mode == "existing"
    for step in made.prepare:
        if isinstance(step, AddNode) and step.options["driver"] == "qcow2":
            assert step.options["backing"] is None  # blockdev-snapshot gives it the disk's


def test_one_disk_takes_an_existing_overlay_and_the_other_a_new_one() -> None:
    made = plan(vda(mode="existing"), only_these=False, images=(header("/snap/o"),))
    assert [step.path for step in made.prepare if isinstance(step, ClaimFile)] == ["/img/vdb.s1"]
    choices, _ = choose("vm1", TWO, SnapshotWish(disks=(vda(mode="existing"),)), "s1", SnapshotCreate(0))
    assert existing_files(choices) == ("/snap/o",)
    assert files_of(choices) == ("/snap/o", "/img/vda.img", "/img/vdb.s1", "/img/vdb.img")


@pytest.mark.parametrize("mode", ["absolute", "relative", "none"])
def test_existing_files_and_a_mode_that_makes_one_contradict_each_other(mode: Mode) -> None:
    with pytest.raises(errors.BadRequest, match=f"mode {mode} of vda makes one"):
        plan(vda(mode=mode), flags=REUSE)


def test_existing_overlay_that_calls_the_image_by_another_name() -> None:
    assert plan(vda(), flags=REUSE, images=(header("/snap/o", backing="/link", real_backing="/img/vda.img"),))


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (header("/snap/o", backing="/img/vdb.img"), "backs onto /img/vdb.img, not onto /img/vda.img, the disk's"),
        (header("/snap/o", real_backing="/elsewhere"), "not onto /img/vda.img, the disk's current image"),
        (header("/snap/o", backing_format="raw"), "says that /img/vda.img is raw, and it is qcow2"),
        (header("/snap/o", backing_format=None), "names no format"),
        (header("/snap/o", backing=None), "no backing file, and is to be an overlay of /img/vda.img"),
        (header("/snap/o", virtual_size=SIZE * 2), f"{SIZE * 2} bytes, and the disk's is {SIZE}"),
        (header("/snap/o", problem="it is no qcow2"), "it is no qcow2"),
    ],
)
def test_existing_overlay_that_won_t_do(head: ImageFact, match: str) -> None:
    with pytest.raises(errors.ImageUnsuitable, match=match):
        plan(vda(), flags=REUSE, images=(head,))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({}, "does not exist"),
        ({"facts": (fact("/snap/o", kind="file"),)}, "not looked at"),
        ({"facts": (fact("/snap/o", kind="directory"),)}, "directory"),
        ({"facts": (fact("/snap/o", kind="file", used=True),)}, "holds a lock"),
        ({"images": (header("/snap/o"),), "users": {"/snap/o": "it is in the chain of vm2's vda"}}, "vm2's vda"),
    ],
)
def test_existing_overlay_that_is_absent_or_in_use(more: dict[str, Any], match: str) -> None:
    with pytest.raises(errors.ImageUnsuitable, match=match):
        plan(vda(), flags=REUSE, **more)


def test_existing_overlay_needs_no_room() -> None:
    plan(vda(), flags=REUSE, images=(header("/snap/o"),), facts=(fact("/snap/o", kind="file", free=0),))


def test_existing_mirror_keeps_the_chain_that_it_is_on() -> None:
    other = header("/m", backing="/copy/base", backing_format="raw")
    wish = vda(mirror=MirrorWish(file="/m"))
    made = plan(wish, flags=REUSE, images=(header("/snap/o"), other))
    (job,) = made.record.jobs
    assert (job.backing, job.backing_format, job.source) == ("/copy/base", "raw", "/snap/o")
    assert not [step for step in made.prepare if isinstance(step, CreateImage | ClaimFile)]
    assert isinstance(made.prepare[-1], StartMirror)


@pytest.mark.parametrize(
    ("wish", "head", "match"),
    [
        ({"backing": "/b"}, header("/m", backing="/c"), "backs onto /c, not onto /b as asked"),
        ({"backing_format": "raw"}, header("/m", backing="/c"), "says that /c is qcow2, and raw was asked for"),
        ({}, header("/m", backing=None), "no backing file"),
        ({}, header("/m", backing="/c", backing_format=None), "names no format"),
        ({}, header("/m", virtual_size=1), "1 bytes"),
        ({}, header("/m", problem="a loop"), "a loop"),
    ],
)
def test_existing_mirror_that_won_t_do(wish: dict[str, str], head: ImageFact, match: str) -> None:
    with pytest.raises(errors.ImageUnsuitable, match=match):
        plan(vda(mirror=MirrorWish(file="/m", **wish)), flags=REUSE, images=(header("/snap/o"), head))


def test_existing_mirror_as_asked() -> None:
    wish = MirrorWish(file="/m", backing="/c/./b", backing_format="qcow2")
    made = plan(vda(mirror=wish), flags=REUSE, images=(header("/snap/o"), header("/m", backing="/c/b")))
    assert made.record.jobs[0].backing == "/c/b"


# --- block devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_block_device(there: bool) -> None:
    images = (header("/dev/o"),) if there else ()
    made = plan(
        vda("/dev/o"),
        flags=REUSE if there else 0,
        images=images,
        facts=(fact("/dev/o", kind="block", size=GIB, free=0),),
    )
    assert not [step for step in made.prepare if isinstance(step, ClaimFile)]
    assert [step.overwrites for step in made.prepare if isinstance(step, CreateImage)] == ([] if there else [True])
    (options,) = [step.options for step in made.prepare if isinstance(step, AddNode)]
    assert (options["driver"], options["file"]["driver"]) == ("qcow2", "host_device")
    assert made.record.snapshot is not None
    assert made.record.snapshot.disks[0].block
    # What is taken as it is is not overwritten.
    assert made.notes == (() if there else ("/dev/o is a block device: what was on it is overwritten",))


def test_block_device_in_use() -> None:
    with pytest.raises(errors.ImageUnsuitable, match="vm2"):
        plan(vda("/dev/o"), facts=(fact("/dev/o", kind="block", size=GIB),), users={"/dev/o": "vm2's"})


# --- not remembered -------------------------------------------------------------------------------------------


def test_no_metadata_is_not_remembered_and_its_mirror_is_a_copy() -> None:
    made = plan(vda(mirror=MirrorWish(file="/m")), flags=SnapshotCreate.NO_METADATA)
    assert not made.record.metadata
    assert made.record.snapshot is not None  # for the answer
    (job,) = made.record.jobs
    assert (job.snapshot, job.type) == (None, "copy")
    assert made.notes == ("it is not remembered as a snapshot (NO_METADATA)",)
    assert plan(vda()).record.metadata


# --- without `transaction` ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transaction", "flags", "disks", "together"),
    [
        (True, 0, 2, True),
        (True, SnapshotCreate.ATOMIC, 2, True),
        (True, REUSE, 1, True),
        (False, 0, 1, False),
        (False, 0, 2, False),
        (False, SnapshotCreate.ATOMIC, 1, False),
        (False, SnapshotCreate.NO_METADATA, 2, False),
        (False, SnapshotCreate.ATOMIC, 2, None),
        (False, REUSE, 1, None),
        (False, REUSE, 2, None),
        (False, REUSE | SnapshotCreate.ATOMIC, 2, None),
    ],
)
def test_what_needs_a_transaction(transaction: bool, flags: int, disks: int, together: bool | None) -> None:
    seen = TWO if transaction else without_transaction(TWO)
    if together is None:
        with pytest.raises(errors.MissingCapability, match="transaction"):
            require_transaction("vm1", seen, SnapshotCreate(flags), disks)
    else:
        assert require_transaction("vm1", seen, SnapshotCreate(flags), disks) is together


def test_one_after_the_other() -> None:
    """Every image is made and opened before the first disk is switched."""
    seen = without_transaction(TWO)
    made = plan(vda(mirror=MirrorWish(file="/m")), seen=seen, only_these=False)
    images = [*[ClaimFile] * 3, *[CreateImage] * 3, *[AddNode] * 3]
    assert [type(step) for step in made.prepare] == [*images, FlushFiles, TakeSnapshots, TakeSnapshots, StartMirror]
    switches = [step for step in made.prepare if isinstance(step, TakeSnapshots)]
    assert [(step.together, step.text) for step in switches] == [
        (False, "switch to the overlays: vda"),
        (False, "switch to the overlays: vdb"),
    ]
    assert made.in_part
    assert not plan(vda(), seen=seen).in_part  # one disk switches or does not
    assert not plan(only_these=False).in_part


DISKS = ("vda", "vdb", "vdc")
THREE = without_transaction(observed(*(Plug(target) for target in DISKS)))


@given(st.sets(st.sampled_from(DISKS)), st.sampled_from(DISKS), st.booleans())
def test_of_a_part_the_disks_that_switched_keep_their_images_and_nothing_else_stays(
    switched: set[str], mirrored: str, block: bool
) -> None:
    disks = tuple(
        DiskWish(name=t, file=f"/new/{t}", mirror=MirrorWish(file="/new/m") if t == mirrored else None) for t in DISKS
    )
    facts = (fact("/new/vdb", kind="block", size=GIB),) if block else ()
    made = plan(*disks, seen=THREE, facts=facts)
    edges = {Edge(f"bfabcd-7-{target}-s", "backing", f"{target}-n") for target in switched}
    graph = msgspec.structs.replace(THREE.graph, edges=THREE.graph.edges | edges)
    part = in_part(made, msgspec.structs.replace(THREE, graph=graph))
    assert part.record.authoritative == {target: f"/new/{target}" for target in switched}
    assert (part.record.snapshot, part.record.jobs) == (None, ())
    kept = [step for index, step in enumerate(made.prepare) if index in part.keep]
    assert {step.node for step in kept if isinstance(step, AddNode)} == {f"bfabcd-7-{target}-s" for target in switched}
    assert {step.path for step in kept if isinstance(step, CreateImage)} == {f"/new/{t}" for t in switched}
    on_files = switched - {"vdb"} if block else switched
    assert {step.path for step in kept if isinstance(step, ClaimFile)} == {f"/new/{t}" for t in on_files}
    assert {p.target for step in kept if isinstance(step, TakeSnapshots) for p in step.pairs} == switched
    assert not [step for step in kept if isinstance(step, StartMirror)]


# --- one file twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["/new/m", "/new/./m", "/new/o"])
def test_mirror_that_backs_onto_a_file_that_is_made(backing: str) -> None:
    """Itself, or an overlay: a chain that comes back to itself, or that holds what the guest writes twice."""
    mirror = MirrorWish(file="/new/m", backing=backing, backing_format="qcow2")
    real = backing.replace("/./", "/")
    with pytest.raises(errors.DuplicateFile, match=backing):
        plan(DiskWish(name="vda", file="/new/o", mirror=mirror), facts=(fact(backing, real=real),))


def test_mirrors_may_share_a_base() -> None:
    disks = [
        DiskWish(
            name=target,
            file=f"/new/{target}",
            mirror=MirrorWish(file=f"/dst/{target}", backing="/dst/base", backing_format="raw"),
        )
        for target in ("vda", "vdb")
    ]
    assert len([step for step in plan(*disks).prepare if isinstance(step, StartMirror)]) == 2


def test_two_names_of_one_image() -> None:
    disks = [DiskWish(name=target, file=f"/new/{target}") for target in ("vda", "vdb")]
    facts = tuple(fact(f"/new/{target}", kind="file", identity="1:7") for target in ("vda", "vdb"))
    images = tuple(
        ImageFact(
            path=f"/new/{target}",
            format="qcow2",
            virtual_size=SIZE,
            backing=f"/img/{target}.img",
            real_backing=f"/img/{target}.img",
            backing_format=fmt,
        )
        for target, fmt in (("vda", "qcow2"), ("vdb", "raw"))
    )
    with pytest.raises(errors.DuplicateFile, match="/new/vdb"):
        plan(*disks, flags=REUSE, facts=facts, images=images)
