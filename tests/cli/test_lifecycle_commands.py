"""define, start, stop, suspend, resume, undefine as commands: what they print, and what they end with."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from commandkit import MIB, Command, owner
from commandkit import stop as stop_host

from blockferry.model.view import View
from blockferry.qemu.process import born
from blockferry.testing import TestQemu, find_qemu, make_image

XML = """<domain type='qemu'><name>g1</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>
<features><acpi/></features><devices>
<disk type='file'><driver name='qemu' type='qcow2'/><source file='{folder}/a'/><target dev='vda'/></disk>
<sound model='ich9'/></devices></domain>"""


@pytest.fixture
async def g1(command: Command, tmp_path: Path) -> AsyncIterator[Path]:
    """The file of a defined guest, which is ended at the end."""
    make_image(find_qemu("distribution"), tmp_path / "a", "qcow2", MIB)
    file = tmp_path / "g1.xml"
    file.write_text(XML.format(folder=tmp_path))
    result = await command("define", str(file))
    assert result.stdout.startswith("g1  shut off\n")
    assert result.stdout.endswith("\nnote: <devices/sound> is kept, and not carried out\n")
    yield file
    pid = (await command.json("show", "g1"))["pid"] if "g1" in (await command("list")).stdout else None
    if pid is not None:
        await command("stop", "g1", "--force")


async def test_a_life(command: Command, g1: Path) -> None:
    assert "shut off" in (await command("list")).stdout
    started = (await command("start", "g1")).stdout
    pid = (await command.json("show", "g1"))["pid"]
    assert started.startswith(f"g1  running  pid {pid}  QEMU ")
    assert str(g1.parent / "a") in started
    assert (await command("suspend", "g1")).stdout == "g1 is paused\n"
    assert (await command.json("show", "g1"))["state"] == "paused"
    assert (await command("resume", "g1")).stdout == "g1 runs\n"
    assert (await command("stop", "g1", "--force")).stdout == "g1 is shut off, by force\n"
    assert born(pid) is None
    assert (await command.json("show", "g1"))["pid"] is None
    assert "its images are as they were" in (await command("undefine", "g1")).stdout
    await command("show", "g1", status=20)


async def test_every_answer_is_a_documented_view(command: Command, g1: Path) -> None:
    told = [
        await command.json(*arguments.split())
        for arguments in (
            f"define {g1}", "start g1 --paused", "resume g1", "suspend g1", "stop g1 --force", "undefine g1",
        )
    ]  # fmt: skip
    assert [each["kind"] for each in told] == ["domain", "domain", "done", "done", "done", "done"]
    assert told[0]["notes"] == ["<devices/sound> is kept, and not carried out"]
    for each in told:
        msgspec.convert(each, View)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("start g1", 71, "g1 runs already"),
        ("undefine g1", 71, "g1 runs already"),
        ("define {file}", 71, "g1 runs already"),
        ("stop g1 --timeout 0.1", 73, "blockferry stop g1 --force"),
        ("detach g1", 28, "blockferry undefine"),
    ],
)
async def test_a_guest_that_runs(command: Command, g1: Path, arguments: str, status: int, words: str) -> None:
    await command("start", "g1")
    refused = await command(*arguments.format(file=g1).split(), status=status)
    assert words in refused.stderr
    assert (await command.json("show", "g1"))["state"] == "running"


@pytest.mark.parametrize(
    "arguments", ["stop g1", "suspend g1", "resume g1", "snapshot create g1 s1", "copy g1 vda /a/b"]
)
async def test_a_guest_that_is_shut_off(command: Command, g1: Path, arguments: str) -> None:
    refused = await command(*arguments.split(), status=72)
    assert refused.stderr == "blockferry: g1 is shut off; nothing was done. `blockferry start g1` starts it.\n"


async def test_a_paused_guest_hears_no_button(command: Command, g1: Path) -> None:
    await command("start", "g1", "--paused")
    assert "blockferry resume g1" in (await command("stop", "g1", status=74)).stderr


@pytest.mark.parametrize("arguments", ["start vm1", "stop vm1", "stop vm1 --force", "undefine vm1"])
async def test_an_attached_guest_is_its_starters(command: Command, guest: TestQemu, arguments: str) -> None:
    await command("attach", "vm1", "--qmp", str(guest.qmp))
    assert "vm1 is attached, not defined" in (await command(*arguments.split(), status=70)).stderr
    assert guest.alive


async def test_a_name_that_is_attached(command: Command, guest: TestQemu, tmp_path: Path) -> None:
    await command("attach", "g1", "--qmp", str(guest.qmp))
    (tmp_path / "g1.xml").write_text(XML.format(folder=tmp_path))
    assert str(guest.qmp) in (await command("define", str(tmp_path / "g1.xml"), status=21)).stderr
    assert (await command.json("show", "g1"))["state"] == "running"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (("<domain", "<domai"), 42, "document:"),
        (("dev='vda'", "dev='vda' bus='floppy'"), 42, "domain/devices/disk/target: bus='floppy' can't be carried out"),
        (("sound model='ich9'", "sound model='loud'"), 42, "domain/devices/sound: libvirt's schema does not allow it"),
        (("<driver name", "<driver new='1' name"), 42, "domain/devices/disk/driver/@new: libvirt's schema"),
        ((">g1<", ">-g1<"), 22, "'-g1'"),
    ],
)
async def test_a_definition_that_is_refused(
    command: Command, tmp_path: Path, change: tuple[str, str], status: int, words: str
) -> None:
    (tmp_path / "g1.xml").write_text(XML.format(folder=tmp_path).replace(*change, 1))
    assert words in (await command("define", str(tmp_path / "g1.xml"), status=status)).stderr
    assert (await command.json("list"))["domains"] == []


async def test_a_file_that_is_not_there(command: Command, tmp_path: Path) -> None:
    assert "No such file" in (await command("define", str(tmp_path / "none"), status=2)).stderr


async def test_a_qemu_that_does_not_start(command: Command, g1: Path) -> None:
    xml = g1.read_text().replace("<sound model='ich9'/>", "<emulator>/bin/false</emulator>")
    g1.write_text(xml)
    await command("define", str(g1))
    failed = await command("start", "g1", status=61)
    assert "it ended with status 1 and said nothing" in failed.stderr
    assert (await command.json("show", "g1"))["state"] == "shut off"


async def test_the_guest_goes_on_without_its_host_process(command: Command, g1: Path) -> None:
    await command("start", "g1")
    pid = (await command.json("show", "g1"))["pid"]
    first = owner(command.state_dir)
    await asyncio.to_thread(stop_host, command.state_dir, signal.SIGKILL)
    assert born(pid) is not None
    assert (await command.json("show", "g1"))["pid"] == pid
    assert owner(command.state_dir) != first


async def test_a_crash_is_said_to_who_listens(command: Command, g1: Path) -> None:
    await command("start", "g1")
    pid = (await command.json("show", "g1"))["pid"]
    following = await command.start("events", "g1", "--since", "0", "--follow")
    os.kill(pid, signal.SIGKILL)
    assert following.stdout is not None
    while line := (await asyncio.wait_for(following.stdout.readline(), 60)).decode():
        if "domain-crashed" in line:
            break
    assert "killed by SIGKILL" in line
    following.send_signal(signal.SIGINT)
    assert (await command.ends(following)).status == 130
    assert (await command.json("show", "g1"))["state"] == "shut off"
