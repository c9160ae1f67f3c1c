import os
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blockferry.testing import (
    ImageDamagedError,
    MissingComponentError,
    NbdServer,
    QemuBinaries,
    StartError,
    TestQemu,
    ToolError,
    blockdev_disk,
    blockdev_node,
    check_image,
    compare_images,
    find_qemu,
    image_sha256,
    legacy_drive,
    make_image,
    processors,
    write_pattern,
)
from blockferry.testing.launcher import Bus

MIB = 1024 * 1024


def test_missing_qemu_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKFERRY_QEMU10_DIR", str(tmp_path))
    with pytest.raises(MissingComponentError, match=r"qemu-system-x86_64 .*run: make setup"):
        find_qemu("qemu10")


async def test_both_sockets_answer(qemu: QemuBinaries, tmp_path: Path, disks: list[str]) -> None:
    async with TestQemu(qemu, tmp_path, args=disks) as guest:
        assert (await guest.command("query-status"))["status"] == "prelaunch"
        product = QMPClient("product")
        await product.connect(str(guest.qmp))
        block = await product.execute("query-block")
        assert isinstance(block, list)
        assert {disk["inserted"]["node-name"][:2] for disk in block} == {"d0", "#b"}
        await product.disconnect()
        with pytest.raises(ExecuteError, match="no-such"):
            await guest.command("no-such")
        assert guest.alive
    assert not guest.alive


async def test_runs_into_firmware(qemu: QemuBinaries, tmp_path: Path, disks: list[str]) -> None:
    async with TestQemu(qemu, tmp_path, args=disks, machine="q35", paused=False) as guest:
        assert (await guest.command("query-status"))["status"] == "running"


async def test_bad_argument_shows_stderr(qemu: QemuBinaries, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no-such-device"):
        await TestQemu(qemu, tmp_path, args=["-device", "no-such-device"]).start()


async def test_kill(qemu: QemuBinaries, tmp_path: Path) -> None:
    guest = TestQemu(qemu, tmp_path)
    await guest.start()
    pid = guest.pid
    await guest.kill()
    assert not guest.alive
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await guest.stop()


@pytest.mark.parametrize("bus", ["virtio", "scsi", "ide", "sata", "nvme", "usb"])
async def test_every_bus(qemu: QemuBinaries, tmp_path: Path, bus: Bus) -> None:
    image = make_image(qemu, tmp_path / "disk,with comma.raw", "raw", MIB)
    args = blockdev_disk("d0", image, "raw", bus=bus, qdev_id="disk0")
    async with TestQemu(qemu, tmp_path, args=args) as guest:
        assert any("disk0" in disk["qdev"] for disk in await guest.command("query-block"))


async def test_explicit_chain_and_legacy_ide(qemu: QemuBinaries, tmp_path: Path) -> None:
    base = make_image(qemu, tmp_path / "base.raw", "raw", MIB)
    top = make_image(qemu, tmp_path / "top.qcow2", "qcow2", backing=base, backing_fmt="raw")
    ide = make_image(qemu, tmp_path / "i,de.raw", "raw", MIB)
    args = blockdev_node("b0", base, "raw", read_only=True)
    args += blockdev_disk("d0", top, "qcow2", backing="b0", bus="scsi", iothread="io0", addr="0x9")
    args += legacy_drive(ide, "raw", id="old", iface="ide")
    async with TestQemu(qemu, tmp_path, args=args) as guest:
        nodes = {node["node-name"]: node for node in await guest.command("query-named-block-nodes")}
        assert nodes["d0"]["image"]["backing-image"]["filename"] == str(base)
        assert {disk["device"] for disk in await guest.command("query-block")} == {"", "old"}


def test_iothread_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no iothread"):
        blockdev_disk("d0", tmp_path, "raw", bus="ide", iothread="io0")


def test_images(qemu: QemuBinaries, tmp_path: Path) -> None:
    raw = make_image(qemu, tmp_path / "a.raw", "raw", 4 * MIB)
    base = make_image(qemu, tmp_path / "b.qcow2", "qcow2", 4 * MIB)
    overlay = make_image(qemu, tmp_path / "c.qcow2", "qcow2", backing=base, backing_fmt="qcow2")
    write_pattern(qemu, raw, "raw", MIB, 4096, 0xAB)
    assert not compare_images(qemu, raw, "raw", overlay, "qcow2")
    assert image_sha256(qemu, raw, "raw") != image_sha256(qemu, overlay, "qcow2")
    write_pattern(qemu, overlay, "qcow2", MIB, 4096, 0xAB)
    assert compare_images(qemu, raw, "raw", overlay, "qcow2")
    assert image_sha256(qemu, raw, "raw") == image_sha256(qemu, overlay, "qcow2")
    longer = make_image(qemu, tmp_path / "e.raw", "raw", 8 * MIB)
    write_pattern(qemu, longer, "raw", MIB, 4096, 0xAB)
    assert not compare_images(qemu, raw, "raw", longer, "raw")
    check_image(qemu, raw, "raw")
    check_image(qemu, overlay, "qcow2")
    with pytest.raises(ToolError, match=r"missing\.raw"):
        compare_images(qemu, raw, "raw", tmp_path / "missing.raw", "raw")
    with pytest.raises(ValueError, match="format"):
        make_image(qemu, tmp_path / "d.qcow2", "qcow2", backing=base)


def test_damaged_image_is_found(qemu: QemuBinaries, tmp_path: Path) -> None:
    image = make_image(qemu, tmp_path / "a.qcow2", "qcow2", 4 * MIB)
    write_pattern(qemu, image, "qcow2", 0, MIB, 1)
    with image.open("r+b") as file:
        file.seek(65536 * 2)  # the first refcount block, in a fresh image
        file.write(bytes(64))
    with pytest.raises(ImageDamagedError):
        check_image(qemu, image, "qcow2")


async def test_nbd_server(qemu: QemuBinaries, tmp_path: Path, disks: list[str]) -> None:
    image = make_image(qemu, tmp_path / "target.qcow2", "qcow2", 64 * MIB)
    server = NbdServer(qemu, image, "qcow2", tmp_path, name="t0")
    async with server, TestQemu(qemu, tmp_path, args=disks) as guest:
        assert server.uri == f"nbd+unix:///t0?socket={tmp_path}/t0.nbd.sock"
        address = {"type": "unix", "path": str(server.socket)}
        target = {"driver": "nbd", "node-name": "t0", "export": "t0", "server": address}
        await guest.command("blockdev-add", target)
        server.suspend()
        server.resume()
        await guest.command("blockdev-del", {"node-name": "t0"})
        await server.kill()
        with pytest.raises(ExecuteError, match=r"[Cc]onnect"):
            await guest.command("blockdev-add", target)


async def test_nbd_server_that_cannot_start(qemu: QemuBinaries, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"missing\.raw"):
        await NbdServer(qemu, tmp_path / "missing.raw", "raw", tmp_path).start()


@pytest.mark.parametrize(("version", "number"), [("7.2.22", 1), ("8.0.4", 1), ("8.1.0", 2), ("10.0.2", 2)])
def test_one_processor_where_translating_is_not_safe_with_two(tmp_path: Path, version: str, number: int) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian 1:{version}+dfsg-7)'\n")
    program.chmod(0o755)
    assert processors(QemuBinaries(program, program, program, program)) == number
