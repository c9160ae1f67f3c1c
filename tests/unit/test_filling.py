"""Who sees to files that are being filled: for as long as they are, and not for a moment."""

import asyncio
from collections.abc import Callable

import pytest

from blockferry.engine import filling
from blockferry.engine.filling import Filling
from blockferry.qemu.writeout import WriteOut


class Kept:
    """Files that are being filled, the work that sees to them, and what was begun and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: frozenset[str] = frozenset()
        self.tasks: list[asyncio.Task[None]] = []
        self.said: list[tuple[str, tuple[str, ...]]] = []
        self._more = asyncio.Event()
        self.filling = Filling(lambda: self.files, lambda work: self.tasks.append(asyncio.ensure_future(work)))
        for name in ("begin", "close"):
            monkeypatch.setattr(WriteOut, name, self._say(name))

    def _say(self, name: str) -> Callable[[WriteOut], object]:
        async def say(of: WriteOut) -> None:
            self.said.append((name, of._paths))
            self._more.set()

        return say

    async def says(self, count: int) -> None:
        while len(self.said) < count:
            self._more.clear()
            await self._more.wait()

    def now(self, *files: str) -> None:
        self.files = frozenset(files)
        self.filling.look()


async def test_what_is_full_in_a_moment_gets_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "WORTH_SECONDS", 3600.0)
    kept = Kept(monkeypatch)
    kept.now("/a", "/b")
    await asyncio.sleep(0)
    kept.now("/b")
    kept.now()
    await asyncio.gather(*kept.tasks)
    assert kept.said == [("close", ("/a", "/b"))]


async def test_those_that_come_together_have_one_process_until_all_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "WORTH_SECONDS", 0.0)
    kept = Kept(monkeypatch)
    kept.now("/a", "/b")
    kept.now("/a", "/b")
    await kept.says(1)
    kept.now("/b", "/c")
    await kept.says(2)
    assert len(kept.tasks) == 2
    assert kept.said == [("begin", ("/a", "/b")), ("begin", ("/c",))]
    kept.now("/c")
    await kept.tasks[0]
    assert kept.said[2:] == [("close", ("/a", "/b"))]
    kept.now("/a", "/c")  # another copy to the same file
    await kept.says(4)
    assert kept.said[3:] == [("begin", ("/a",))]
    kept.now()
    await asyncio.gather(*kept.tasks)
    assert sorted(kept.said[4:]) == [("close", ("/a",)), ("close", ("/c",))]
