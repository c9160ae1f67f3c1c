import gzip
import json
import os
from pathlib import Path

import pytest

from blockferry.testing import (
    GuestError,
    GuestImages,
    MissingComponentError,
    QemuBinaries,
    Records,
    WritingGuest,
    blockdev_disk,
    build_guest,
    check_image,
    legacy_drive,
    make_image,
    write_pattern,
)

MIB = 1024 * 1024


@pytest.mark.guest
async def test_acknowledged_records_are_on_disk(qemu: QemuBinaries, tmp_path: Path) -> None:
    first = make_image(qemu, tmp_path / "a.qcow2", "qcow2", 64 * MIB)
    second = make_image(qemu, tmp_path / "b.raw", "raw", 64 * MIB)
    disks = {
        "vda": blockdev_disk("d0", first, "qcow2", iothread="io0"),
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
    assert whole.missing(image, "sda", again.acked["sda"]) == []


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
