"""Headers that were half written when the power failed: they name again what they did."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rig import FORMATS, MIB, Rig

from blockferry.engine.executor import Executor
from blockferry.model import request as ask
from blockferry.model.files import Renamed
from blockferry.plan.steps import FinalizeJobs, FinalizeStream, Step
from blockferry.qemu.images import Images
from blockferry.qemu.qcow2 import empty_image
from blockferry.qemu.session import LostReply
from blockferry.qemu.tool import ImageError
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk, make_image

SECTOR = 512


class Chain:
    """base.raw <- s1 <- top, and the header of `top` as QEMU writes it when it goes over to base.raw."""

    def __init__(self, qemu: QemuBinaries, folder: Path) -> None:
        self.qemu, self.folder = qemu, folder
        base = make_image(qemu, folder / "base.raw", "raw", MIB)
        self.between = folder / "s1"
        self.make(self.between, base, "raw")
        self.top = folder / "a-longer-name-than-that-of-s1"
        self.make(self.top, self.between, "qcow2")
        self.images = Images(qemu_img=str(qemu.img))
        self.renamed = Renamed(path=str(self.top), was=(str(self.between), "qcow2"), becomes=(str(base), "raw"))
        self.before = self.top.read_bytes()
        self.img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(base))
        self.after = self.top.read_bytes()
        assert self.before[:SECTOR] != self.after[:SECTOR], "the length of the name, and the format"
        assert self.before[SECTOR : 2 * SECTOR] != self.after[SECTOR : 2 * SECTOR], "the name"

    def make(self, path: Path, backing: Path, backing_format: str) -> None:
        contents, length = empty_image(MIB, str(backing), backing_format)
        path.write_bytes(contents.ljust(length, b"\0"))

    def img(self, *arguments: str) -> None:
        subprocess.run([self.qemu.img, *arguments, self.top], check=True)

    def info(self) -> dict[str, str]:
        line = [self.qemu.img, "info", "-U", "--output=json", self.top]
        found: dict[str, str] = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
        return found


@pytest.fixture
def chain(qemu: QemuBinaries, tmp_path: Path) -> Chain:
    return Chain(qemu, tmp_path)


@pytest.mark.parametrize("first", [True, False], ids=["its first sector", "all but that"])
async def test_half_of_a_header(chain: Chain, first: bool) -> None:
    """Either half alone: a name that is cut off, or one with another one's format."""
    new, old = (chain.after, chain.before) if first else (chain.before, chain.after)
    chain.top.write_bytes(new[:SECTOR] + old[SECTOR:])
    found = chain.info()
    pair = (found.get("backing-filename"), found.get("backing-filename-format"))
    assert pair not in (chain.renamed.was, chain.renamed.becomes), "the test tears nothing"
    assert await chain.images.mend_backing(chain.renamed)
    found = chain.info()
    assert (found["backing-filename"], found["backing-filename-format"]) == chain.renamed.was
    assert not await chain.images.mend_backing(chain.renamed)
    chain.img("check", "-q")


async def test_a_name_that_is_not_there(chain: Chain) -> None:
    """As of an image whose header QEMU had never written before blockferry 0.1: its name lay in the first sector."""
    torn = bytearray(chain.after)
    torn[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    chain.top.write_bytes(torn)
    assert "backing-filename" not in chain.info(), "it reads as zeroes"
    assert await chain.images.mend_backing(chain.renamed)
    assert chain.info()["backing-filename"] == str(chain.between)


async def test_whole_headers_are_left_alone(chain: Chain) -> None:
    for whole in (chain.before, chain.after):
        chain.top.write_bytes(whole)
        assert not await chain.images.mend_backing(chain.renamed)
        assert chain.top.read_bytes() == whole
    # A name may be relative, and an old image's format unsaid.
    for name in ("s1", f"../{chain.folder.name}/s1"):
        chain.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name)
        assert not await chain.images.mend_backing(chain.renamed)
        assert chain.info()["backing-filename"] == name
    chain.top.unlink()
    assert not await chain.images.mend_backing(chain.renamed)


async def test_what_somebody_has_open_is_not_mended(chain: Chain) -> None:
    async with TestQemu(chain.qemu, chain.folder, args=blockdev_disk("d0", chain.top, "qcow2")):
        with chain.top.open("r+b") as file:
            file.write(chain.before[:SECTOR])
        torn = chain.top.read_bytes()
        with pytest.raises(ImageError, match="lock"):
            await chain.images.mend_backing(chain.renamed)
        assert chain.top.read_bytes() == torn


async def test_a_data_file_is_not_followed(chain: Chain) -> None:
    """The bit that says so is in the header's first sector, whatever became of the name."""
    torn = bytearray(chain.after)
    torn[79] |= 1 << 2  # of the incompatible features
    torn[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    chain.top.write_bytes(torn)
    with pytest.raises(ImageError, match="another file"):
        await chain.images.mend_backing(chain.renamed)
    assert chain.top.read_bytes() == torn


REBASE = ("rebase", FinalizeStream)
COMMIT = ("commit", FinalizeJobs)


@pytest.mark.parametrize(("what", "finalize"), [REBASE, COMMIT], ids=["in a window", "before the record"])
@pytest.mark.parametrize("first", [True, False], ids=["its first sector", "all but that"])
async def test_the_power_fails_while_a_header_is_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str, finalize: type, first: bool
) -> None:
    """QEMU is gone, and of the header that it was writing one half is on disk: recovery finds it."""
    await rig.snapshot("s1", only=["vda"])
    await rig.snapshot("a-longer-name", only=["vda"])
    await rig.write("vda", 0x21)
    await rig.guest.command("stop")  # flushes, as the guest would
    top, between, base = (Path(file) for file in await rig.chain("vda"))
    really = Executor.do

    async def do(self: Executor, step: Step, claims: Any) -> dict[str, Any]:
        if not isinstance(step, finalize):
            return await really(self, step, claims)
        await rig.guest.kill()
        old = top.read_bytes()
        copy = rig.path / "written"
        copy.write_bytes(old)
        line = [rig.qemu.img, "rebase", "-u", "-f", "qcow2", "-F", FORMATS["vda"], "-b", base, copy]
        await asyncio.to_thread(subprocess.run, line, check=True)
        new = copy.read_bytes()
        halves = (new, old) if first else (old, new)
        top.write_bytes(halves[0][:SECTOR] + halves[1][SECTOR:])
        raise LostReply(what, "the power failed")

    monkeypatch.setattr(Executor, "do", do)
    if what == "rebase":
        await rig.ask(ask.Rebase(domain="vm1", disk="vda", base=str(base)))
    else:
        await rig.ask(ask.Commit(domain="vm1", disk="vda", top=str(between), base=str(base)))
    await rig.heard("domain-gone")
    await rig.settled()
    assert ("job-end", "undone") in await rig.operations()
    line = [rig.qemu.img, "info", "--output=json", top]
    told = await asyncio.to_thread(subprocess.run, line, check=True, capture_output=True)
    found = json.loads(told.stdout)
    assert (found["backing-filename"], found["backing-filename-format"]) == (str(between), "qcow2")
    assert rig.holds("vda", top, "qcow2")
