"""A QEMU that runs as another user, started by root: what it may still do, and whose its files are."""

import grp
import os
import pwd
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from defined import DISK, FORMATS, XML, Defined, open_defined

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries
from blockferry.testing.firmware import idle_firmware

USER = pwd.getpwnam("nobody")
GROUP = grp.getgrgid(USER.pw_gid).gr_name


@pytest.fixture
async def guest(qemu: QemuBinaries, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    """Defined, in a folder that others may pass through."""
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    folder = Path(tempfile.mkdtemp(prefix="blockferry-user-"))
    folder.chmod(0o755)
    try:
        async with open_defined(qemu, folder) as guest:
            yield guest
    finally:
        shutil.rmtree(folder)


def labelled(guest: Defined, label: str, relabel: str = "yes") -> ask.Define:
    disks = "".join(DISK.format(target=each, format=FORMATS[each], file=guest.path / each) for each in FORMATS)
    seclabel = f"<seclabel type='static' model='dac' relabel='{relabel}'><label>{label}</label></seclabel></domain>"
    loader = f"<loader type='rom'>{idle_firmware(guest.path)}</loader></os>"
    return ask.Define(xml=XML.format(disks=disks).replace("</os>", loader).replace("</domain>", seclabel))


def status_of(pid: int | None) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def owner(path: Path) -> tuple[int, int]:
    return path.stat().st_uid, path.stat().st_gid


@pytest.mark.parametrize("label", ["nobody", f"nobody:{GROUP}", f"+{USER.pw_uid}:+{USER.pw_gid}"])
async def test_who_it_is(guest: Defined, label: str) -> None:
    await guest.ask(labelled(guest, label))
    status = status_of((await guest.start()).pid)
    assert set(status["Uid"].split()) == {str(USER.pw_uid)}
    assert set(status["Gid"].split()) == {str(USER.pw_gid)}
    # It can't become anybody else: no capability, and none from a program either; and the filter of -sandbox is on.
    assert (int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"]) == (0, "1", "2")
    assert {owner(guest.path / target) for target in ("vda", "vdb")} == {(USER.pw_uid, USER.pw_gid)}
    # What is ours of it stays ours.
    run = guest.path / "state/run/domains/g1"
    private = [run, *run.iterdir(), guest.path / "state/log/domains/g1.log"]
    assert {owner(path) for path in private} == {(0, 0)}
    assert not any(path.stat().st_mode & 0o077 for path in private)


async def test_snapshots_mirrors_and_commits(guest: Defined) -> None:
    """What QEMU opens later it opens as the user, and can: new images have the owner of those that they stand for."""
    os.chown(guest.path / "dst", USER.pw_uid, USER.pw_gid)
    await guest.ask(labelled(guest, "nobody"))
    await guest.start()
    await guest.snapshot("s1", mirrors=("vda", "vdb"))
    made = [guest.path / "vda.s1", guest.path / "vdb.s1", guest.dest("vda", "s1"), guest.dest("vdb", "s1")]
    assert {owner(path) for path in made} == {(USER.pw_uid, USER.pw_gid)}
    await guest.write("vda", 0x5A)
    await guest.ready("vda", "vdb")
    await guest.stop()
    await guest.start(require_mirrors=True)
    await guest.ready("vda", "vdb")
    flags = SnapshotDelete.REOPEN_MIRROR
    await guest.ask(ask.DeleteSnapshot(domain="g1", snapshot="s1", flags=flags))
    assert await guest.chain("vda") == ["vda.s1", "vda"]
    assert (await guest.disk("vda")).chain[0].file == str(guest.dest("vda", "s1"))
    since = (await guest.ask(ask.ListEvents(since=2**62))).last
    await guest.ask(ask.Commit(domain="g1", disk="vda"))
    async for _event in guest.service.watch("g1", since):
        if await guest.chain("vda") == ["vda"]:
            break
    await guest.stop()
    assert guest.holds("vda", guest.path / "vda", "qcow2")


async def test_what_the_user_can_not_open(guest: Defined) -> None:
    await guest.ask(labelled(guest, "nobody", relabel="no"))
    (guest.path / "vda").chmod(0o600)
    with pytest.raises(errors.OperationFailed, match=r"vda can't be opened by user \d+.*relabel='yes'"):
        await guest.start()
    assert (await guest.show()).state == "shut off"
    assert owner(guest.path / "vda") == (0, 0)
    for target in ("vda", "vdb"):
        os.chown(guest.path / target, USER.pw_uid, USER.pw_gid)
    assert (await guest.start()).state == "running"


async def test_nobody_of_that_name(guest: Defined) -> None:
    await guest.ask(labelled(guest, "no-such-user"))
    with pytest.raises(errors.BadRequest, match="there is no user or group no-such-user"):
        await guest.start()
    with pytest.raises(errors.InvalidXml, match="USER or USER:GROUP"):
        await guest.ask(labelled(guest, "-runas"))


async def test_a_base_is_not_given_away(guest: Defined) -> None:
    """Others may stand on it; it only has to be readable."""
    await guest.start()
    await guest.snapshot("s1", only=("vda",))
    await guest.stop()
    definition = labelled(guest, "nobody").xml.replace(f"{guest.path / 'vda'}'", f"{guest.path / 'vda.s1'}'")
    await guest.ask(ask.Define(xml=definition))
    (guest.path / "vda").chmod(0o600)
    with pytest.raises(errors.OperationFailed, match=r"vda can't be opened"):
        await guest.start()
    (guest.path / "vda").chmod(0o644)
    await guest.start()
    assert owner(guest.path / "vda") == (0, 0)
    assert owner(guest.path / "vda.s1") == (USER.pw_uid, USER.pw_gid)


async def test_nothing_is_open_to_others(guest: Defined) -> None:
    """Whatever the mask of who started us, in the state directory and in what is made beside images."""
    await guest.service.close()
    before = os.umask(0)
    try:
        await guest.reopen_closed()
        await guest.ask(labelled(guest, "nobody"))
        (guest.path / "vda").chmod(0o600)
        await guest.start()
        await guest.snapshot("s1", only=("vda",))
    finally:
        os.umask(before)
    # The state directory itself is the host process's to make: tests/cli/test_hostprocess.py.
    found = [path for path in (guest.path / "state").rglob("*") if path.name not in ("run", "log", "domains")]
    assert {path.name for path in found} >= {"journal.sqlite", "g1", "g1.log", "lock", "qmp.sock"}
    assert {path.name for path in [*found, guest.path / "vda.s1"] if path.stat().st_mode & 0o077} == set()
