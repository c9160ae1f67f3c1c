"""The command from end to end: its own process, the host process that it starts, a real QEMU."""

import asyncio
import json
import os
import pty
import re
import signal
import termios
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from commandkit import BLOCKFERRY, DISK_MIB, MIB, Command, line_with, owner, read_all, stop

from blockferry.model.view import Event, View
from blockferry.testing import TestQemu

SLOW = "2M"  # a copy that takes as long as a test needs, and is let go with `job speed`


@pytest.fixture
async def vm1(command: Command, guest: TestQemu) -> TestQemu:
    await command("attach", "vm1", "--qmp", str(guest.qmp))
    return guest


async def test_attach_list_show_detach(command: Command, guest: TestQemu) -> None:
    assert "no domain is attached" in (await command("list")).stdout
    await command("attach", "vm1", "--qmp", str(guest.qmp))
    assert str(guest.pid) in (await command("list")).stdout
    shown = (await command("show", "vm1")).stdout
    assert f"{guest.directory}/a.qcow2  qcow2" in shown
    assert "vdb" in shown
    assert (await command("show", "vm1", "--xml")).stdout.startswith("<domain")
    assert (await command("detach", "vm1")).stdout == "vm1 is detached; the guest runs on\n"
    assert guest.alive


async def test_relative_paths_are_the_callers(command: Command, guest: TestQemu) -> None:
    await command("attach", "vm1", "--qmp", guest.qmp.name, cwd=guest.directory)
    await command("snapshot", "create", "vm1", "s1", "--disk", "vda=over.qcow2", cwd=guest.directory)
    view = await command.json("show", "vm1")
    assert view["disks"][0]["source"] == str(guest.directory / "over.qcow2")


async def test_every_answer_is_a_documented_view(command: Command, guest: TestQemu) -> None:
    kinds = [
        (await command.json(*arguments.split()))["kind"]
        for arguments in [
            f"attach vm1 --qmp {guest.qmp}",
            "list",
            "show vm1",
            "graph vm1",
            "snapshot create vm1 s1 --atomic --dry-run",
            f"snapshot create vm1 s1 --atomic --mirror vda={guest.directory}/m.qcow2",
            "snapshot list vm1",
            "snapshot show vm1 s1",
            "job list vm1",
            "snapshot delete vm1 s1 --reopen-mirror",
            f"copy vm1 vdb {guest.directory}/c.raw --dry-run",
            f"copy vm1 vdb {guest.directory}/c.raw",
            "job speed vm1 vdb 0",
            "job finish vm1 vdb",
            "operations",
            "operations vm1",
            "operations show 1",
            "recover",
        ]
    ]
    expected = "domain domains domain graph plan snapshot snapshots snapshot jobs done plan job done done"
    assert kinds == [*expected.split(), "operations", "operations", "operation", "recovery"]
    for event in (await command("events", "--json")).lines:
        assert isinstance(msgspec.convert(event, View), Event)
    assert (await command.json("detach", "vm1"))["kind"] == "done"


async def test_an_error_is_a_sentence_a_status_and_with_json_an_object(command: Command) -> None:
    plain = await command("show", "vm1", status=20)
    assert plain.stdout == ""
    assert plain.stderr.startswith("blockferry: no domain 'vm1' is attached.")
    told = await command("show", "vm1", "--json", status=20)
    (line,) = told.lines
    assert line["kind"] == "error"
    assert line["error"]["code"] == "no-such-domain"
    assert line["error"]["fields"] == {"domain": "vm1"}


async def test_what_is_refused_is_said_in_a_line(command: Command, vm1: TestQemu) -> None:
    """Every refusal is in tests/qemu/refusals.py; here is what the command makes of some that may go wrong on the way."""
    folder = vm1.directory
    before = await command.json("show", "vm1")
    laughs = folder / "laughs.xml"
    laughs.write_text("<!DOCTYPE d [<!ENTITY a 'ha'>]><domainsnapshot><name>&a;</name></domainsnapshot>")
    large = folder / "large.xml"
    large.write_text(f"<domainsnapshot>{' ' * 20_000_000}</domainsnapshot>")
    binary = folder / "binary.xml"
    binary.write_bytes(b"\xff\xfe<domainsnapshot/>")
    for status, words, arguments in (
        (34, "b.raw exists already", ["copy", "vm1", "vda", f"{folder}/./b.raw"]),
        (35, "it is a directory", ["copy", "vm1", "vda", folder]),
        (35, "File name too long", ["copy", "vm1", "vda", folder / ("n" * 256)]),
        (13, "is not UTF-8", ["copy", "vm1", "vda", os.fsdecode(os.fsencode(folder) + b"/\x80")]),
        (35, "control character", ["copy", "vm1", "vda", f"{folder}/a\x1bb"]),
        (35, "Connection refused", ["copy", "vm1", "vda", "nbd://127.0.0.1:1/x"]),
        (42, "a DOCTYPE is not accepted", ["snapshot", "create", "vm1", "--xml", laughs]),
        (13, "over 4194304 bytes", ["snapshot", "create", "vm1", "--xml", large]),
        (42, "not UTF-8|not Unicode", ["snapshot", "create", "vm1", "--xml", binary]),
    ):
        result = await command(*map(str, arguments), status=status)
        assert result.stdout == ""
        assert re.fullmatch(rf"blockferry: .*({words}).*\n", result.stderr), result.stderr
        assert result.stderr[:-1].isprintable()
    assert await command.json("show", "vm1") == before


async def test_a_socket_that_something_else_holds(command: Command, guest: TestQemu) -> None:
    _reader, writer = await asyncio.open_unix_connection(guest.qmp)
    result = await command("attach", "vm1", "--qmp", str(guest.qmp), "--timeout", "0.5", status=24)
    assert "something else (libvirtd, a script) holds it" in result.stderr
    assert "-qmp unix:" in result.stderr, "it says how to add a second one"
    writer.close()
    await writer.wait_closed()
    assert (await command.json("list"))["domains"] == []


async def test_speed_and_events_while_a_copy_is_waited_for(command: Command, vm1: TestQemu) -> None:
    dest = vm1.directory / "copy.raw"
    following = await command.start("events", "vm1", "--since", "0", "--follow", "--json")
    await line_with(following.stdout, "domain-attached")
    waiting = await command.start(
        *["copy", "vm1", "vda", str(dest), "--format", "raw", "--bandwidth", SLOW, "--pivot", "--json"]
    )
    started = json.loads(await line_with(waiting.stdout, '"kind"'))
    assert (started["kind"], started["disk"], started["speed"]) == ("job", "vda", 2 * MIB)
    await line_with(waiting.stdout, '"copying"')
    await line_with(following.stdout, '"progress"')
    assert "copying" in (await command("job", "list", "vm1")).stdout
    await command("job", "speed", "vm1", "vda", "0")
    ended = await command.ends(waiting)
    assert ended.status == 0, ended
    *progress, done = ended.lines
    assert progress[-1]["data"]["state"] == "ready"
    assert done["kind"] == "done"
    assert done["pause_ms"] is not None
    await line_with(following.stdout, "mirror-ready")
    await line_with(following.stdout, "mirror-pivoted")
    following.send_signal(signal.SIGINT)
    assert (await command.ends(following)).status == 130
    assert (await command.json("show", "vm1"))["disks"][0]["source"] == str(dest)
    assert dest.read_bytes() == b"\x5a" * DISK_MIB * MIB


async def test_ctrl_c_leaves_the_copy_running(command: Command, vm1: TestQemu) -> None:
    dest = vm1.directory / "copy.qcow2"
    waiting = await command.start("copy", "vm1", "vda", str(dest), "--bandwidth", SLOW, "--wait")
    await line_with(waiting.stdout, "vda  copying")
    waiting.send_signal(signal.SIGINT)
    ended = await command.ends(waiting)
    assert ended.status == 130
    assert "goes on" in ended.stderr
    assert "blockferry job cancel vm1 vda" in ended.stderr
    (job,) = (await command.json("job", "list", "vm1"))["jobs"]
    assert job["state"] == "copying"
    await command("job", "cancel", "vm1", "vda")
    (job,) = (await command.json("job", "list", "vm1"))["jobs"]
    assert job["state"] == "cancelled"


async def test_a_cancelled_copy_is_an_error_for_who_waits(command: Command, vm1: TestQemu) -> None:
    dest = vm1.directory / "copy.qcow2"
    waiting = await command.start("copy", "vm1", "vda", str(dest), "--bandwidth", SLOW, "--wait")
    await line_with(waiting.stdout, "vda  copying")
    await command("job", "cancel", "vm1", "vda")
    ended = await command.ends(waiting)
    assert ended.status == 52
    assert "cancelled" in ended.stderr


async def test_waiting_goes_on_through_a_kill_of_the_host_process(command: Command, vm1: TestQemu) -> None:
    dest = vm1.directory / "copy.qcow2"
    waiting = await command.start("copy", "vm1", "vda", str(dest), "--bandwidth", SLOW, "--finish")
    await line_with(waiting.stdout, "vda  copying")
    first = owner(command.state_dir)
    await asyncio.to_thread(stop, command.state_dir, signal.SIGKILL)
    await command("job", "speed", "vm1", "vda", "0")
    assert owner(command.state_dir) != first
    ended = await command.ends(waiting)
    assert ended.status == 0, ended
    assert "as of one instant" in ended.stdout


async def test_a_pivot_of_several_disks(command: Command, vm1: TestQemu) -> None:
    for disk in ("vda", "vdb"):
        started = await command("copy", "vm1", disk, str(vm1.directory / f"{disk}.qcow2"), "--format", "qcow2")
        assert f"blockferry job pivot vm1 {disk}" in started.stdout, "it says what can be done next"
    said = (await command("job", "pivot", "vm1", "vda", str(vm1.directory / "b.raw"))).stdout
    assert "The guest stood still for" in said
    disks = (await command.json("show", "vm1"))["disks"]
    assert [Path(disk["source"]).name for disk in disks] == ["vda.qcow2", "vdb.qcow2"]
    steps = (await command("operations", "show", "3")).stdout
    assert "pivot" in steps
    assert "the guest stood still for" in steps


async def test_the_bar_on_a_terminal(command: Command, vm1: TestQemu) -> None:
    """rich draws with bytes, rate and time left; ends where the copy is ready."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = await asyncio.create_subprocess_exec(
        *command_line(command, "copy", "vm1", "vda", str(vm1.directory / "c.qcow2"), "--bandwidth", "20M", "--wait"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    drawn = await asyncio.to_thread(read_all, ours)
    assert await process.wait() == 0, drawn
    assert "━" in drawn
    assert "MiB/s" in drawn
    assert "left" in drawn
    assert "vda ready" in drawn


def command_line(command: Command, *arguments: str) -> list[str]:
    return [str(BLOCKFERRY), "--state-dir", str(command.state_dir), *arguments]


async def test_completion_asks_a_running_host_process_and_starts_none(command: Command, guest: TestQemu) -> None:
    async def complete(words: str) -> list[str]:
        environment = {**os.environ, "_BLOCKFERRY_COMPLETE": "bash_complete", "COMP_WORDS": words}
        environment |= {"COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))), "NO_COLOR": "1"}
        process = await asyncio.create_subprocess_exec(
            (command_line(command))[0], env=environment, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        said = (await process.stdout.read()).decode()
        await process.wait()
        return [line.split(",", 1)[1] for line in said.split()]

    base = f"blockferry --state-dir {command.state_dir}"
    assert await complete(f"{base} show ") == []
    assert not command.state_dir.exists()
    await command("attach", "vm1", "--qmp", str(guest.qmp))
    await command("snapshot", "create", "vm1", "s1")
    assert await complete(f"{base} show ") == ["vm1"]
    assert await complete(f"{base} copy vm1 vd") == ["vda", "vdb"]
    assert await complete(f"{base} job pivot vm1 vda vd") == ["vda", "vdb"]
    assert await complete(f"{base} snapshot delete vm1 ") == ["s1"]
    assert await complete(f"{base} operations show ") == ["1"]
    assert await complete(f"{base} operations resume ") == [], "a snapshot is over"
    assert "attach" in await complete("blockferry a")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion_scripts(command: Command, shell: str) -> None:
    result = await command("completion", shell)
    assert "_BLOCKFERRY_COMPLETE" in result.stdout
    (view,) = (await command("completion", shell, "--json")).lines
    assert view["script"] in result.stdout


async def test_no_colour_where_no_terminal_is(command: Command, vm1: TestQemu) -> None:
    assert "\x1b" not in (await command("list")).stdout


async def test_version_and_help_start_nothing(command: Command) -> None:
    assert (await command("--version")).stdout.startswith("blockferry 0.")
    assert "Example:" in (await command("--help")).stdout
    assert not command.state_dir.exists()


async def test_a_pipe_that_closes_early(command: Command, vm1: TestQemu) -> None:
    script = f"{' '.join(command_line(command, 'events', '--follow', '--since', '0'))} | head -n 1"
    process = await asyncio.create_subprocess_shell(
        script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert b"domain-attached" in await asyncio.wait_for(process.stdout.readline(), 30)
    await command("detach", "vm1")  # the next event finds the pipe closed
    _stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert b"Traceback" not in stderr


async def test_the_graph_as_text_and_as_a_picture(command: Command, vm1: TestQemu) -> None:
    mirror, drawn = vm1.directory / "m.qcow2", vm1.directory / "vm1.svg"
    await command("snapshot", "create", "vm1", "s1", "--disk", "vda", "--mirror", f"vda={mirror}")
    text = (await command("graph", "vm1")).stdout
    assert text.startswith("vm1  running  2 disks, ")
    assert f"file  {vm1.directory}/a.qcow2" in text
    assert "of snapshot s1" in text
    said = await command("graph", "vm1", "--svg", drawn.name, cwd=vm1.directory, umask=0o077)
    assert said.stdout == "the block graph of vm1 is drawn in vm1.svg\n"
    assert drawn.stat().st_mode & 0o777 == 0o644
    root = ET.fromstring(drawn.read_text())  # noqa: S314 (our own)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert str(mirror.name) in drawn.read_text()
    shown = (await command("graph", "vm1", "--svg", "-")).stdout
    assert ET.fromstring(shown).tag == root.tag  # noqa: S314
    assert (await command.json("graph", "vm1", "--svg", str(drawn)))["kind"] == "graph"


async def test_a_picture_that_can_not_be_written(command: Command, vm1: TestQemu) -> None:
    nowhere = vm1.directory / "none" / "vm1.svg"
    assert "No such file" in (await command("graph", "vm1", "--svg", str(nowhere), status=2)).stderr
    both = await command("graph", "vm1", "--svg", "-", "--json", status=2)
    assert both.lines[0]["error"]["code"] == "usage"
    assert "name a file for one of them" in both.stderr
    await command("graph", "vm2", "--svg", str(vm1.directory / "vm2.svg"), status=20)
    assert not (vm1.directory / "vm2.svg").exists()
