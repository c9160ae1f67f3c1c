"""Who sees to files that are being filled: for as long as they are, and not for a moment."""

import asyncio

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
        self._written: dict[WriteOut, tuple[str, ...]] = {}

        async def begin(of: WriteOut, paths: frozenset[str]) -> None:
            self._written[of] = tuple(sorted(paths))
            self._say("begin", of)

        async def close(of: WriteOut) -> None:
            self._say("close", of)

        monkeypatch.setattr(WriteOut, "begin", begin)
        monkeypatch.setattr(WriteOut, "close", close)

    def _say(self, what: str, of: WriteOut) -> None:
        self.said.append((what, self._written.get(of, ())))
        self._more.set()

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
    assert kept.said == [("close", ())]


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


async def test_what_lies_in_memory_has_nothing_to_be_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def in_memory(files: frozenset[str]) -> frozenset[str]:
        return files & {"/a", "/b"}

    monkeypatch.setattr(filling, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(filling, "in_memory", in_memory)
    kept = Kept(monkeypatch)
    kept.now("/a", "/b", "/c")
    await kept.says(1)
    assert kept.said == [("begin", ("/c",))]
    kept.now()
    await asyncio.gather(*kept.tasks)


async def test_an_export_is_flushed_until_it_is_full_or_its_server_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: asyncio.Queue[str] = asyncio.Queue()
    answers: asyncio.Queue[str | None] = asyncio.Queue()

    async def flushes(uri: str, _seconds: float) -> str | None:
        flushed.put_nowait(uri)
        return await answers.get()

    monkeypatch.setattr(filling, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(filling, "pause_after", lambda _seconds: 0.0)
    monkeypatch.setattr(filling, "flushes", flushes)
    kept = Kept(monkeypatch)
    kept.now("nbd://h/x")
    for answer in (None, None, "it can't flush"):
        async with asyncio.timeout(10):
            assert await flushed.get() == "nbd://h/x"
        answers.put_nowait(answer)
    for _turn in range(20):
        await asyncio.sleep(0)
    kept.now()
    await asyncio.gather(*kept.tasks)
    assert flushed.empty()
    assert kept.said == [("begin", ()), ("close", ())]
