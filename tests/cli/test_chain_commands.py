"""The command and backing chains, on a real QEMU: snapshot trees, merges, rebase, commit, copies onto a base."""

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commandkit import MIB, Command, stop

from blockferry.model.view import View
from blockferry.testing import (
    QemuBinaries,
    TestQemu,
    blockdev_disk,
    find_qemu,
    make_image,
    raw_contents,
    write_pattern,
)

SIZE = 16 * MIB
FILLED = range(6, 14)
SLOW = "512K"  # a disk that is filled is not done with before somebody says so


@dataclass
class Guest:
    """A guest whose vda backs onto golden.qcow2 (1 MiB of 0x11; 0x22 above it) and whose vdb is raw."""

    command: Command
    qemu: TestQemu
    binaries: QemuBinaries
    folder: Path

    async def __call__(self, line: str, **options: Any) -> str:
        """Run the command as a person does, with {} for the folder of the images; what it said, without folders."""
        result = await self.command(*line.replace("{}", str(self.folder)).split(), **options)
        return (result.stdout + result.stderr).replace(f"{self.folder}/", "")

    async def chain(self, target: str = "vda") -> list[str]:
        """The names of the disk's images, active first."""
        disks = (await self.command.json("show", "vm1"))["disks"]
        (found,) = [each for each in disks if each["target"] == target]
        return [Path(image["file"]).name for image in found["chain"]]

    async def write(self, byte: int, mib: int, device: str = "d0-dev") -> None:
        """Fill a MiB of a disk through its device."""
        line = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write -q -P {byte} {mib}M 1M"'
        assert await self.qemu.command("human-monitor-command", {"command-line": line}) == ""

    async def layers(self, *names: str) -> None:
        """Snapshots of both disks, each followed by a MiB written to vda: 0x40 at 4 MiB after the first and so on."""
        for number, name in enumerate(names):
            await self(f"snapshot create vm1 {name} --atomic")
            await self.write(0x40 + number, 4 + number)

    async def fill(self) -> None:
        """Fill vda's MiBs 6 to 13 with 0x55."""
        for mib in FILLED:
            await self.write(0x55, mib)

    async def holds(self, name: str, **mibs: int) -> None:
        """The image holds these bytes (m3=0x22) and nothing else, when QEMU has ended."""
        await self.qemu.stop()
        expected = bytearray(SIZE)
        for mib, byte in mibs.items():
            first = int(mib.removeprefix("m")) * MIB
            expected[first : first + MIB] = bytes([byte]) * MIB
        with raw_contents(self.binaries, self.folder / name, "qcow2") as raw:
            assert raw.read_bytes() == bytes(expected)

    async def ended(self, target: str) -> dict[str, Any]:
        """Wait for a job without the command's help."""
        async with asyncio.timeout(30):
            while True:
                jobs = (await self.command.json("job", "list", "vm1"))["jobs"]
                (job,) = [each for each in jobs if each["disk"] == target]
                if job["state"] not in ("running", "copying"):
                    return job  # type: ignore[no-any-return]


@pytest.fixture
async def vm(command: Command, tmp_path: Path) -> AsyncIterator[Guest]:
    qemu = find_qemu("distribution")
    golden = make_image(qemu, tmp_path / "golden.qcow2", "qcow2", SIZE)
    write_pattern(qemu, golden, "qcow2", 0, MIB, 0x11)
    first = make_image(qemu, tmp_path / "vda.qcow2", "qcow2", backing=golden, backing_fmt="qcow2")
    write_pattern(qemu, first, "qcow2", MIB, MIB, 0x22)
    second = make_image(qemu, tmp_path / "vdb.img", "raw", SIZE)
    disks = [*blockdev_disk("d0", first, "qcow2"), *blockdev_disk("d1", second, "raw")]
    async with TestQemu(qemu, tmp_path, args=disks, paused=False) as running:
        await command("attach", "vm1", "--qmp", str(running.qmp))
        yield Guest(command=command, qemu=running, binaries=qemu, folder=tmp_path)


# --- snapshots ------------------------------------------------------------------------------------------------


async def test_snapshots_are_listed_as_a_tree(vm: Guest) -> None:
    await vm.layers("before", "upgrade")
    await vm("snapshot create vm1 test --disk vda")
    heading, *rows = (await vm("snapshot list vm1")).splitlines()
    assert heading.split() == ["NAME", "CREATED", "STATE", "DISKS", "MIRRORS", "PARENT"]
    assert [row[:13].rstrip() for row in rows] == ["  before", "  └─ upgrade", "*    └─ test"]
    assert [row.split()[-1] for row in rows] == ["-", "before", "upgrade"]
    assert "after snapshot before\nbefore snapshot test\n" in await vm("snapshot show vm1 upgrade")


async def test_delete_merges_and_removes_the_files(vm: Guest) -> None:
    await vm.layers("before", "upgrade")
    await vm("snapshot create vm1 test --disk vda")
    planned = await vm("snapshot delete vm1 upgrade --dry-run")
    assert "nothing has been done" in planned
    assert "note: removed once they are merged: vda.upgrade, vdb.upgrade" in planned
    said = await vm("snapshot delete vm1 upgrade")
    assert said == "snapshot upgrade is deleted; merged down and removed: vda.upgrade, vdb.upgrade (operation 4)\n"
    assert not list(vm.folder.glob("*.upgrade"))
    assert await vm.chain() == ["vda.test", "vda.before", "vda.qcow2", "golden.qcow2"]
    assert await vm.chain("vdb") == ["vdb.before", "vdb.img"]
    rows = (await vm("snapshot list vm1")).splitlines()[1:]
    assert [row[:10].rstrip() for row in rows] == ["  before", "* └─ test"]
    jobs = [row.split()[:3] for row in (await vm("job list vm1")).splitlines()]
    assert jobs == [["DISK", "JOB", "STATE"], ["vda", "commit", "done"], ["vdb", "active-commit", "done"]]
    await vm.holds("vda.test", m0=0x11, m1=0x22, m4=0x40, m5=0x41)


async def test_delete_of_children(vm: Guest) -> None:
    await vm.layers("a", "b", "c")
    assert (await vm("snapshot delete vm1 a --children-only")).startswith("snapshots b, c are deleted; merged down")
    assert await vm.chain() == ["vda.a", "vda.qcow2", "golden.qcow2"]
    assert "it has no children" in await vm("snapshot delete vm1 a --children-only", status=48)
    await vm.layers("d")
    view = await vm.command.json("snapshot", "delete", "vm1", "a", "--children")
    assert view["text"].startswith("snapshots a, d are deleted")
    assert await vm.chain() == ["vda.qcow2", "golden.qcow2"]
    assert await vm("snapshot list vm1") == "vm1 has no snapshots\n"


async def test_a_snapshot_with_mirrors_is_not_merged(vm: Guest) -> None:
    await vm("snapshot create vm1 s1 --disk vda --mirror vda={}/mirror.qcow2")
    assert "--reopen-mirror" in await vm("snapshot delete vm1 s1", status=44)
    assert "--reopen-mirror" in await vm("snapshot delete vm1 s1 --children", status=44)
    await vm("snapshot delete vm1 s1 --remove-mirror")
    await vm("snapshot delete vm1 s1")
    assert await vm.chain() == ["vda.qcow2", "golden.qcow2"]


async def test_snapshots_move_to_another_state_directory(vm: Guest) -> None:
    await vm.layers("before", "upgrade")
    before = await vm("snapshot list vm1")
    for name in ("before", "upgrade"):
        (vm.folder / f"{name}.xml").write_text((await vm.command(*f"snapshot show vm1 {name} --xml".split())).stdout)
    await vm("detach vm1")
    there = Command(vm.folder / "there")
    here, vm.command = vm.command, there
    try:
        await vm(f"attach vm1 --qmp {vm.qemu.qmp}")
        again = "snapshot create vm1 --xml {}/upgrade.xml --redefine"
        assert "no snapshot 'before': redefine that one first" in await vm(again, status=42)
        first = "snapshot create vm1 --xml {}/before.xml --redefine"
        assert "is not current: vda is on vda.upgrade, not on vda.before" in await vm(f"{first} --current", status=45)
        planned = await vm(f"{first} --dry-run")
        assert planned.startswith("vm1: redefine snapshot before; nothing has been done. The steps:")
        assert (await vm(first)).startswith("snapshot before of vm1")
        assert "  current\n" in await vm(f"{again} --current")
        assert await vm("snapshot list vm1") == before
        whats = [row.split()[5:8] for row in (await vm("operations")).splitlines()[1:]]
        assert whats == [["vm1", "redefine", "done"]] * 2
        await vm("snapshot delete vm1 before")
        await vm("snapshot delete vm1 upgrade")
        assert await vm.chain() == ["vda.qcow2", "golden.qcow2"]
        await vm.holds("vda.qcow2", m0=0x11, m1=0x22, m4=0x40, m5=0x41)
    finally:
        await there.close()
        stop(there.state_dir)
        vm.command = here


async def test_internal_snapshots(vm: Guest) -> None:
    await vm.qemu.command("blockdev-snapshot-internal-sync", {"device": "d0", "name": "fresh"})
    await vm.layers("before")
    _heading, *rows = (await vm("snapshot list vm1")).splitlines()
    assert [[row.replace("*", " ").split()[0], *row.split()[-4:]] for row in rows] == [
        *[["before", "vda", "vdb", "-", "-"], ["fresh", "internal", "vda", "-", "-"]]
    ]
    said = await vm("snapshot delete vm1 fresh", status=47)
    assert "is internal, inside vda.qcow2 (vda)" in said
    assert "`qemu-img snapshot -d 'fresh' IMAGE`" in said
    assert await vm("snapshot show vm1 fresh", status=47) == said
    listed = await vm.command.json("snapshot", "list", "vm1")
    assert [each["file"] for each in listed["internal"]] == [f"{vm.folder}/vda.qcow2"]


async def test_header_modes(vm: Guest) -> None:
    said = await vm("snapshot create vm1 s1 --mode vda=relative --mode vdb=none")
    assert "note: vdb.s1 names no backing file" in said
    headers = {}
    for name in ("vda.s1", "vdb.s1"):
        process = await asyncio.create_subprocess_exec(
            *[vm.binaries.img, "info", "-U", "--output=json", vm.folder / name], stdout=asyncio.subprocess.PIPE
        )
        headers[name] = msgspec.json.decode((await process.communicate())[0]).get("backing-filename")
    assert headers == {"vda.s1": "vda.qcow2", "vdb.s1": None}


async def test_files_that_are_there(vm: Guest) -> None:
    make_image(vm.binaries, vm.folder / "made.qcow2", "qcow2", backing=vm.folder / "vda.qcow2", backing_fmt="qcow2")
    make_image(vm.binaries, vm.folder / "alone.qcow2", "qcow2", SIZE)
    await vm("snapshot create vm1 s1 --disk vda={}/made.qcow2", status=34)
    assert "no backing file" in await vm("snapshot create vm1 s1 --disk vda={}/alone.qcow2 --reuse-ext", status=36)
    assert "does not exist" in await vm("snapshot create vm1 s1 --disk vda --mode vda=existing", status=36)
    both = "snapshot create vm1 s1 --disk vda={}/made.qcow2 --reuse-ext --mode vda=relative"
    assert "mode relative of vda makes one" in await vm(both, status=13)
    await vm("snapshot create vm1 s1 --disk vda={}/made.qcow2 --reuse-ext")
    assert await vm.chain() == ["made.qcow2", "vda.qcow2", "golden.qcow2"]


async def test_a_snapshot_that_is_not_remembered(vm: Guest) -> None:
    said = await vm("snapshot create vm1 s1 --disk vda --mirror vda={}/mirror.qcow2 --no-metadata")
    assert "note: it is not remembered as a snapshot" in said
    assert await vm("snapshot list vm1") == "vm1 has no snapshots\n"
    await vm("job pivot vm1 vda")
    assert await vm.chain() == ["mirror.qcow2", "vda.qcow2", "golden.qcow2"]


async def test_a_mirror_on_another_backing(vm: Guest) -> None:
    overlay = vm.folder / "copy.qcow2"
    overlay.write_bytes((vm.folder / "vda.qcow2").read_bytes())
    await vm("snapshot create vm1 s1 --disk vda --mirror vda={}/mirror.qcow2 --mirror-backing vda={}/copy.qcow2")
    await vm.write(0x44, 4)
    await vm("snapshot delete vm1 s1 --reopen-mirror")
    assert await vm.chain() == ["mirror.qcow2", "copy.qcow2", "golden.qcow2"]
    await vm.holds("mirror.qcow2", m0=0x11, m1=0x22, m4=0x44)


# --- rebase and commit ----------------------------------------------------------------------------------------


async def test_rebase(vm: Guest) -> None:
    await vm.layers("before")
    assert "nothing has been done" in await vm("rebase vm1 vda --base {}/golden.qcow2 --dry-run")
    first, note, *progress, last = (await vm("rebase vm1 vda --base {}/golden.qcow2 --wait")).splitlines()
    assert first == "vm1: rebase of vda into vda.before (operation 2)"
    assert note == "note: left as they are: vda.qcow2"
    assert progress[-1].startswith("vda  done")
    assert last == "vda now backs onto golden.qcow2"
    assert await vm.chain() == ["vda.before", "golden.qcow2"]
    assert "backs onto golden.qcow2 already" in await vm("rebase vm1 vda --base {}/golden.qcow2", status=32)
    assert "does not back onto vda.qcow2 any more" in await vm("snapshot delete vm1 before", status=48)
    assert (await vm("rebase vm1 vda --wait")).endswith("vda now backs onto nothing\n")
    assert "it has no backing file" in await vm("rebase vm1 vda", status=32)
    await vm.holds("vda.before", m0=0x11, m1=0x22, m4=0x40)


async def test_rebase_without_waiting_says_how_to_watch_it(vm: Guest) -> None:
    await vm.layers("before")
    await vm.fill()
    said = await vm(f"rebase vm1 vda --bandwidth {SLOW}")
    assert "It goes on by itself" in said
    assert "blockferry job cancel vm1 vda" in said
    await vm("job speed vm1 vda 0")
    assert (await vm.ended("vda"))["state"] == "done"
    assert await vm.chain() == ["vda.before"]


async def test_json_of_a_rebase_and_a_commit(vm: Guest) -> None:
    await vm.layers("before")
    for verb, kind, base in (("rebase", "rebase", None), ("commit", "active-commit", "vdb.img")):
        disk = "vda" if verb == "rebase" else "vdb"
        job, *events = (await vm.command(verb, "vm1", disk, "--wait", "--json")).lines
        for line in (job, *events):
            msgspec.convert(line, View)
        assert (job["kind"], job["type"]) == ("job", kind)
        assert (job["base"] and Path(job["base"]).name) == base
        assert {event["type"] for event in events} == {"progress"}
        assert events[-1]["data"]["state"] == "done"


async def test_commit_of_the_active_image(vm: Guest) -> None:
    await vm.layers("before", "upgrade")
    line = "commit vm1 vda --base {}/vda.before"
    planned = await vm(f"{line} --dry-run")
    assert "note: snapshot upgrade will keep nothing of vda any more" in planned
    first, note, *progress, last = (await vm(f"{line} --wait")).splitlines()
    assert first == "vm1: commit of vda into vda.before (operation 3)"
    assert note.startswith("note: snapshot upgrade will keep nothing of vda any more")
    assert progress[-1].startswith("vda  done")
    assert last == "vda now on vda.before"
    assert (vm.folder / "vda.upgrade").exists(), "a commit removes no file"
    view = await vm.command.json("snapshot", "show", "vm1", "upgrade")
    assert [disk["target"] for disk in view["disks"]] == ["vdb"]
    shown = await vm("operations vm1")
    assert "the guest goes over to vda.before" in shown
    await vm.holds("vda.before", m0=0x11, m1=0x22, m4=0x40, m5=0x41)


async def test_commit_of_lower_layers(vm: Guest) -> None:
    await vm.layers("a", "b", "c")
    said = await vm("commit vm1 vda --top {}/vda.b --base {}/vda.qcow2 --wait")
    assert said.endswith("vda.b is committed into vda.qcow2\n")
    assert await vm.chain() == ["vda.c", "vda.qcow2", "golden.qcow2"]
    kept = (await vm.command.json("snapshot", "show", "vm1", "c"))["disks"][0]
    assert Path(kept["backing"]).name == "vda.qcow2"
    await vm.holds("vda.c", m0=0x11, m1=0x22, m4=0x40, m5=0x41, m6=0x42)


async def test_commit_goes_to_the_bottom_unless_told_and_forgets_what_it_writes_over(vm: Guest) -> None:
    await vm("snapshot create vm1 one --disk vda")
    await vm("snapshot create vm1 two --disk vda")
    said = await vm("commit vm1 vda --wait")
    assert "commit of vda into golden.qcow2" in said
    assert "note: snapshot one will be no more" in said
    assert "note: snapshot two will be no more" in said
    assert said.endswith("vda now on golden.qcow2\n")
    assert await vm("snapshot list vm1") == "vm1 has no snapshots\n"
    assert "backs onto nothing" in await vm("commit vm1 vda", status=32)
    await vm.holds("golden.qcow2", m0=0x11, m1=0x22)


async def test_a_commit_forgets_snapshots_that_the_guest_has_left_behind(vm: Guest) -> None:
    """Their images back onto a layer that is merged, but what they kept of it is not what its base holds now."""
    await vm("snapshot create vm1 old --disk vda --mirror vda={}/mirror.qcow2")
    await vm("snapshot create vm1 rest --disk vdb")
    await vm("snapshot delete vm1 old --remove-mirror")
    await vm("copy vm1 vda {}/branch.qcow2 --base {}/vda.qcow2 --pivot")
    assert await vm.chain() == ["branch.qcow2", "vda.qcow2", "golden.qcow2"]
    assert "note: snapshot old will be no more" in await vm("commit vm1 vda --wait")
    assert (await vm.command.json("snapshot", "list", "vm1"))["snapshots"][0]["name"] == "rest"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--base {}/nothere", "is no image under vda's active one"),
        ("--top {}/nothere", "is no image under vda's active one"),
        ("--top {}/golden.qcow2", "backs onto nothing"),
        ("--top {}/vda.qcow2 --base {}/vda.qcow2", "is not under vda.qcow2"),
        ("--base {}/vdb.img", "is no image under vda's active one"),
    ],
)
async def test_commits_that_are_refused(vm: Guest, options: str, words: str) -> None:
    await vm.layers("before")
    before = await vm.chain()
    result = await vm.command.ends(
        await vm.command.start("commit", "vm1", "vda", *options.replace("{}", str(vm.folder)).split())
    )
    assert result.status in (32, 36)
    assert words in result.stderr.replace(f"{vm.folder}/", "")
    assert await vm.chain() == before


async def test_ctrl_c_leaves_a_commit_running_and_a_cancel_tells_who_waits(vm: Guest) -> None:
    await vm.layers("before")
    await vm.fill()
    start = ("commit", "vm1", "vda", "--bandwidth", SLOW, "--wait")
    waiting = await vm.command.start(*start)
    assert waiting.stdout is not None
    while b"running" not in await asyncio.wait_for(waiting.stdout.readline(), 30):
        pass
    waiting.send_signal(signal.SIGINT)
    ended = await vm.command.ends(waiting)
    assert ended.status == 130
    assert "the commit of vda" in ended.stderr
    assert "goes on" in ended.stderr
    busy = await vm("snapshot create vm1 more --disk vda", status=33)
    assert "blockferry job list vm1" in busy
    assert "ends by itself" in await vm("job pivot vm1 vda", status=13)
    said = await vm("job cancel vm1 vda")
    assert said.startswith("cancelled; the chain is as it was; written in part: golden.qcow2")
    waiting = await vm.command.start(*start)
    assert waiting.stdout is not None
    while b"running" not in await asyncio.wait_for(waiting.stdout.readline(), 30):
        pass
    await vm("job cancel vm1 vda")
    ended = await vm.command.ends(waiting)
    assert ended.status == 53
    assert "it was cancelled" in ended.stderr
    await vm("commit vm1 vda --wait")
    await vm.holds("golden.qcow2", m0=0x11, m1=0x22, m4=0x40, **{f"m{mib}": 0x55 for mib in FILLED})


# --- copies onto a base ---------------------------------------------------------------------------------------


async def test_a_copy_onto_a_base_further_down(vm: Guest) -> None:
    await vm.layers("before")
    said = await vm("copy vm1 vda {}/copy.qcow2 --base {}/golden.qcow2 --pivot")
    assert "vda now on copy.qcow2" in said
    assert "vda  copying  100 %  0 B" not in said
    assert await vm.chain() == ["copy.qcow2", "golden.qcow2"]
    await vm.holds("copy.qcow2", m0=0x11, m1=0x22, m4=0x40)


async def test_a_rebase_joins_a_copy_onto_the_same_base(vm: Guest) -> None:
    await vm.layers("before")
    await vm.fill()
    await vm(f"copy vm1 vda {{}}/copy.qcow2 --base {{}}/golden.qcow2 --bandwidth {SLOW} --buf-size 64K")
    assert (await vm("job list vm1")).splitlines()[1].split()[:3] == ["vda", "fill", "copying"]
    elsewhere = await vm("rebase vm1 vda --base {}/vda.qcow2", status=54)
    assert "copied to copy.qcow2, which backs onto golden.qcow2" in elsewhere
    await vm("rebase vm1 vda", status=54)
    joined = await vm("rebase vm1 vda --base {}/golden.qcow2")
    assert "vm1: copying vda to copy.qcow2" in joined
    assert "note: joined the copy to copy.qcow2" in joined
    await vm("job speed vm1 vda 0")
    waited = await vm("rebase vm1 vda --base {}/golden.qcow2 --wait")
    assert "blockferry job pivot vm1 vda" in waited
    await vm("job pivot vm1 vda")
    assert await vm.chain() == ["copy.qcow2", "golden.qcow2"]


async def test_a_copy_into_an_image_that_is_there(vm: Guest) -> None:
    make_image(vm.binaries, vm.folder / "there.qcow2", "qcow2", SIZE)
    make_image(vm.binaries, vm.folder / "small.qcow2", "qcow2", MIB)
    await vm("copy vm1 vda {}/there.qcow2", status=34)
    await vm("copy vm1 vda {}/nothere.qcow2 --reuse-ext", status=36)
    assert "virtual size" in await vm("copy vm1 vda {}/small.qcow2 --reuse-ext", status=36)
    await vm("copy vm1 vda {}/there.qcow2 --reuse-ext --converge --granularity 64K --buf-size 1M --pivot")
    assert await vm.chain() == ["there.qcow2"]
    await vm.holds("there.qcow2", m0=0x11, m1=0x22)


@pytest.mark.parametrize("options", ["--granularity 3000", "--granularity 256", "--buf-size 0", "--granularity 128M"])
async def test_sizes_that_are_refused(vm: Guest, options: str) -> None:
    assert "Nothing was done" in await vm(f"copy vm1 vda {{}}/copy.qcow2 {options}", status=13)
    assert not (vm.folder / "copy.qcow2").exists()
