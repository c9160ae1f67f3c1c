"""Doctor on real guests: nothing to say of one that is well, and each thing that is broken is named."""

import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from defined import Defined, open_defined
from rig import MIB, SIZE, Rig, header

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.flags import SnapshotDelete
from blockferry.testing import QemuBinaries, make_image


@pytest.fixture
async def guest(qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Defined]:
    """Defined, shut off."""
    monkeypatch.setenv("BLOCKFERRY_QEMU_DIR", str(qemu.system.parent))
    async with open_defined(qemu, tmp_path) as guest:
        yield guest


async def doctor(of: Rig | Defined, name: str | None) -> list[view.Finding]:
    """What is found that is not in order."""
    found: view.Findings = await of.ask(ask.Doctor(domain=name))
    assert found.problems == sum(finding.severity == "problem" for finding in found.findings)
    return [finding for finding in found.findings if finding.severity != "ok"]


async def only(rig: Rig, code: str, severity: str = "problem") -> view.Finding:
    """The one thing that is found of vm1; and that nothing was changed by looking."""
    before = await rig.state()
    (finding,) = await doctor(rig, "vm1")
    assert (finding.severity, finding.code, finding.domain) == (severity, code, "vm1")
    assert await rig.state() == before
    return finding


def typed(qemu: QemuBinaries, line: str) -> None:
    """What a finding says is to be typed, typed."""
    subprocess.run(line.replace("qemu-img", str(qemu.img)).split(), check=True, timeout=20)


def put_into(path: Path, old: str, new: str) -> None:
    """Overwrite the first place in a file, which stays the same file."""
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(old.encode()))
        file.write(new.encode())


async def test_a_healthy_guest_has_no_problems(rig: Rig) -> None:
    assert await doctor(rig, "vm1") == []
    await rig.snapshot("s1", ("vda", "sda"))
    await rig.copy("vdb")
    await rig.ready("vda", "vdb", "sda")
    before = await rig.state()
    found = await doctor(rig, "vm1")
    assert await rig.state() == before
    assert {finding.code for finding in found} == {"in-progress"}, "what goes on is said, with what to type"
    assert all(finding.next[0].startswith("blockferry ") for finding in found)
    await rig.reopen_service()
    assert {finding.code for finding in await doctor(rig, "vm1")} == {"in-progress"}
    shown = await rig.ask(ask.Doctor(domain="vm1"))
    assert {finding.code for finding in shown.findings if finding.severity == "ok"} == {
        *("reachable", "qemu-able", "graph-agrees", "chains-open", "jobs-agree", "nodes-used", "snapshots-whole"),
    }


async def test_an_unknown_domain_is_an_error(rig: Rig) -> None:
    with pytest.raises(errors.NoSuchDomain):
        await doctor(rig, "nobody")


async def test_a_snapshots_file_that_was_removed(rig: Rig) -> None:
    await rig.layers(2, only=("vda",))
    os.unlink(rig.layer("vda", 0))
    (finding,) = await doctor(rig, "vm1")
    assert (finding.code, finding.disk) == ("image-deleted", "vda")
    assert rig.layer("vda", 0) in finding.text
    # What is to be typed saves it: the guest goes on on a file that is there, with all that it had.
    assert finding.next == ("blockferry copy vm1 vda NEWFILE --pivot",)
    await rig.copy("vda")
    await rig.ready("vda")
    await rig.pivot("vda")
    assert "image-deleted" not in {each.code for each in await doctor(rig, "vm1")}


async def test_a_snapshots_file_that_no_chain_has(rig: Rig) -> None:
    await rig.snapshot("s1", only=("vda",))
    await rig.copy("vda")
    await rig.ready("vda")
    await rig.pivot("vda")
    os.unlink(rig.layer("vda", 1))
    finding = await only(rig, "snapshot-image-missing")
    assert rig.layer("vda", 1) in finding.text
    assert finding.next == ("blockferry snapshot delete vm1 s1 --metadata",)
    await rig.delete("s1", SnapshotDelete.METADATA_ONLY)
    assert await doctor(rig, "vm1") == []


async def test_a_header_that_was_rebased_by_hand(rig: Rig) -> None:
    await rig.layers(2, only=("vda",))
    base, overlay = rig.source("vda"), Path(rig.layer("vda", 1))
    other = make_image(rig.qemu, rig.path / "oth.img", "qcow2", SIZE)
    # qemu-img refuses to write to what QEMU has open: a name of the same length is put into the header as it is.
    put_into(overlay, str(base), str(other))
    finding = await only(rig, "header-differs")
    assert finding.disk == "vda"
    assert str(other) in finding.text
    assert finding.next == (f"qemu-img rebase -u -f qcow2 -F qcow2 -b {base} {overlay}",)
    await rig.guest.kill()
    assert "qemu-gone" in {each.code for each in await doctor(rig, "vm1")}
    typed(rig.qemu, finding.next[0])
    assert header(rig.qemu, overlay)["backing-filename"] == str(base)


async def test_a_node_of_ours_that_is_left_over(rig: Rig) -> None:
    stray = make_image(rig.qemu, rig.path / "stray.img", "qcow2", MIB)
    tag = rig.service._desk.journal.tag
    name = f"bf{tag}-99-vda-x"
    options = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(stray)}}
    await rig.guest.command("blockdev-add", options)
    finding = await only(rig, "node-left")
    assert str(stray) in finding.text
    typed = json.loads(finding.next[0])
    await rig.guest.command(typed["execute"], typed["arguments"])
    assert await doctor(rig, "vm1") == []


async def test_a_job_of_ours_that_nobody_knows(rig: Rig) -> None:
    tag = rig.service._desk.journal.tag
    image = make_image(rig.qemu, rig.path / "stray.img", "qcow2", SIZE)
    await rig.guest.command(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "theirs", "file": {"driver": "file", "filename": str(image)}},
    )
    arguments = {"job-id": f"bf{tag}-99-sda-m", "device": "d2", "target": "theirs", "sync": "full"}
    await rig.guest.command("blockdev-mirror", arguments)
    finding = await only(rig, "job-unknown")
    typed = json.loads(finding.next[0])
    await rig.guest.command(typed["execute"], typed["arguments"])


async def test_a_file_of_ours_that_is_left_over(rig: Rig) -> None:
    await rig.copy("vda")
    await rig.ready("vda")
    await rig.ask(ask.CancelJobs(domain="vm1", disks=("vda",)))
    finding = await only(rig, "file-left", "note")
    assert str(rig.dest("vda")) in finding.text
    assert finding.next == (f"blockferry copy vm1 vda {rig.dest('vda')} --resume", f"rm {rig.dest('vda')}")
    typed(rig.qemu, finding.next[1])
    assert await doctor(rig, "vm1") == []


async def test_a_finished_copy_is_no_leftover_and_what_is_under_it_neither(rig: Rig) -> None:
    await rig.snapshot("s1", only=("vda",))
    await rig.copy("vda", base=str(rig.source("vda")))
    await rig.ready("vda")
    await rig.finish("vda")
    assert await doctor(rig, "vm1") == []


async def test_what_a_pivot_left_is_named(rig: Rig) -> None:
    """The overlay that the guest was on before: it was made here, and is in no chain now."""
    await rig.snapshot("s1", ("vda",), only=("vda",))
    await rig.ready("vda")
    await rig.delete("s1", SnapshotDelete.REOPEN_MIRROR)
    finding = await only(rig, "file-left", "note")
    assert finding.next == (f"rm {rig.layer('vda', 1)}",)


async def test_a_guest_that_was_started_on_its_old_image(rig: Rig) -> None:
    """As who forgets that there was a snapshot: the graph is not what the journal left.

    What it left is nothing to remove, though no chain has it and no snapshot is remembered.
    """
    await rig.snapshot("s1", only=("sda",))
    await rig.delete("s1", SnapshotDelete.METADATA_ONLY)
    node = (await rig.nodes())["d2"]
    assert node["drv"] == "qcow2"
    # Somebody commits the overlay away under us.
    overlay = next(name for name in await rig.our_nodes() if name.endswith("-s"))
    job = {"job-id": "theirs", "device": overlay, "base-node": "d2", "auto-dismiss": False}
    with rig.guest.control.listener(("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED")) as listener:
        await rig.guest.command("block-commit", job)
        await listener.get()
        await rig.guest.command("block-job-complete", {"device": "theirs"})
        await listener.get()
    found = {finding.code: finding for finding in await doctor(rig, "vm1")}
    assert found["disk-elsewhere"].severity == "problem"
    assert found["disk-elsewhere"].disk == "sda"
    assert "operation 1 left it on" in found["disk-elsewhere"].text
    assert "file-left" not in found


async def test_a_qemu_that_was_killed(rig: Rig) -> None:
    await rig.snapshot("s1", only=("vda",))
    await rig.guest.kill()
    found = {finding.code: finding for finding in await doctor(rig, "vm1")}
    assert found["qemu-gone"].severity == "problem"
    assert found["qemu-gone"].next[-1] == "blockferry detach vm1"
    assert rig.layer("vda", 1) in found["start-on"].text
    assert "file-left" not in found, "nobody knows what it is started on"


async def test_a_mirror_that_was_lost(rig: Rig) -> None:
    await rig.snapshot("s1", ("vda",), only=("vda",))
    await rig.ready("vda")
    (job,) = await rig.qemu_jobs()
    await rig.guest.command("job-cancel", {"id": job})
    await rig.heard("mirror-dropped", "vda")
    (finding,) = await doctor(rig, "vm1")
    assert (finding.code, finding.severity) == ("mirror-lost", "problem")
    assert finding.next == ("blockferry snapshot delete vm1 s1 --remove-mirror",)
    await rig.delete("s1", SnapshotDelete.REMOVE_MIRROR)
    assert {finding.code for finding in await doctor(rig, "vm1")} <= {"file-left"}


# --- guests that we start -------------------------------------------------------------------------------------


async def test_a_defined_guest_is_well_shut_off_and_running(guest: Defined) -> None:
    assert await doctor(guest, "g1") == []
    await guest.start()
    await guest.snapshot("s1", ("vda",))
    await guest.ready("vda")
    assert await doctor(guest, "g1") == []
    await guest.stop()
    (finding,) = await doctor(guest, "g1")
    assert (finding.severity, finding.code, finding.next) == ("note", "mirror-resting", ("blockferry start g1",))
    typed(guest.qemu, f"qemu-img resize -q -f qcow2 {guest.dest('vda', 's1')} {2 * SIZE}")
    (finding,) = await doctor(guest, "g1")
    assert (finding.severity, finding.code) == ("problem", "mirror-gone")
    assert f"it has {2 * SIZE} bytes now" in finding.text
    guest.dest("vda", "s1").unlink()
    found = {finding.code: finding for finding in await doctor(guest, "g1")}
    assert found["mirror-gone"].severity == "problem"
    assert "it is not there any more" in found["mirror-gone"].text


async def test_a_crash_is_told_until_it_is_started_again(guest: Defined) -> None:
    await guest.start()
    await guest.kill()
    (finding,) = await doctor(guest, "g1")
    assert (finding.code, finding.next) == ("crashed", ("blockferry start g1",))
    assert "SIGKILL" in finding.text
    await guest.start()
    assert await doctor(guest, "g1") == []


async def test_what_a_definition_lacks(guest: Defined) -> None:
    xml = (await guest.ask(ask.ShowDomain(domain="g1", inactive=True))).xml or ""
    kernel = guest.path / "no-kernel"
    booted = xml.replace("</os>", f"<kernel>{kernel}</kernel></os>").replace(
        "<devices>", "<devices><sound model='ac97'/>"
    )
    await guest.ask(ask.Define(xml=booted))
    (guest.path / "vdb").rename(guest.path / "vdb.away")
    found = {finding.code: finding for finding in await doctor(guest, "g1")}
    assert set(found) == {"image-unusable", "boot-file-missing", "not-carried-out"}
    assert found["image-unusable"].disk == "vdb"
    assert str(kernel) in found["boot-file-missing"].text
    (guest.path / "vdb.away").rename(guest.path / "vdb")
    await guest.ask(ask.Define(xml=xml))
    assert await doctor(guest, "g1") == []


async def test_a_base_whose_format_nobody_names(guest: Defined) -> None:
    base, overlay = guest.path / "vda", guest.path / "over"
    make_image(guest.qemu, overlay, "qcow2", SIZE, backing=base, backing_fmt="qcow2")
    # The header extension that names the format becomes one that nobody knows.
    overlay.write_bytes(overlay.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))
    xml = (await guest.ask(ask.ShowDomain(domain="g1", inactive=True))).xml or ""
    await guest.ask(ask.Define(xml=xml.replace(f"'{base}'", f"'{overlay}'").replace(f'"{base}"', f'"{overlay}"')))
    (finding,) = await doctor(guest, "g1")
    assert finding.code == "image-unusable"
    typed(guest.qemu, finding.next[0].replace("FORMAT", "qcow2"))
    assert await doctor(guest, "g1") == []


# --- the host -------------------------------------------------------------------------------------------------


async def test_the_host(guest: Defined, monkeypatch: pytest.MonkeyPatch) -> None:
    (guest.path / "state").chmod(0o700)
    found: view.Findings = await guest.ask(ask.Doctor())
    ours = [each for each in found.findings if str(guest.qemu.system) in each.text]
    assert [(each.severity, each.code) for each in ours] == [("ok", "qemu-able")]
    assert {"state-dir", "qemu-img"} <= {each.code for each in found.findings if each.severity == "ok"}
    (line,) = [each for each in found.findings if each.code == "domain"]
    assert (line.severity, line.domain, line.text) == ("ok", "g1", "defined, shut off, no problems")
    monkeypatch.setenv("BLOCKFERRY_LIBVIRT_SCHEMAS", str(guest.path))
    (guest.path / "vdb").unlink()
    (guest.path / "state").chmod(0o755)
    found = await guest.ask(ask.Doctor())
    told = {each.code: each for each in found.findings if each.severity != "ok"}
    assert told["schema-missing"].next == ("apt-get install libvirt0",)
    assert told["state-dir-open"].next == (f"chmod 700 {guest.path / 'state'}",)
    assert (told["domain"].severity, told["domain"].next) == ("problem", ("blockferry doctor g1",))
    assert found.problems == sum(each.severity == "problem" for each in found.findings) >= 2
