import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockferry.testing import Missing, WritingGuest
from blockferry.testing.demo import demo

ANYTHING_S = 90.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """For the demo's own temporary folder; pytest's is too long for a socket in a folder in it."""
    with tempfile.TemporaryDirectory(prefix="bf-") as folder:
        yield Path(folder)


async def start(folder: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "blockferry.testing.demo"],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def command_lines() -> Iterator[str]:
    """Of all processes there are."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace").replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile


def assert_nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert [line for line in command_lines() if str(folder) in line] == []


@pytest.mark.guest
async def test_the_demo_does_the_main_job(folder: Path) -> None:
    process = await start(folder)
    output = (await asyncio.wait_for(process.communicate(), ANYTHING_S))[0].decode()
    assert process.returncode == 0, output
    for command in ("attach vm1", "snapshot create vm1", "show vm1 --xml", "snapshot delete vm1 s1", "copy vm1 vda"):
        assert f"$ blockferry {command}" in output
    assert output.count('job="copy" ready="') == 2, "the live XML has both mirrors"
    assert re.search(r"vda  copying +\d+ %.* MiB of .* MiB  .*MiB/s  \d:\d\d left", output)
    assert re.search(r"vda  \d+ records acknowledged, none is missing  \(dest/vda.raw\)", output)
    assert re.search(r"vdb  \d+ records acknowledged, none is missing  \(dest/vdb.s1\)", output)
    assert "vda  the 100 MiB that lay on it before are all there" in output
    assert re.search(r"The guest's pauses: [\d.]+ ms, [\d.]+ ms\.\n", output), "one for each time that it went over"
    assert re.search(r"vda  snapshot, mirrored +src/vda.s1 <- src/vda.qcow2   => dest/vda.s1\n", output)
    assert "\033" not in output, "no colour where there is no terminal"
    assert_nothing_is_left(folder)


@pytest.mark.guest
async def test_ctrl_c_leaves_nothing_behind(folder: Path) -> None:
    process = await start(folder)
    assert process.stdout is not None
    async with asyncio.timeout(ANYTHING_S):
        while b"vda  copying" not in (line := await process.stdout.readline()):
            assert line, "it ended before it copied"
        process.send_signal(signal.SIGINT)
        output = (await process.communicate())[0].decode()
    assert process.returncode == 130, output
    assert "interrupted; everything is cleaned up" in output
    assert "Traceback" not in output
    assert_nothing_is_left(folder)


@pytest.mark.guest
async def test_a_missing_record_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    verify = WritingGuest.verify

    def one_more(guest: WritingGuest, disk: str, path: Path, fmt: str) -> list[Missing]:
        """Look for the record after the last acknowledged, too; it is lost for sure."""
        return verify(guest, disk, path, fmt, guest.acked[disk] + 1000)

    monkeypatch.setattr(WritingGuest, "verify", one_more)
    assert await demo() == 1
    output = capfd.readouterr().out
    assert "are MISSING, the first: Missing(disk='vda'" in output
    assert "Something IS MISSING" in output
