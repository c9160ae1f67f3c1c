import gzip
import json
import os
import re
import signal
from pathlib import Path

import pytest

from blockferry.testing import (
    GuestError,
    GuestImages,
    MissingComponentError,
    QemuBinaries,
    Records,
    StartedAgainWarning,
    WritingGuest,
    blockdev_disk,
    blockdev_node,
    build_guest,
    check_image,
    legacy_drive,
    make_image,
    processors,
    qemu_version,
    write_pattern,
)

MIB = 1024 * 1024


@pytest.mark.guest
async def test_acknowledged_records_are_on_disk(qemu: QemuBinaries, tmp_path: Path) -> None:
    first = make_image(qemu, tmp_path / "a.qcow2", "qcow2", 64 * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", 64 * MIB)
    # A guest with iothreads that is stopped may hear of a request no more, since 8.2: docs/adr/0025-held-by-their-jobs.md.
    iothread = "io0" if qemu_version(qemu) < (8, 2) else None
    disks = {
        "vda": blockdev_disk("d0", first, "qcow2", iothread=iothread),
        "vdb": legacy_drive(second, "raw"),
    }
    async with WritingGuest(qemu, tmp_path, disks, slots=64) as guest:
        await guest.booted()
        assert guest.pauses_ms() == []
        await guest.qemu.command("stop")
        await guest.qemu.command("cont")
        await guest.progress(100)  # more than the slots: the region was overwritten
        assert len(guest.pauses_ms()) == 1
        assert 0 < guest.pauses_ms()[0] < 10_000
        await guest.kill()
    assert guest.errors == []
    assert min(guest.acked.values()) >= 100
    assert guest.verify("vda", first, "qcow2") == []
    assert guest.verify("vdb", second, "raw") == []
    check_image(qemu, first, "qcow2")

    last = guest.acked["vda"]
    write_pattern(qemu, first, "qcow2", guest.records.offset_bytes(last), 1, 0x58)
    (missing,) = guest.verify("vda", first, "qcow2")
    assert (missing.disk, missing.record) == ("vda", last)
    assert missing.found.startswith("Xlockferry")
    # A whole lost batch, a stale record and a record of another disk are missing, too.
    assert len(guest.verify("vdb", second, "raw", guest.acked["vdb"] + 8)) >= 4
    assert len(guest.verify("vda", second, "raw")) == 64


@pytest.mark.guest
async def test_stop_writing_and_go_on(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    disks = {"sda": blockdev_disk("d0", image, "raw", bus="scsi")}
    async with WritingGuest(qemu, tmp_path, disks, run="same", slots=8192) as guest:
        await guest.booted()
        await guest.acks("sda", at_least=40)
        await guest.stop_writing()
    assert guest.verify("sda", image, "raw") == []
    before = guest.acked["sda"]
    # A guest on the same disk that goes on with the next number.
    async with WritingGuest(qemu, tmp_path, disks, run="same", slots=8192, first=before + 1) as again:
        await again.booted()
        await again.stop_writing()
    assert again.acked["sda"] > before
    whole = Records("same", 8192)
    assert again.verify("sda", image, "raw") == []
    assert whole.missing(image, "sda", before) == [], "the second has written over what the first wrote"


@pytest.mark.guest
async def test_write_errors_are_reported_and_tried_again(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    rule = {"event": "none", "iotype": "write", "errno": 5, "once": True, "sector": 2048 + 8 * 40}
    node = {"driver": "blkdebug", "node-name": "d0", "image": {"driver": "file", "filename": str(image)}}
    disk = [
        "-blockdev",
        json.dumps({**node, "inject-error": [rule]}),
        "-device",
        "virtio-blk-pci,drive=d0,werror=report",
    ]
    async with WritingGuest(qemu, tmp_path, {"vda": disk}) as guest:
        await guest.booted()
        await guest.failed("vda")
        await guest.acks("vda", at_least=60)
    assert guest.errors == [("vda", 40)]
    assert guest.verify("vda", image, "raw") == []


@pytest.mark.guest
async def test_boot_that_fails_shows_why(qemu: QemuBinaries, tmp_path: Path) -> None:
    good = build_guest()
    broken = tmp_path / "initrd.gz"
    broken.write_bytes(gzip.compress(b"no archive"))
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    images = GuestImages(good.kernel, broken)
    async with WritingGuest(qemu, tmp_path, {"vda": legacy_drive(image, "raw")}, images=images) as guest:
        with pytest.raises(GuestError, match=r"(?s)boot: QEMU ended.*Kernel panic"):
            await guest.booted()


@pytest.mark.guest
async def test_a_guest_that_stands_still_shows_where(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", 64 * MIB)
    slow = {"driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": "d1"}
    disks = {
        "vda": blockdev_disk("d0", first, "raw", iothread="io0"),
        "sda": [
            *("-object", "throttle-group,id=slow,x-iops-write=1,x-iops-size=1"),  # a block takes an hour
            *blockdev_node("d1", second, "raw"),
            *("-blockdev", json.dumps(slow)),
            *("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=slow,id=stuck"),
        ],
    }
    async with WritingGuest(qemu, tmp_path, disks) as guest:
        await guest.acks("vda", at_least=100)  # sda is in its first batch by then
        with pytest.raises(
            GuestError, match=r"1 more records on each disk: not within 0\.1 s; .*; still not reached"
        ) as told:
            await guest.progress(timeout=0.1)
        known = str(told.value)
        assert re.search(r"QEMU \d+ used [\d.]+ s of a processor's time in its [\d.]+ s", known)
        assert "status: running\nno jobs\n" in known
        assert re.search(r"disk stuck on slow: \d+ reads \(0 failed\), \d writes \(0 failed\), 0 flushes", known)
        assert re.search(
            r"queue \d of \S+: inuse 1, last-avail-idx (\d+), shadow-avail-idx \1, used-idx (?!\1,)", known
        )
        assert known.count(" RIP=") == processors(qemu)
        assert re.search(r"task:dd +state:D.*\n( \w.*\n)* blkdev_", known), "where the program waits that writes to sda"

        await guest.qemu.command("stop")
        with pytest.raises(GuestError, match="status: paused"):
            await guest.progress(timeout=0.1)

        monkeypatch.setattr("blockferry.testing.stall.ANSWER_S", 1.0)
        guest.qemu.process.signal(signal.SIGSTOP)
        with pytest.raises(GuestError, match="QEMU does not answer within 1 s"):
            await guest.progress(timeout=0.1)
        guest.qemu.process.signal(signal.SIGCONT)


@pytest.mark.guest
async def test_a_guest_whose_writer_dies_says_so(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    disks = {"vda": blockdev_disk("d0", image, "raw")}
    async with WritingGuest(qemu, tmp_path, disks, slots=0) as guest:  # its shell ends where it divides by that
        with pytest.raises(
            GuestError, match=r"(?s)^boot; the program that writes to vda died with status 2; .*console:"
        ):
            await guest.booted()


@pytest.mark.guest
async def test_a_guest_that_does_not_boot_in_time_is_started_again(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    async with WritingGuest(qemu, tmp_path, {"vda": blockdev_disk("d0", image, "raw")}) as guest:
        await guest.qemu.command("stop")
        first = guest.qemu.pid
        with pytest.warns(StartedAgainWarning, match=r"(?s)started again: boot: not within .*status: paused"):
            await guest.booted(timeout=0.1)
        assert guest.qemu.pid != first
        assert guest.records.first == 4, "it writes no record that the first may have written"
        await guest.progress()
        await guest.stop()
    assert guest.verify("vda", image, "raw") == []


@pytest.mark.guest
async def test_a_guest_whose_qemu_aborts_while_it_boots_is_started_again(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.raw", "raw", 64 * MIB)
    async with WritingGuest(qemu, tmp_path, {"vda": blockdev_disk("d0", image, "raw")}) as guest:
        with (tmp_path / "qemu.stderr").open("a") as words:
            words.write("physmem.c:2678: iotlb_to_section: Assertion `section_index < d->map.sections_nb' failed.\n")
        guest.qemu.process.signal(signal.SIGABRT)
        with pytest.warns(StartedAgainWarning, match=r"(?s)boot: QEMU ended; .*iotlb_to_section"):
            await guest.booted()
        guest.qemu.process.signal(signal.SIGABRT)
        with pytest.raises(GuestError, match="QEMU ended"):
            await guest.progress()


def test_records_found_and_missing(tmp_path: Path) -> None:
    records = Records("run", slots=4, start_bytes=0, first=0)
    contents = tmp_path / "contents"
    # 6 acknowledged, slots hold 4, 5, 6, 3; then slot 3 gets 7 (in flight), slot 0 an older record.
    contents.write_bytes(b"".join(records.block("vda", number) for number in (4, 5, 6, 3)))
    assert records.missing(contents, "vda", 6) == []
    contents.write_bytes(b"".join(records.block("vda", number) for number in (0, 5, 6, 7)))
    assert [missing.record for missing in records.missing(contents, "vda", 6)] == [4]
    contents.write_bytes(b"".join(records.block("vda", number) for number in (4, 5, 5, 7)))
    assert [missing.record for missing in records.missing(contents, "vda", 6)] == [6]
    torn = records.block("vda", 4)[:2048] + records.block("vda", 0)[2048:]
    contents.write_bytes(torn + b"".join(records.block("vda", number) for number in (5, 6, 3)))
    assert [missing.record for missing in records.missing(contents, "vda", 6)] == [4]
    contents.write_bytes(b"")
    assert [missing.found for missing in records.missing(contents, "vda", 0)] == ["zeroes"]


def test_initramfs_is_built_once(tmp_path: Path) -> None:
    first = build_guest(tmp_path)
    written = first.initrd.stat().st_mtime_ns
    assert build_guest(tmp_path) == first
    assert first.initrd.stat().st_mtime_ns == written
    assert os.listdir(tmp_path) == [first.initrd.name]  # names only
    assert gzip.decompress(first.initrd.read_bytes()).startswith(b"070701")


def test_missing_kernel_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_GUEST_KERNEL", str(tmp_path / "vmlinuz"))
    with pytest.raises(MissingComponentError, match=r"run: scripts/guest-kernel\.sh"):
        build_guest(tmp_path)
