"""The command and moves of a guest's storage: its own process, the host process that it starts, a real QEMU."""

import asyncio
import json
import os
import pty
import re
import signal
import termios
from pathlib import Path

import msgspec
import pytest
from commandkit import BLOCKFERRY, DISK_MIB, MIB, Command, Result, line_with, read_all, stop

import blockferry
from blockferry import errors
from blockferry.model.view import MoveProgress, View
from blockferry.testing import TestQemu

SLOW = "2M"  # a move that takes as long as a test needs
NARROW = 60


class Guest:
    """vm1, with a.qcow2 full of data and b.raw; and a directory to move it to."""

    def __init__(self, command: Command, qemu: TestQemu) -> None:
        self.command, self.qemu = command, qemu
        self.source, self.dest = qemu.directory, qemu.directory / "new"
        self.dest.mkdir()

    async def move(self, line: str = "", **options: int) -> Result:
        return await self.command("move", "vm1", str(self.dest), *line.split(), **options)

    async def begin(self, line: str) -> asyncio.subprocess.Process:
        """A move that is followed, a line of JSON a second."""
        return await self.command.start("move", "vm1", str(self.dest), *f"--verify none --json {line}".split())

    async def images(self) -> list[str]:
        return [disk["source"] for disk in (await self.command.json("show", "vm1"))["disks"]]

    @property
    def old(self) -> list[str]:
        return [f"{self.source}/a.qcow2", f"{self.source}/b.raw"]

    @property
    def new(self) -> list[str]:
        return [f"{self.dest}/a.qcow2", f"{self.dest}/b.raw"]


@pytest.fixture
async def vm1(command: Command, guest: TestQemu) -> Guest:
    await command("attach", "vm1", "--qmp", str(guest.qmp))
    return Guest(command, guest)


async def test_a_guest_moves(vm1: Guest) -> None:
    planned = (await vm1.move("--dry-run")).stdout
    assert "nothing has been done. The files:\n" in planned
    for target, path in zip(("a.qcow2", "b.raw"), vm1.new, strict=True):
        assert re.search(rf"  {path} +\d.*copy of {vm1.source}/{target}, outside QEMU\n", planned)
    assert re.search(rf"  {vm1.new[1]} +1.0 MiB ", planned), "holes are not counted"
    assert f"room needed on the file system of {vm1.dest}: " in planned
    assert "pause to expect: " in planned
    assert not list(vm1.dest.iterdir())
    said = (await vm1.move("--delete-source")).stdout
    told = [
        said.index(word) for word in ("vm1: moving vda, vdb", f"copied  {vm1.new[0]}", "mirror  vda  ready", "pivot  ")
    ]
    assert told == sorted(told)
    assert re.search(r"^verify  full: [\d.]+ MiB compared, all equal$", said, re.MULTILINE)
    assert re.search(
        r"^compared \(full\): [\d.]+ MiB, equal, but for what the guest has written since$", said, re.MULTILINE
    )
    assert re.search(r"the guest is on the destinations; it stood still for [\d.]+ ms$", said, re.MULTILINE)
    assert re.search(rf"^vm1 is on {', '.join(vm1.new)} \(operation 1\)$", said, re.MULTILINE)
    assert "left at the old place" not in said
    assert await vm1.images() == vm1.new
    assert not [path for path in vm1.old if Path(path).exists()]
    shown = (await vm1.command("operations", "show", "1")).stdout
    assert "move 1 of vm1  done\n" in shown
    assert "next: " not in shown
    over = await vm1.command("operations", "resume", "1", status=91)
    assert "move 1 is over" in over.stderr
    await vm1.qemu.stop()
    assert (vm1.dest / "b.raw").read_bytes() == b"\xa5" * MIB + bytes((DISK_MIB - 1) * MIB)


async def test_a_move_that_is_left_alone_is_seen_and_given_up(vm1: Guest) -> None:
    moving = await vm1.begin(f"--disk vda=other.qcow2 --strategy mirror --bandwidth {SLOW}")
    first = json.loads(await line_with(moving.stdout, '"move-progress"'))
    assert (first["operation"], first["state"], first["version"]) == (1, "working", 1)
    assert f"  => {vm1.dest}/other.qcow2  move 1  mirroring" in (await vm1.command("show", "vm1")).stdout
    (row,) = [line for line in (await vm1.command("operations")).stdout.splitlines() if " move " in line]
    assert "in-progress" in row
    shown = (await vm1.command("operations", "show", "1")).stdout
    assert "next: blockferry operations resume 1\nnext: blockferry operations cancel 1\n\nmove 1 of vm1  " in shown
    two = json.loads(await line_with(moving.stdout, '"rate": 2'))
    assert [part["name"] for part in two["parts"]] == ["vda"]
    await vm1.command("operations", "speed", "1", "1M")
    await vm1.command("storage", "speed", str(vm1.dest), "8M")
    (limit,) = (await vm1.command.json("storage", "list"))["storages"]
    assert (limit["folder"], limit["bandwidth"], limit["writers"]) == (str(vm1.dest), 8 * MIB, 1)
    moving.send_signal(signal.SIGINT)
    left = await vm1.command.ends(moving)
    assert left.status == 130
    assert "move 1 of vm1 goes on" in left.stderr
    assert "blockferry operations cancel 1" in left.stderr
    following = await vm1.command.start("operations", "resume", "1")
    await line_with(following.stdout, "vm1: moving vda")
    given_up = (await vm1.command("operations", "cancel", "1")).stdout
    assert "move 1 of vm1  cancelled\n" in given_up
    assert (await vm1.command.ends(following)).status == 95
    assert await vm1.images() == vm1.old
    assert not list(vm1.dest.iterdir())


async def test_a_move_that_is_late_is_given_up(vm1: Guest) -> None:
    late = await vm1.command("move", "vm1", str(vm1.dest), "--bandwidth", "1", "--deadline", "0.5", status=95)
    assert re.search(
        r"^  given up at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d if the guest has not gone over by then$",
        late.stdout,
        re.MULTILINE,
    )
    assert "its guest had not gone over within its deadline, 0.5 s: it was at «copy»" in late.stderr
    assert await vm1.images() == vm1.old
    assert not list(vm1.dest.iterdir())


async def test_a_move_stands_still_and_is_gone_on_with(vm1: Guest) -> None:
    moving = await vm1.begin("--bandwidth 16M")
    await line_with(moving.stdout, '"move-progress"')
    await asyncio.to_thread(stop, vm1.command.state_dir, signal.SIGKILL)
    await vm1.command.ends(moving)
    begun = (await vm1.command.json("operations", "resume", "1", "--detach"))["operation"]
    assert begun == 1
    os.utime(vm1.old[0])  # somebody has touched it: what is copied is not what the guest left there
    stands = await vm1.command("operations", "resume", "1", "--json", status=92)
    *progress, move, error = stands.lines
    for line in (*progress, move):
        msgspec.convert(line, View)
    assert (move["kind"], move["state"], move["phase"]) == ("move", "standing still", "copy")
    assert error["error"]["code"] == "move-stands"
    assert "operations cancel 1" in error["error"]["message"]
    await vm1.command("operations", "cancel", "1")
    assert await vm1.images() == vm1.old


async def test_copies_that_differ_keep_their_sources(vm1: Guest) -> None:
    line = f"move vm1 {vm1.dest} --strategy mirror --bandwidth {SLOW} --verify full --delete-source"
    moving = await vm1.command.start(*line.split())
    await line_with(moving.stdout, "mirror  vdb  ready")
    with (vm1.dest / "b.raw").open("r+b") as file:  # behind everybody's back, in what was a hole
        file.seek(6 * MIB + 17)
        file.write(b"x")
    await vm1.command("operations", "speed", "1", "0")
    told = await vm1.command.ends(moving)
    assert told.status == errors.MoveDiffers.exit_status
    assert "not equal" in told.stdout
    assert re.search(rf"^  vdb: \d+ bytes from {6 * MIB} on$", told.stdout, re.MULTILINE), told.stdout
    assert "rm " not in told.stdout, "nobody is told to remove them"
    assert all(Path(path).exists() for path in vm1.old)
    assert await vm1.images() == vm1.new


async def test_a_move_that_the_guest_outruns_says_so(vm1: Guest) -> None:
    # QEMU copies 16 MiB at once, and counts what has been written to only when it wakes for the next, 4 s later.
    moving = await vm1.begin("--disk vda --strategy mirror --bandwidth 4M")
    for _second in range(30):
        line = await line_with(moving.stdout, '"name": "vda"')
        if '"converging": false' in line:
            break
        again = f'qemu-io -d /machine/peripheral/d0-dev/virtio-backend "write -q -P 7 0 {DISK_MIB}M"'
        await vm1.qemu.command("human-monitor-command", {"command-line": again})
    (part,) = json.loads(line)["parts"]
    assert part["converging"] is False, line
    assert part["total"] > DISK_MIB * MIB, "the guest's writes are more to copy"
    await vm1.command("operations", "cancel", "1")
    assert (await vm1.command.ends(moving)).status == 95
    assert await vm1.images() == vm1.old


async def test_the_bars_on_a_narrow_terminal(vm1: Guest) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, NARROW))
    line = f"move vm1 {vm1.dest} --disk vda --strategy mirror --bandwidth 12M"
    process = await asyncio.create_subprocess_exec(
        *[str(BLOCKFERRY), "--state-dir", str(vm1.command.state_dir), *line.split()],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"},
    )
    os.close(theirs)
    drawn = await asyncio.to_thread(read_all, ours)
    assert await process.wait() == 0, drawn
    rows = [row.rstrip() for row in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).replace("\r", "\n").split("\n")]
    drawn_rows = [row for row in rows if " % " in row]
    assert {row.split()[0] for row in drawn_rows} == {"vda", "mirroring", "comparison", "comparing"}
    assert max(map(len, drawn_rows)) <= NARROW
    assert any("MiB/s" in row and row.endswith("left") for row in drawn_rows)


async def test_a_move_that_is_at_work_is_told_not_to_compare(vm1: Guest) -> None:
    await vm1.command("move", "vm1", str(vm1.dest), "--disk", "vda", "--bandwidth", "1M", "--delete-source", "--detach")
    await vm1.command("operations", "speed", "1", "0")
    told = await vm1.command("operations", "resume", "1", "--verify", "none")
    assert "note: source and destination are not compared, and the source stays where it is" in told.stdout
    assert "verify  not done: as asked" in told.stdout
    assert "source and destination were not compared" in told.stdout
    assert Path(vm1.old[0]).exists()


async def test_copies_are_given_up_and_gone_on_with_by_number(vm1: Guest) -> None:
    await vm1.command("copy", "vm1", "vda", str(vm1.dest / "copy.qcow2"), "--bandwidth", SLOW)
    assert "left behind" in (await vm1.command("operations", "cancel", "1")).stdout
    resumed = await vm1.command.json("operations", "resume", "1")
    assert (resumed["kind"], resumed["disk"]) == ("job", "vda")
    await vm1.command("job", "cancel", "vm1", "vda")
    await vm1.command("snapshot", "create", "vm1", "s1", "--disk", "vdb")
    assert (
        "nothing is compared with that"
        in (await vm1.command("operations", "resume", "1", "--verify", "none", status=13)).stderr
    )
    last = (await vm1.command.json("operations"))["operations"][-1]
    for verb in ("resume", "cancel"):
        await vm1.command("operations", verb, str(last["id"]), status=94)


@pytest.mark.parametrize("how", ["open", "connect"])
async def test_the_library_moves(state_dir: Path, guest: TestQemu, how: str) -> None:
    (dest := guest.directory / "new").mkdir()
    async with getattr(blockferry, how)(state_dir) as ferry:
        vm = await ferry.attach("vm1", qmp=guest.qmp)
        move = await vm.move(dest, ["vda"], bandwidth=MIB, verify="none")
        seen: list[MoveProgress] = []

        async def follow() -> None:
            async for progress in move:
                seen.append(progress)
                if len(seen) == 2:
                    await (await ferry.move(move.operation)).cancel()

        with pytest.raises(errors.MoveCancelled):
            await follow()
        assert {each.phase for each in seen[:2]} == {"copy"}
        assert seen[0].current <= seen[1].current < seen[1].total
        assert (await move.info()).state == "cancelled"
        with pytest.raises(errors.MoveNotPossible):
            await move.resume()
        done = await (await vm.move(dest, {"vda": "other.qcow2"}, verify="none")).wait()
        assert (done.state, done.pivoted, done.left[-1]) == ("done", True, str(guest.directory / "a.qcow2"))
        assert (await vm.info()).disks[0].source == str(dest / "other.qcow2")
