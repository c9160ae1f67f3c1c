"""What is remembered of snapshots while their overlays are merged, beside files that are really merged."""

import itertools
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan_chain import snapshot
from test_plan_snapshot import SIZE, Plug, observed

from blockferry import errors
from blockferry.model.blockjob import ChainJob, Layer
from blockferry.model.domain import Observation
from blockferry.model.snapshot import Snapshot
from blockferry.plan.chain import plan_end, plan_merge
from blockferry.plan.files import DropFile
from blockferry.plan.history import after_commit, after_forgetting, children, descendants
from blockferry.plan.plan import Names, Record

NAMES = ("s1", "s2", "s3", "s4")
BOTH = ("vda", "vdb")


@dataclass
class World:
    """A guest's files: the chain of each disk from the bottom up, and of each file what was written to it."""

    chains: dict[str, list[str]]
    content: dict[str, dict[int, str]]
    snapshots: tuple[Snapshot, ...] = ()
    kept: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)  # what a snapshot is to keep of a disk
    parents: dict[str, str | None] = field(default_factory=dict)

    def read(self, target: str, upto: str | None = None) -> dict[int, str]:
        chain = self.chains[target]
        found: dict[int, str] = {}
        for file in chain[: chain.index(upto) + 1] if upto else chain:
            found |= self.content[file]
        return found

    def write(self, target: str, cluster: int, what: str) -> None:
        self.content[self.chains[target][-1]][cluster] = what

    def take(self, name: str, targets: tuple[str, ...]) -> None:
        disks = []
        for target in targets:
            self.kept[name, target] = self.read(target)
            overlay = f"/{target}.{name}"
            disks.append((target, overlay, self.chains[target][-1]))
            self.chains[target].append(overlay)
            self.content[overlay] = {}
        parent = self.snapshots[-1].name if self.snapshots else None
        self.parents[name] = parent
        self.snapshots += (snapshot(name, *disks, parent=parent),)

    def seen(self) -> Observation:
        return observed(
            *(
                Plug(target, file=chain[-1], below=tuple((file, SIZE) for file in reversed(chain[:-1])))
                for target, chain in self.chains.items()
            )
        )

    def end(self, job: ChainJob) -> None:
        """Plan what follows, then do what QEMU does and what the record and the settling say."""
        plan = plan_end(self.seen(), job, self.snapshots)
        assert job.base is not None
        chain = self.chains[job.target]
        for layer in reversed(job.leaving):
            self.content[job.base.file] |= self.content[layer.file]
            chain.remove(layer.file)
        dropped = [step.path for step in plan.settle if isinstance(step, DropFile)]
        assert dropped == [layer.file for layer in job.leaving]
        for path in dropped:
            del self.content[path]
        assert plan.record.authoritative == {job.target: chain[-1]}
        self.apply(plan.record)

    def apply(self, record: Record) -> None:
        assert not {each.name for each in record.changed} & set(record.forget)
        changed = {each.name: each for each in record.changed}
        kept = (each for each in self.snapshots if each.name not in record.forget)
        self.snapshots = tuple(changed.get(each.name, each) for each in kept)

    def delete(self, name: str, **how: bool) -> tuple[str, ...]:
        """Merge it, job by job; the names that the plan deletes."""
        doomed = next(each for each in self.snapshots if each.name == name)
        plan = plan_merge("vm1", self.seen(), doomed, self.snapshots, names=Names("abcd", 1), operation=1, **how)
        names: tuple[str, ...] = ()
        for job in plan.record.jobs:
            assert isinstance(job, ChainJob)
            names = job.deletes
            self.end(job)
            self.check()
        return names

    def forget(self, name: str) -> None:
        """Its metadata alone."""
        forgotten = next(each for each in self.snapshots if each.name == name)
        self.apply(Record(forget=(name,), changed=after_forgetting(forgotten, self.snapshots)))

    def check(self) -> None:
        """Every snapshot names images that are in the chain, one on the other, that hold what it is to keep."""
        names = {each.name for each in self.snapshots}
        for each in self.snapshots:
            parent = self.parents[each.name]
            while parent is not None and parent not in names:
                parent = self.parents[parent]
            assert each.parent == parent
            assert each.disks
            for disk in each.disks:
                chain = self.chains[disk.target]
                assert chain[chain.index(disk.file) - 1 : chain.index(disk.file)] == [disk.backing]
                assert self.read(disk.target, disk.backing) == self.kept[each.name, disk.target]


def world(*taken: tuple[str, ...]) -> World:
    """A snapshot of these disks, then a write to a cluster of its own and to one that all write to; and so on."""
    made = World(
        chains={target: [f"/{target}.base"] for target in BOTH},
        content={f"/{target}.base": {0: "base", 99: "base"} for target in BOTH},
    )
    for index, targets in enumerate(taken):
        made.take(NAMES[index], targets)
        for target in BOTH:
            made.write(target, index + 1, f"after {NAMES[index]}")
            made.write(target, 99, f"after {NAMES[index]}")
    made.check()
    return made


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="".join)
def test_in_every_order_of_deleting(order: tuple[str, ...]) -> None:
    """What is left names images that exist and hold what they are to; the guest's data is never another."""
    guest = world(*[BOTH] * 4)
    before = {target: guest.read(target) for target in BOTH}
    for index, name in enumerate(order):
        assert guest.delete(name) == (name,)
        assert {each.name for each in guest.snapshots} == set(order[index + 1 :])
        assert {target: guest.read(target) for target in BOTH} == before
    assert guest.chains == {target: [f"/{target}.base"] for target in BOTH}
    assert set(guest.content) == {"/vda.base", "/vdb.base"}


takes = st.lists(st.sampled_from([BOTH, ("vda",), ("vdb",)]), min_size=4, max_size=4)
ways = st.sampled_from(["delete", "children", "only_children", "forget", "write"])


@given(takes, st.lists(st.tuples(st.sampled_from(NAMES), ways), max_size=8))
def test_property_of_any_snapshots_deleted_and_forgotten_in_any_way(
    taken: list[tuple[str, ...]], done: list[tuple[str, str]]
) -> None:
    """Also of some disks only, and while the guest writes on."""
    guest = world(*taken)
    for number, (name, how) in enumerate(done):
        if how == "write":
            for target in BOTH:
                guest.write(target, 100 + number, "later")
            continue
        if name not in {each.name for each in guest.snapshots}:
            continue
        before = {target: guest.read(target) for target in BOTH}
        names = {each.name for each in guest.snapshots}
        below = {each.name for each in descendants(name, guest.snapshots)}
        gone: set[str] = set()
        try:
            if how == "forget":
                guest.forget(name)
                gone = {name}
            elif how == "delete":
                gone = {*guest.delete(name)}
            else:
                gone = {*guest.delete(name, **{how: True})}
                assert gone == below | ({name} if how == "children" else set())
        except errors.SnapshotNotMergeable:
            # Without children, or with an overlay between that a forgotten snapshot has left.
            gone = set()
        guest.check()
        assert {each.name for each in guest.snapshots} == names - gone
        assert {target: guest.read(target) for target in BOTH} == before


# --- by hand --------------------------------------------------------------------------------------------------

# s1 <- s2 <- s3, and s2b beside s2.
TREE = (
    snapshot("s1", ("vda", "/one", "/base")),
    snapshot("s2", ("vda", "/two", "/one"), parent="s1"),
    snapshot("s2b", ("vda", "/other", "/one"), parent="s1"),
    snapshot("s3", ("vda", "/three", "/two"), parent="s2"),
)


@pytest.mark.parametrize(
    ("name", "direct", "all_"),
    [
        ("s1", ("s2", "s2b"), ("s2", "s2b", "s3")),
        ("s2", ("s3",), ("s3",)),
        ("s2b", (), ()),
        ("s3", (), ()),
        ("no such", (), ()),
    ],
)
def test_children_and_descendants(name: str, direct: tuple[str, ...], all_: tuple[str, ...]) -> None:
    assert children(name, TREE) == direct
    assert tuple(each.name for each in descendants(name, TREE)) == all_


def test_forgetting_leaves_images_as_they_are() -> None:
    changed = after_forgetting(TREE[1], TREE)
    assert changed == (msgspec.structs.replace(TREE[3], parent="s1"),)
    assert {each.name: each.parent for each in after_forgetting(TREE[0], TREE)} == {"s2": None, "s2b": None}
    assert after_forgetting(TREE[3], TREE) == ()


def job(base: str | None, *leaving: str, target: str = "vda") -> ChainJob:
    layers = tuple(Layer(node=f"n{file}", file=file, format="qcow2") for file in leaving)
    return ChainJob(
        domain="vm1",
        target=target,
        operation=1,
        job="c",
        type="commit",
        top=layers[0],
        base=Layer(node="b", file=base, format="raw") if base else None,
        leaving=layers,
    )


def test_merged_image_of_a_branch_that_the_guest_has_left() -> None:
    """The header of /other still names /one, which nothing holds in place any more: only /two is put onto /base."""
    changed, gone = after_commit(TREE, job("/base", "/one"), above="/two")
    assert gone == ("s1", "s2b")
    (s2,) = changed
    assert (s2.parent, s2.disks[0].backing, s2.disks[0].backing_format) == (None, "/base", "raw")


def test_written_base_of_a_branch() -> None:
    """What s2b kept of /one is written over by what comes from above."""
    changed, gone = after_commit(TREE, job("/one", "/two"), above="/three")
    assert gone == ("s2", "s2b")
    (s3,) = changed
    assert (s3.parent, s3.disks[0].backing) == ("s1", "/one")


def test_merge_of_all_into_the_bottom() -> None:
    assert after_commit(TREE, job("/base", "/three", "/two", "/one"), above=None) == ((), ("s1", "s2", "s2b", "s3"))


def test_other_disks_keep_what_they_have() -> None:
    assert after_commit(TREE, job("/base", "/one", target="vdb"), above="/two") == ((), ())
    assert after_commit(TREE, job(None, "/one"), above="/two") == ((), ())
