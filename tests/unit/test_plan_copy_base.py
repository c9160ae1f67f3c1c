"""Copies onto a base, into images that are there, onto block devices; and what a copy takes up."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_snapshot import GIB, SIZE, Plug, fact, observed

from blockferry import errors
from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.domain import Observation
from blockferry.model.files import ExportFact, FileFact, ImageFact
from blockferry.model.flags import BlockCopy
from blockferry.model.request import StartCopy
from blockferry.plan.copy import close_job, plan_cancel, plan_copy
from blockferry.plan.destinations import Files
from blockferry.plan.files import ClaimFile, CreateImage
from blockferry.plan.plan import Names, Plan
from blockferry.plan.steps import AddNode, CancelJob, RemoveNode, RequireSize, StartMirror, StartStream

# vda: /top on /mid on /low.raw; vdb stands alone, raw.
SEEN = observed(Plug("vda", file="/top", below=(("/mid", SIZE), ("/low.raw", SIZE))), Plug("vdb", fmt="raw"))
TABLES = 5 * 65536  # what a small qcow2 takes beside its data


def plan(
    *,
    disk: str = "vda",
    dest: str = "/d",
    facts: dict[str, FileFact] | None = None,
    images: dict[str, tuple[ImageFact, ...]] | None = None,
    users: dict[str, str] | None = None,
    exports: tuple[ExportFact, ...] = (),
    seen: Observation = SEEN,
    **more: Any,
) -> Plan:
    known = {path: fact(path, kind="file") for path in ("/top", "/mid", "/low.raw", "/img/vdb.img")}
    files = Files(
        facts=known | {dest: fact(dest)} | (facts or {}),
        images=images or {},
        users=users or {},
        exports={export.uri: export for export in exports},
    )
    request = StartCopy(domain="vm1", disk=disk, dest=dest, **more)
    return plan_copy("vm1", seen, request, names=Names("abcd", 3), operation=3, files=files)


def created(made: Plan) -> CreateImage:
    (step,) = [step for step in made.prepare if isinstance(step, CreateImage)]
    return step


def top_node(made: Plan) -> dict[str, Any]:
    return next(step.options for step in made.prepare if isinstance(step, AddNode) and step.node.endswith("-x"))


# --- where the copy begins ------------------------------------------------------------------------------------


def test_without_a_base_it_is_whole() -> None:
    made = plan()
    start = made.prepare[-1]
    assert isinstance(start, StartMirror)
    assert (start.sync, created(made).backing, created(made).backing_format) == ("full", None, None)
    assert top_node(made)["backing"] is None
    (mirror,) = made.record.jobs
    assert isinstance(mirror, Mirror)
    assert mirror.backing is None


@pytest.mark.parametrize("asked", [{"base": "/mid"}, {"base": "/./mid"}, {"flags": int(BlockCopy.SHALLOW)}])
def test_onto_the_immediate_backing_only_the_active_layer_is_mirrored(asked: dict[str, Any]) -> None:
    made = plan(bandwidth=7, **asked)
    assert [type(step) for step in made.prepare] == [ClaimFile, CreateImage, AddNode, StartMirror]
    start = made.prepare[-1]
    assert isinstance(start, StartMirror)
    assert (start.sync, start.speed) == ("top", 7)
    assert (created(made).backing, created(made).backing_format) == ("/mid", "qcow2")
    assert top_node(made)["backing"] is None  # it is given before the switch
    (mirror,) = made.record.jobs
    assert isinstance(mirror, Mirror)
    assert (mirror.backing, mirror.backing_format) == ("/mid", "qcow2")


def test_onto_a_base_further_down_what_lies_between_comes_first() -> None:
    made = plan(base="/low.raw", bandwidth=7)
    assert [type(step) for step in made.prepare] == [ClaimFile, CreateImage, AddNode, StartStream]
    assert (created(made).backing, created(made).backing_format) == ("/low.raw", "raw")
    assert top_node(made)["backing"] == "vda-n1"  # while it is filled it stands on what the disk stands on
    stream = made.prepare[-1]
    assert isinstance(stream, StartStream)
    assert (stream.device, stream.base, stream.backing_file) == ("bfabcd-3-vda-x", "vda-n2", "/low.raw")
    assert (stream.job, stream.speed) == ("bfabcd-3-vda-f", 7)
    (job,) = made.record.jobs
    assert isinstance(job, ChainJob)
    assert (job.type, job.above, job.speed, job.leaving) == ("fill", "bfabcd-3-vda-x", 7, ())
    assert job.base == Layer(node="vda-n2", file="/low.raw", format="raw")
    assert job.then is not None
    assert (job.then.job, job.then.source, job.then.backing) == ("bfabcd-3-vda-m", "/top", "/low.raw")
    assert made.record.authoritative == {"vda": "/top"}


def test_shallow_of_a_disk_that_stands_alone_is_a_whole_copy() -> None:
    made = plan(disk="vdb", flags=int(BlockCopy.SHALLOW))
    start = made.prepare[-1]
    assert isinstance(start, StartMirror)
    assert start.sync == "full"


@pytest.mark.parametrize(
    ("more", "kind", "match"),
    [
        ({"base": "/else"}, errors.ImageUnsuitable, r"no image under vda's active one \(/low.raw <- /mid <- /top\)"),
        ({"base": "/top"}, errors.ImageUnsuitable, "no image under"),
        ({"base": "/d"}, errors.ImageUnsuitable, "no image under"),
        ({"base": "/mid", "flags": int(BlockCopy.SHALLOW)}, errors.BadRequest, "say one"),
        ({"base": "/mid", "format": "raw"}, errors.BadRequest, "raw image can't back onto"),
        ({"base": "/mid", "flags": int(BlockCopy.CREATE_RAW)}, errors.BadRequest, "raw image can't back onto"),
        ({"flags": int(BlockCopy.SHALLOW), "format": "raw"}, errors.BadRequest, "raw image can't back onto"),
        ({"base": "/mid", "dest": "nbd://h/x"}, errors.BadRequest, "raw image can't back onto"),
    ],
)
def test_base_that_won_t_do(more: dict[str, Any], kind: type[errors.Refused], match: str) -> None:
    with pytest.raises(kind, match=match):
        plan(**more)


@pytest.mark.parametrize("base", [None, "/mid", "/low.raw"])
def test_every_step_but_the_images_content_is_undone(base: str | None) -> None:
    for step in plan(base=base).prepare:
        assert isinstance(step, CreateImage) != bool(step.undo())


def test_a_header_that_is_too_short_for_the_base() -> None:
    long = "/" + "/".join(["d" * 200] * 6)
    seen = observed(Plug("vda", file="/top", below=((long, SIZE),)))
    with pytest.raises(errors.DestinationUnusable, match="1023 bytes"):
        plan(seen=seen, base=long, facts={long: fact(long, kind="file")})


# --- images that are there ------------------------------------------------------------------------------------

REUSE = int(BlockCopy.REUSE_EXT)
THERE = {"/d": fact("/d", kind="file", allocated=TABLES)}


def header(**more: Any) -> dict[str, tuple[ImageFact, ...]]:
    if "backing" in more:
        more = {"backing_format": "qcow2", "real_backing": more["backing"], **more}
    return {"/d": (ImageFact(**{"path": "/d", "format": "qcow2", "virtual_size": SIZE, **more}),)}


def test_existing_image_is_taken_as_it_is() -> None:
    made = plan(flags=REUSE, facts=THERE, images=header())
    assert [type(step) for step in made.prepare] == [AddNode, StartMirror]
    alone = plan(disk="vdb", flags=REUSE, facts=THERE, images=header(format="raw"))
    assert [type(step) for step in alone.prepare] == [AddNode, StartMirror]


@pytest.mark.parametrize("asked", [{"base": "/mid"}, {"flags": REUSE | BlockCopy.SHALLOW}])
def test_existing_image_on_the_base_shares_it(asked: dict[str, Any]) -> None:
    """Also where its header calls the base by another name of the same file."""
    images = header(backing="/link", real_backing="/mid")
    (mirror,) = plan(**{"flags": REUSE, "facts": THERE, "images": images, **asked}).record.jobs
    assert isinstance(mirror, Mirror)
    assert (mirror.backing, mirror.backing_format) == ("/mid", "qcow2")


def test_existing_image_on_a_chain_of_its_own_keeps_it() -> None:
    made = plan(base="/mid", flags=REUSE, facts=THERE, images=header(backing="/own", backing_format="raw"))
    (mirror,) = made.record.jobs
    assert isinstance(mirror, Mirror)
    assert (mirror.backing, mirror.backing_format) == ("/own", "raw")
    deep = plan(base="/low.raw", flags=REUSE, facts=THERE, images=header(backing="/own", backing_format="raw"))
    stream = deep.prepare[-1]
    assert isinstance(stream, StartStream)
    assert (stream.base, stream.backing_file) == ("vda-n2", "/own")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"images": {}}, "not looked at"),
        ({"images": header(problem="it is no qcow2")}, "it is no qcow2"),
        ({"images": header(virtual_size=SIZE - 1)}, f"{SIZE - 1} bytes, and the disk's is {SIZE}"),
        ({"images": header(virtual_size=SIZE + 1)}, f"{SIZE + 1} bytes"),
        ({"images": header(backing="/mid")}, "a whole copy stands alone"),
        ({"base": "/mid", "images": header()}, "no backing file, and the copy is to back onto /mid"),
        ({"base": "/mid", "images": header(backing="/mid", backing_format=None)}, "names no format .* never probed"),
        ({"images": header(), "facts": {"/d": fact("/d")}}, "does not exist"),
        ({"images": header(), "facts": {"/d": fact("/d", kind="directory")}}, "directory"),
        ({"images": header(), "facts": {"/d": fact("/d", kind="other")}}, "neither a file"),
        ({"images": header(), "facts": {"/d": fact("/d", kind="file", used=True)}}, "holds a lock"),
        ({"images": header(), "users": {"/d": "it is in the chain of vm2's vda"}}, "in the chain of vm2's vda"),
    ],
)
def test_existing_image_that_won_t_do(more: dict[str, Any], match: str) -> None:
    with pytest.raises(errors.ImageUnsuitable, match=match):
        plan(**{"flags": REUSE, "facts": THERE, **more})


@pytest.mark.parametrize("real", ["/top", "/mid", "/low.raw"])
@pytest.mark.parametrize("flags", [0, REUSE])
def test_the_disks_own_chain_is_no_destination(real: str, flags: int) -> None:
    """Under whichever name."""
    with pytest.raises(errors.DestinationUnusable, match="in the chain of vda"):
        plan(flags=flags, facts={"/d": fact("/d", kind="file", real=real)}, images=header())


def test_users_are_known_by_the_real_name() -> None:
    link = {"/d": fact("/d", kind="block", real="/dev/dm-0", size=GIB)}
    with pytest.raises(errors.ImageUnsuitable, match="vm2"):
        plan(facts=link, users={"/dev/dm-0": "vm2's"})


@pytest.mark.parametrize("flags", [0, REUSE])
def test_the_disks_own_chain_is_no_destination_through_a_hard_link(flags: int) -> None:
    facts = {"/mid": fact("/mid", kind="file", identity="1:7"), "/d": fact("/d", kind="file", identity="1:7")}
    with pytest.raises(errors.DestinationUnusable, match="in the chain of vda"):
        plan(flags=flags, facts=facts, images=header())


def test_users_are_known_by_the_file_itself() -> None:
    """A hard link has another name, and what a device node's name says means nothing."""
    for kind, identity in (("file", "1:7"), ("block", "device 1")):
        link = {"/d": fact("/d", kind=kind, identity=identity, size=GIB)}
        with pytest.raises(errors.ImageUnsuitable, match="vm2"):
            plan(flags=REUSE, facts=link, images=header(), users={identity: "vm2's"})


def test_files_without_an_identity_are_not_one() -> None:
    """Two that are not there yet."""
    assert not fact("/a").is_same(fact("/b"))
    assert fact("/a").is_same(fact("/b", real="/a"))


def test_existing_image_that_can_t_be_written_to() -> None:
    there = {"/d": fact("/d", kind="file", problem="Read-only file system")}
    with pytest.raises(errors.ImageUnsuitable, match="Read-only file system"):
        plan(flags=REUSE, facts=there, images=header())


@pytest.mark.parametrize(
    ("export", "match"),
    [
        (ExportFact(uri="nbd://h/x", problem="its server has no export 'x'"), "no export 'x'"),
        (ExportFact(uri="nbd://h/x", size=SIZE - 512), f"{SIZE - 512} bytes, and the disk has {SIZE}"),
        (ExportFact(uri="nbd://h/x", size=SIZE + 512), f"{SIZE + 512} bytes, and the disk has {SIZE}"),
    ],
)
def test_export_that_won_t_do(export: ExportFact, match: str) -> None:
    with pytest.raises(errors.DestinationUnusable, match=match):
        plan(dest="nbd://h/x", exports=(export,))


@pytest.mark.parametrize("size", [None, SIZE])
def test_export_that_does_or_does_not_say(size: int | None) -> None:
    """Its size is looked at again in QEMU's node."""
    made = plan(dest="nbd://h/x", exports=(ExportFact(uri="nbd://h/x", size=size),))
    assert any(isinstance(step, RequireSize) for step in made.prepare)


def test_export_in_use() -> None:
    uri = "nbd://h/x"
    with pytest.raises(errors.ImageUnsuitable, match="vm2's"):
        plan(dest=uri, users={uri: "vm2's"})
    assert any(isinstance(step, RequireSize) for step in plan(dest=uri, users={"nbd://h/y": "vm2's"}).prepare)


# --- block devices --------------------------------------------------------------------------------------------


def device(size: int) -> dict[str, FileFact]:
    return {"/d": fact("/d", kind="block", size=size, free=0)}


def test_raw_onto_a_device_of_its_size() -> None:
    made = plan(disk="vdb", facts=device(SIZE))
    assert [type(step) for step in made.prepare] == [AddNode, StartMirror]
    assert next(step for step in made.prepare if isinstance(step, AddNode)).options["file"]["driver"] == "host_device"
    assert made.notes == ("/d is a block device: what was on it is overwritten",)


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512])
@pytest.mark.parametrize("flags", [0, REUSE])
def test_raw_onto_a_device_of_another_size(size: int, flags: int) -> None:
    """The guest's disk would have another size after the pivot."""
    with pytest.raises(errors.DestinationUnusable, match=f"{size} bytes, and the disk has {SIZE}"):
        plan(disk="vdb", flags=flags, facts=device(size), images=header(format="raw"))


def test_qcow2_onto_a_device_is_written_over_it() -> None:
    made = plan(base="/mid", facts=device(GIB))
    assert [type(step) for step in made.prepare] == [CreateImage, AddNode, StartMirror]
    assert created(made).overwrites
    assert created(made).text == f"overwrite /d with an empty qcow2 image of {SIZE} bytes"
    assert made.notes == ("/d is a block device: what was on it is overwritten",)
    kept = plan(base="/mid", flags=REUSE, facts=device(GIB), images=header(backing="/mid"))
    assert not [step for step in kept.prepare if isinstance(step, CreateImage)]


# --- options --------------------------------------------------------------------------------------------------

BUFFER = {"buf-size": 4 << 20}


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, BUFFER),
        ({"granularity": 512}, {**BUFFER, "granularity": 512}),
        ({"granularity": 64 << 20, "buf_size": 1}, {"granularity": 64 << 20, "buf-size": 1}),
        ({"flags": int(BlockCopy.SYNCHRONOUS_WRITES)}, {**BUFFER, "copy-mode": "write-blocking"}),
        ({"flags": int(BlockCopy.TRANSIENT_JOB)}, BUFFER),
    ],
)
@pytest.mark.parametrize("base", [None, "/mid", "/low.raw"])
def test_options_of_the_mirror(asked: dict[str, Any], options: dict[str, Any], base: str | None) -> None:
    """Those of a mirror that begins after a fill are kept with it."""
    made = plan(base=base, **asked)
    (job,) = made.record.jobs
    mirror = job if isinstance(job, Mirror) else job.then
    assert mirror is not None
    assert mirror.options == options
    assert StartMirror.of(mirror, "top").options == options


@pytest.mark.parametrize("size", [0, -512, 256, 513, 128 << 20])
def test_granularity_that_qemu_refuses(size: int) -> None:
    with pytest.raises(errors.BadRequest, match="power of two"):
        plan(granularity=size)


# --- room -----------------------------------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(0, 2 * SIZE)] * 3),
    st.sampled_from([None, "/mid", "/low.raw"]),
    st.sampled_from(["qcow2", "raw"]),
    st.integers(0, SIZE),
)
def test_room_is_for_what_the_copied_layers_take_up_to_the_byte(
    allocated: tuple[int, int, int], base: str | None, fmt: str, there: int
) -> None:
    """Holes take none, layers under the base neither, and what an existing file takes up already is written over."""
    if fmt == "raw" and base is not None:
        return
    layers = dict(zip(("/top", "/mid", "/low.raw"), allocated, strict=True))
    copied = [*layers][: [*layers].index(base)] if base else [*layers]
    needed = min(SIZE, sum(layers[path] for path in copied))
    if fmt == "qcow2":
        needed += needed // 8192 + needed // 32768 + TABLES
    facts = {path: fact(path, kind="file", allocated=size) for path, size in layers.items()}
    images = header(format=fmt) if base is None else header(backing=base)
    asked: dict[str, Any] = {"base": base, "format": fmt}

    def room(free: int, allocated: int = 0) -> None:
        kind = "file" if allocated else "absent"
        flags = REUSE if allocated else 0
        known = facts | {"/d": fact("/d", kind=kind, free=free, allocated=allocated)}
        plan(facts=known, images=images, flags=flags, **asked)

    room(needed)
    room(max(0, needed - there), there)
    if needed:
        with pytest.raises(errors.NoRoom):
            room(needed - 1)
    if there and needed > there:
        with pytest.raises(errors.NoRoom):
            room(needed - there - 1, there)


def test_room_on_a_device_is_its_size() -> None:
    plan(facts=device(TABLES))
    with pytest.raises(errors.NoRoom):
        plan(facts=device(TABLES - 1))


# --- ends -----------------------------------------------------------------------------------------------------


def test_cancel_of_a_fill_closes_the_destination_too() -> None:
    (fill,) = plan(base="/low.raw").record.jobs
    steps = close_job(fill)
    assert steps == (CancelJob(job="bfabcd-3-vda-f"), RemoveNode(node="bfabcd-3-vda-x"))
    made = plan_cancel((fill,), "cancel", "cancelled")
    assert (made.settle, made.record.ended) == (steps, {"vda": "cancelled"})
    assert made.text == "cancel the fill of vda"


def test_cancel_of_a_commit_closes_nothing() -> None:
    (fill,) = plan(base="/low.raw").record.jobs
    assert isinstance(fill, ChainJob)
    assert close_job(msgspec.structs.replace(fill, type="rebase", then=None)) == (CancelJob(job=fill.job),)


# --- filters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filter_", "version", "device"),
    [
        ("throttle", "10.0.8", "vda-flt"),
        ("throttle", "11.0.0", "vda-flt"),
        ("throttle", "7.2.22", None),
        ("throttle", "9.2.0", None),
        ("copy-on-read", "7.2.22", "vda-flt"),
    ],
)
def test_a_filter_on_top_stays_or_the_copy_is_refused(filter_: str, version: str, device: str | None) -> None:
    seen = observed(Plug("vda", file="/top", filter=filter_))
    seen = msgspec.structs.replace(seen, capabilities=msgspec.structs.replace(seen.capabilities, version=version))
    if device is None:
        with pytest.raises(errors.DiskUnsuitable, match=f"QEMU {version} may hang"):
            plan(seen=seen)
        return
    start = plan(seen=seen).prepare[-1]
    assert isinstance(start, StartMirror)
    assert (start.device, start.replaces) == (device, "vda-n")
