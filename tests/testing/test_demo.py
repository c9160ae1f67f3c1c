"""`make demo`, for real."""

import asyncio
import re
import sys

import pytest


@pytest.mark.guest
async def test_the_demo_loses_nothing_and_says_so() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "blockferry.testing.demo",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    for target in ("vda", "vdb"):
        acknowledged = re.search(rf"^{target}: (\d+) writes acknowledged, 0 missing", said, re.MULTILINE)
        assert acknowledged is not None, said
        assert int(acknowledged[1]) > 600
    assert re.search(r"stood still for [\d.]+ and [\d.]+ ms", said), said
    assert "mirror" in said
    assert re.search(r"MiB/s +\d:\d\d left", said), "no progress with rate and time left"
