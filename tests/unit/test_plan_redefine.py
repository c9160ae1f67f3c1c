"""Snapshots from their dumps: ours give the same snapshot back, libvirt's are taken, and what contradicts is refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats_libvirt import LIBVIRT_9, LIBVIRT_11
from test_formats_snapshot import IDS, NAMES, PATHS, SNAPSHOT_DISKS, XML_TEXT
from test_plan_chain import snapshot

from blockferry import errors
from blockferry.formats.redefinition import parse_redefinition
from blockferry.formats.snapshot import snapshot_xml
from blockferry.model.files import Chains, ImageFact
from blockferry.model.snapshot import MirrorWish, RedefinedDisk, Redefinition, Snapshot, SnapshotDisk
from blockferry.plan.history import current_snapshot, descendants, in_order
from blockferry.plan.plan import Plan
from blockferry.plan.redefine import NO_UUID, plan_redefine, remembered, unknown_backings

IMAGES = "/var/lib/libvirt/images"
UUID = "6f0dd5b1-4f53-4a4e-93b7-7b2f0f4b7c11"


def chain(*files: str) -> tuple[ImageFact, ...]:
    return tuple(ImageFact(path=file, format="raw" if file.endswith(".raw") else "qcow2") for file in files)


def plan(wanted: Redefinition, *before: Snapshot, chains: Chains, **more: Any) -> Plan:
    values: dict[str, Any] = {"uuid": None, "headers": {}, "current": False, **more}
    return plan_redefine("vm1", wanted, before, chains=chains, **values)


def bare(name: str, *disks: tuple[str, str, str], parent: str | None = None, created: float = 1) -> Redefinition:
    """As `snapshot`, of test_plan_chain: (target, overlay, backing)."""
    return Redefinition(
        name=name,
        created=created,
        parent=parent,
        disks=tuple(
            RedefinedDisk(target=target, file=file, backing=backing, backing_format="qcow2")
            for target, file, backing in disks
        ),
    )


# --- dumps ----------------------------------------------------------------------------------------------------

TAKEN = st.builds(
    Snapshot,
    domain=st.just("vm1"),
    name=NAMES,
    created=st.integers(0, 4 * 10**15).map(lambda microseconds: microseconds / 1e6),
    state=st.sampled_from(["running", "paused", "io-error", "prelaunch", "shutoff", "disk-snapshot"]),
    disks=st.lists(
        SNAPSHOT_DISKS.map(
            lambda disk: msgspec.structs.replace(disk, mode=disk.mode if disk.mode != "absolute" else None)
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda disk: disk.target,
    ).map(tuple),
    reverted=st.dictionaries(IDS, st.lists(PATHS, min_size=1, max_size=2).map(tuple), max_size=2),
    description=st.none() | XML_TEXT.filter(bool),
)


@given(TAKEN, st.booleans())
def test_our_own_dump_gives_the_same_snapshot_back(taken: Snapshot, current: bool) -> None:
    """To the microsecond, with the run state and the images that it keeps, which libvirt has no element for."""
    wanted = parse_redefinition(snapshot_xml(taken, {}, current=current))
    chains: Chains = {disk.target: () for disk in taken.disks}
    assert unknown_backings(wanted, (), chains) == ()
    assert remembered(plan(wanted, chains=chains)) == taken


@pytest.mark.parametrize("xml", [LIBVIRT_9, LIBVIRT_11])
def test_a_dump_of_libvirts(xml: str) -> None:
    """What the snapshot keeps of vda its <domain> says, which is how the guest was before."""
    assert parse_redefinition(xml) == Redefinition(
        name="before-upgrade",
        description="a & b",
        created=1763856000,
        parent="1763800000",
        disks=(
            RedefinedDisk(
                target="vda", file=f"{IMAGES}/vm1.before-upgrade", backing=f"{IMAGES}/vm1.qcow2", backing_format="qcow2"
            ),
            RedefinedDisk(target="vdc", file="/dev/vg0/vm1-overlay", block=True),
        ),
        left_out=("vdb",),
        domain="vm1",
        uuid=UUID,
    )


def test_what_libvirt_does_not_say_is_seen_in_the_chain_and_then_in_the_header() -> None:
    wanted = parse_redefinition(LIBVIRT_9.replace("vm1.before-upgrade", "vm1.o"))
    wanted = msgspec.structs.replace(wanted, parent=None)
    (vda, vdc) = (f"{IMAGES}/vm1.o", f"{IMAGES}/vm1.qcow2"), ("/dev/vg0/vm1-overlay", "/dev/vg0/base.raw")
    chains = {"vda": chain(*vda), "vdb": (), "vdc": chain("/newer", *vdc)}
    assert unknown_backings(wanted, (), chains) == ()
    made = remembered(plan(wanted, chains=chains, uuid=UUID))
    assert [(disk.backing, disk.backing_format) for disk in made.disks] == [(vda[1], "qcow2"), (vdc[1], "raw")]
    assert (made.state, made.left_out) == ("disk-snapshot", ("vdb",))
    # The guest has left the overlay behind: only its header says.
    chains = {"vda": chain(*vda), "vdb": (), "vdc": chain("/another")}
    assert unknown_backings(wanted, (), chains) == (vdc[0],)
    head = ImageFact(path=vdc[0], format="qcow2", backing="/dev/vg0/base.raw", backing_format="raw")
    branch = plan(wanted, chains=chains, headers={vdc[0]: (head,)})
    assert remembered(branch).disks == made.disks
    assert branch.notes == (f"vdc: {vdc[0]} is not on another image in its chain now: it can't be merged",)
    for flaw in ({"problem": "No such file"}, {"backing": None}, {"backing_format": None}):
        with pytest.raises(errors.ImageUnsuitable, match="neither the XML nor vdc's chain says"):
            plan(wanted, chains=chains, headers={vdc[0]: (msgspec.structs.replace(head, **flaw),)})


def redefined(inner: str = "", disks: str = "<disk name='vda'><source file='/o'/></disk>") -> str:
    head = "<name>s</name><creationTime>7</creationTime><state>disk-snapshot</state>"
    return f"<domainsnapshot>{head}{inner}<disks>{disks}</disks></domainsnapshot>"


@pytest.mark.parametrize(
    ("said", "state"), [("disk-snapshot", None), ("shutoff", "shutoff"), ("running", "running"), ("paused", "paused")]
)
def test_states(said: str, state: str | None) -> None:
    """Of a guest that ran, only with the word that its memory is not in it."""
    xml = redefined("<memory snapshot='no'/>").replace("disk-snapshot", said)
    assert parse_redefinition(xml).state == state


def test_a_cookie_that_contradicts_the_whole_seconds_is_of_before_somebody_wrote_them() -> None:
    assert parse_redefinition(redefined("<cookie><blockferry created='7.25'/></cookie>")).created == 7.25
    again = parse_redefinition(redefined("<cookie><blockferry created='8.25'/><cpu mode='custom'/></cookie>"))
    assert (again.created, again.exact) == (7, False)


COOKIE = "<cookie><blockferry>{}</blockferry></cookie>"


@pytest.mark.parametrize(
    ("xml", "element", "reason"),
    [
        (redefined().replace("<creationTime>7</creationTime>", ""), "", "no <creationTime>"),
        (redefined().replace(">7<", ">7.5<"), "", "'7.5' is no number"),
        (redefined().replace(">7<", ">-7<"), "", "'-7' is no number"),
        (redefined().replace("<state>disk-snapshot</state>", ""), "", "no <state>"),
        (redefined().replace("disk-snapshot", "asleep"), "", "'asleep' is none of"),
        (redefined().replace("disk-snapshot", "running"), "", "a snapshot of the memory as well"),
        (redefined("<parent/>"), "/parent", "can't be the name"),
        (redefined("<parent><name>a/b</name></parent>"), "/parent", "can't be the name"),
        (redefined("<parent><name>a</name><x/></parent>"), "/parent", "<x>"),
        (redefined(disks=""), "", "no external disk"),
        (redefined(disks="<disk name='vda' snapshot='no'/>"), "", "no external disk"),
        (redefined(disks="<disk name='vda'/>"), "/disks/disk", "no <source>"),
        (redefined(disks="<disk name='vda'><source file='o'/></disk>"), "/disks/disk/source", "absolute"),
        (redefined(disks="<disk name='vda' snapshot='internal'/>"), "/disks/disk", "internal"),
        (redefined("<memory snapshot='internal'/>"), "/memory", "memory"),
        (redefined(COOKIE.replace("blockferry>", "blockferry x='1'>", 1)), "/cookie/blockferry", "'x'"),
        (redefined("<cookie><blockferry created='now'/></cookie>"), "/cookie/blockferry", "'now'"),
        (redefined("<cookie><blockferry state='a b'/></cookie>"), "/cookie/blockferry", "'a b'"),
        (redefined(COOKIE.format("<x/>")), "/cookie/blockferry", "<x>"),
        (
            redefined(COOKIE.format("<backing disk='vda' file='b' format='raw'/>")),
            "/cookie/blockferry/backing",
            "absol",
        ),
        (redefined(COOKIE.format("<backing disk='vda' file='/b'/>")), "/cookie/blockferry/backing", "no format"),
        (redefined(COOKIE.format("<reverted disk='vda' file='b'/>")), "/cookie/blockferry/reverted", "absolute"),
        (redefined(COOKIE.format("<reverted file='/b'/>")), "/cookie/blockferry/reverted", "no disk"),
        (redefined(COOKIE.format("<backing file='/b' format='raw'/>")), "/cookie/blockferry/backing", "no disk"),
    ],
)
def test_what_is_no_dump_of_a_snapshot(xml: str, element: str, reason: str) -> None:
    with pytest.raises(errors.InvalidXml) as caught:
        parse_redefinition(xml)
    assert caught.value.element == f"domainsnapshot{element}"
    assert reason in caught.value.reason


def test_a_mirror_and_an_export_are_kept() -> None:
    cookie = COOKIE.format("<backing disk='vda' file='nbd+unix:///e?socket=/s' format='raw'/>")
    inner = "<source file='/o'/><mirror file='/m' backing='/mb' backingFormat='raw' state='lost' ready='no'/>"
    (disk,) = parse_redefinition(redefined(cookie, f"<disk name='vda' mode='absolute'>{inner}</disk>")).disks
    mirror = MirrorWish(file="/m", backing="/mb", backing_format="raw")
    assert disk == RedefinedDisk(
        target="vda", file="/o", backing="nbd+unix:///e?socket=/s", backing_format="raw", mirror=mirror
    )


# --- what agrees with what is there ---------------------------------------------------------------------------

# s1 <- s2, and b beside s2; the guest is on s2's overlays.
TREE = (
    snapshot("s1", ("vda", "/one", "/base")),
    snapshot("s2", ("vda", "/two", "/one"), parent="s1"),
    snapshot("b", ("vda", "/other", "/one"), parent="s1"),
)
CHAINS = {"vda": chain("/two", "/one", "/base"), "vdb": chain("/vdb.raw")}


@pytest.mark.parametrize(
    ("wanted", "place", "reason"),
    [
        (bare("n", ("vda", "/o", "/b"), parent="n"), "parent", "can't be its own parent"),
        (bare("n", ("vda", "/o", "/b"), parent="x"), "parent", "vm1 has no snapshot 'x': redefine that one first"),
        (bare("s1", ("vda", "/one", "/base"), parent="s2"), "parent", "'s2' was taken on 's1' itself"),
        (bare("n", ("vdx", "/o", "/b")), "disks", "no disk 'vdx'; the domain has vda, vdb"),
        (bare("n", ("vdb", "/one", "/b")), "disks", "/one is in the chain of vda, and can't be vdb's"),
        (bare("s2", ("vda", "/two", "/else"), parent="s1"), "disks", "of other images (vda is /two on /one)"),
        (bare("s2", ("vda", "/else", "/one"), parent="s1"), "disks", "--metadata"),
        (bare("s2", ("vda", "/two", "/one"), ("vdb", "/o", "/vdb.raw"), parent="s1"), "disks", "of other images"),
    ],
)
def test_contradictions(wanted: Redefinition, place: str, reason: str) -> None:
    with pytest.raises(errors.InvalidXml) as caught:
        plan(wanted, *TREE, chains=CHAINS)
    assert caught.value.element == f"domainsnapshot/{place}"
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"name": None}, "name"),
        ({"domain": "vm2"}, "domain/name"),
        ({"uuid": UUID.replace("6f", "7f")}, "domain/uuid"),
        ({"left_out": ("vdx",)}, "disks"),
    ],
)
def test_of_another_domain(changes: dict[str, Any], place: str) -> None:
    wanted = msgspec.structs.replace(bare("n", ("vda", "/o", "/b")), **changes)
    with pytest.raises(errors.InvalidXml) as caught:
        plan(wanted, chains=CHAINS, uuid=UUID)
    assert caught.value.element == f"domainsnapshot/{place}"


@pytest.mark.parametrize("own", [UUID, UUID.upper(), NO_UUID, None])
def test_of_the_same_domain(own: str | None) -> None:
    """A guest that nobody gave a UUID can't contradict one."""
    wanted = msgspec.structs.replace(bare("n", ("vda", "/o", "/b")), uuid=UUID, domain="vm1")
    assert remembered(plan(wanted, chains=CHAINS, uuid=own)).name == "n"


def test_what_is_said_of_a_snapshot_can_change_and_the_rest_stays() -> None:
    """XML that is not ours says less: the exact time, the run state and the backing are kept."""
    exact = msgspec.structs.replace(TREE[2], created=1.75, state="paused")
    wanted = msgspec.structs.replace(bare("b", ("vda", "/other", "/one"), parent="s2"), description="new")
    bare_disk = msgspec.structs.replace(wanted.disks[0], backing=None, backing_format=None)
    wanted = msgspec.structs.replace(wanted, disks=(bare_disk,))
    assert unknown_backings(wanted, (*TREE[:2], exact), CHAINS) == ()
    made = plan(wanted, *TREE[:2], exact, chains=CHAINS)
    assert made.record.snapshot is None
    assert remembered(made) == msgspec.structs.replace(exact, parent="s2", description="new")
    with pytest.raises(errors.InvalidXml, match="was paused when 'b' was taken, and this says running"):
        plan(msgspec.structs.replace(wanted, state="running"), *TREE[:2], exact, chains=CHAINS)


def test_notes_on_images_that_are_not_as_they_were() -> None:
    """As after a rebase here: remembered, and the note says what will be refused."""
    made = plan(bare("n", ("vda", "/two", "/gone")), chains=CHAINS)
    assert made.notes == ("vda: /two backs onto /one now, not onto /gone: it can't be merged",)
    assert plan(bare("n", ("vda", "/two", "/one")), chains=CHAINS).notes == ()
    bottom = plan(bare("n", ("vda", "/base", "/lower")), chains=CHAINS)
    assert bottom.notes == ("vda: /base is not on another image in its chain now: it can't be merged",)


def test_current_is_seen_and_not_said() -> None:
    assert remembered(plan(bare("n", ("vda", "/two", "/one")), chains=CHAINS, current=True)).name == "n"
    for wanted, before, reason in [
        (bare("n", ("vda", "/one", "/base")), (), "vda is on /two, not on /one"),
        (bare("n", ("vda", "/two", "/one"), created=0), TREE, "the guest is on the images of s2 as well"),
    ]:
        with pytest.raises(errors.SnapshotNotCurrent, match=reason):
            plan(wanted, *before, chains=CHAINS, current=True)
    empty = {**CHAINS, "vda": ()}
    with pytest.raises(errors.SnapshotNotCurrent, match="disk vda is not there"):
        plan(bare("n", ("vda", "/two", "/one")), chains=empty, current=True)


# --- trees ----------------------------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> tuple[Snapshot, ...]:
    """Snapshots of one disk, each on one before it or on none, of hosts whose clocks disagree."""
    made: list[Snapshot] = []
    for number in range(draw(st.integers(1, 7))):
        parent = draw(st.none() | st.sampled_from(made)) if made else None
        below = parent.disks[0].file if parent is not None else "/base"
        disk = SnapshotDisk(target="vda", file=f"/o{number}", format="qcow2", backing=below, backing_format="qcow2")
        made.append(
            Snapshot(
                domain="vm1",
                name=draw(st.sampled_from("abcdefg")) + str(number),
                created=draw(st.integers(0, 3)) + draw(st.sampled_from([0.0, 0.25, 0.5])),
                state="running",
                disks=(disk,),
                parent=parent.name if parent is not None else None,
            )
        )
    return tuple(made)


def stored(snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """As the journal gives them."""
    return in_order(tuple(sorted(snapshots, key=lambda each: (each.created, each.name))))


@given(trees(), st.data())
def test_any_tree_moves(tree: tuple[Snapshot, ...], data: st.DataObject) -> None:
    """Dump by dump in the order of the list: the same list, the same current one, the same children."""
    here = stored(tree)
    top = data.draw(st.sampled_from(tree))
    files = [top.disks[0].file]
    while files[-1] != "/base":
        files.append(next(each.disks[0].backing for each in tree if each.disks[0].file == files[-1]))
    chains = {"vda": chain(*files)}
    there: tuple[Snapshot, ...] = ()
    for each in here:
        wanted = parse_redefinition(snapshot_xml(each, {}, current=False))
        there = stored((*there, remembered(plan(wanted, *there, chains=chains))))
    assert there == here
    assert current_snapshot(there, chains) == current_snapshot(here, chains) == top.name


@given(trees())
def test_each_comes_after_its_parent(tree: tuple[Snapshot, ...]) -> None:
    order = [each.name for each in stored(tree)]
    assert sorted(order) == sorted(each.name for each in tree)
    for each in tree:
        assert each.parent is None or order.index(each.parent) < order.index(each.name)
        below = {other.name for other in tree if _stands_on(other, each, tree)}
        assert {other.name for other in descendants(each.name, stored(tree))} == below


def _stands_on(one: Snapshot, other: Snapshot, tree: tuple[Snapshot, ...]) -> bool:
    parent = one.parent
    while parent is not None and parent != other.name:
        parent = next(each.parent for each in tree if each.name == parent)
    return parent is not None


def test_a_loop_in_an_old_journal_ends() -> None:
    loop = (snapshot("a", ("vda", "/a", "/b"), parent="b"), snapshot("b", ("vda", "/b", "/a"), parent="a"))
    assert {each.name for each in in_order(loop)} == {"a", "b"}
