"""Which steps are under way at the same time."""

from blockferry.plan.files import ClaimFile, CreateImage, FlushFiles, SyncFiles
from blockferry.plan.steps import AddNode, StartMirror, Step, Stop, TakeSnapshots
from blockferry.plan.tracking import AddBitmap
from blockferry.plan.waves import waves

CLAIMS = tuple(ClaimFile(path=f"/{name}") for name in "abc")
IMAGES = tuple(CreateImage(path=f"/{name}", format="raw", size=1) for name in "abc")
SNAPSHOTS = TakeSnapshots(pairs=())


def node(name: str, backing: str | None = None) -> AddNode:
    return AddNode(node=name, options={"driver": "qcow2", "backing": backing})


def mirror(target: str) -> StartMirror:
    return StartMirror(target=target, job=target, device="d", node="n", filter_node="f", sync="top")


def sizes(*prepare: Step) -> list[int]:
    return [len(wave) for wave in waves(prepare)]


def test_neighbours_of_one_verb() -> None:
    assert sizes(*CLAIMS, *IMAGES, node("a"), node("b"), SNAPSHOTS, mirror("a"), mirror("b")) == [3, 3, 2, 1, 2]
    assert sizes(CLAIMS[0], IMAGES[0], CLAIMS[1], IMAGES[1]) == [1, 1, 1, 1]
    assert sizes() == []


def test_what_affects_the_guest_is_alone() -> None:
    assert sizes(SNAPSHOTS, SNAPSHOTS) == [1, 1]
    assert sizes(Stop(), Stop()) == [1, 1]
    assert sizes(SyncFiles(paths=()), SyncFiles(paths=())) == [1, 1]


def test_a_node_waits_for_the_one_that_it_stands_on() -> None:
    assert sizes(node("low"), node("other"), node("mid", "low"), node("top", "mid")) == [2, 1, 1]
    assert sizes(node("one", "there"), node("two", "there")) == [2]


def test_a_bitmap_of_a_disk_is_added_while_destinations_are_opened() -> None:
    def bitmap(name: str) -> AddBitmap:
        return AddBitmap(node=name, bitmap="b")

    assert sizes(node("copy"), bitmap("disk"), mirror("a")) == [2, 1]
    assert sizes(node("copy"), bitmap("one"), bitmap("two")) == [3]
    assert sizes(bitmap("disk"), node("copy")) == [1, 1]
    assert sizes(CLAIMS[0], bitmap("disk")) == [1, 1]
    assert sizes(node("copy"), bitmap("copy"), bitmap("other")) == [1, 2], "its own node has to be open"
    assert sizes(node("copy"), bitmap("disk"), bitmap("copy")) == [2, 1]


def test_files_are_written_out_while_overlays_are_opened() -> None:
    sync = FlushFiles(paths=("/disk",))
    assert sizes(IMAGES[0], node("one"), node("two"), sync, SNAPSHOTS) == [1, 3, 1]
    assert sizes(node("one"), sync, node("two")) == [2, 1], "whoever comes after it waits for it"
    assert sizes(node("one"), SyncFiles(paths=("/disk",))) == [1, 1]
    assert sizes(SNAPSHOTS, sync) == [1, 1]


def test_every_step_is_there_once_and_in_its_order() -> None:
    prepare = (*CLAIMS, *IMAGES, node("low"), node("top", "low"), SNAPSHOTS)
    assert [pair for wave in waves(prepare) for pair in wave] == list(enumerate(prepare))
