"""The order of what reaches the disk and what is sent to QEMU, of every operation, from a trace of its system calls."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from matrix import set_up, world_of
from operations import OPERATIONS
from worlds import TARGETS, Stage, World, playground

from blockferry.testing.crash import Crasher
from blockferry.testing.trace import Call, read_trace, strace

WAL = "journal.sqlite-wal"
ANSWER = r'"{\"boundaries\"'  # what the process that carries out requests says at its end
CLOSES = ("job-dismiss", "blockdev-del")
# What is sent after the record, and only then: the guest goes on, jobs are forgotten, images are closed, QEMU is ended. Of a
# mirror that is begun nothing is: what depends on its record is the answer.
DEPENDS: dict[str, tuple[str, ...]] = {
    "snapshot": (),
    "mirrored-snapshot": (),
    "copy": (),
    "pivot": ("cont", *CLOSES),
    "pivot-3": ("cont", *CLOSES),
    "finish": ("cont", *CLOSES),
    "cancel": ("job-cancel", *CLOSES),
    "reopen": ("cont", *CLOSES),
    "remove-mirror": ("job-cancel", *CLOSES),
    "rebase": ("cont", "blockdev-del"),
    "commit-active": ("cont", *CLOSES),
    "commit-middle": CLOSES,
    "delete": CLOSES,
    "resume": ("cont", *CLOSES),
    "start": ("cont",),
    "start-after-a-crash": ("cont",),
    "stop": ("stop", "block-job-cancel", "job-finalize", "quit"),
    "revert": ("cont",),
}
# Several operations each, one after the other: what depends on a record is what comes after it in the same pause.
MOVES = ("move", "move-mirror", "move-chain", "move-shared", "move-resume", "move-cancel")
REMOVED = {"move-mirror": TARGETS, "move-shared": ("vdb",)}
LOOKS = ("query-", "x-debug-query-", "qom-", "qmp_capabilities")
# QEMU writes the image's header when it finalizes these, and flushes nothing.
HEADERS = ("rebase", "commit-middle", "delete")


@dataclass(frozen=True)
class Traced:
    """An operation's system calls, in order, and where the folders of its world are."""

    calls: Sequence[Call]
    state: str
    images: tuple[str, str]

    def named(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.name in names]

    def sent(self) -> list[Call]:
        """The QMP commands."""
        return [call for call in self.calls if call.command is not None]

    def acts(self) -> list[tuple[str, Call]]:
        """What changes something, by what it is: QMP commands that don't only look, and the removing of images."""
        found = [(str(call.command), call) for call in self.sent() if not str(call.command).startswith(LOOKS)]
        found += [("unlink", call) for call in self.named("unlink") if os.path.dirname(call.path) in self.images]
        return sorted(found, key=lambda act: act[1].began)

    def wal(self) -> list[Call]:
        """What is written to the journal."""
        return [call for call in self.named("pwrite64") if call.path == f"{self.state}/{WAL}"]

    def records(self) -> list[tuple[Call, Call]]:
        """Of each point of no return, its first write and the flush after its last."""
        found = []
        marks = [call for call in self.named("write") if call.path.endswith("/marks")]
        for before, after in itertools.pairwise(marks):
            if '"before record' in before.text:
                assert '"after record' in after.text
                inside = [call for call in self.wal() if before.ended < call.began < after.began]
                assert inside, "nothing is written of the record"
                found.append((inside[0], self.flush_of(inside[-1], until=after)))
        return found

    def flush_of(self, written: Call, *, until: Call, path: str | None = None) -> Call:
        """The flush of a file, or of `path` for it, that began after the write had ended and ended before something else did."""
        for call in self.calls:
            flushes = call.flushes and call.path == (path or written.path)
            if flushes and written.ended < call.began and call.ended < until.began:
                return call
        raise AssertionError(f"{path or written.path} is not flushed before: {until.text}")


@dataclass(frozen=True)
class Tracer:
    """A host process under strace, and where its trace is."""

    stage: Stage
    trace: Path

    async def run(self, name: str, folder: Path) -> Traced:
        operation = OPERATIONS[name]
        async with world_of(operation, self.stage, folder, proxied=False) as world:
            await set_up(world, operation)
            return await asyncio.to_thread(self._traced, world, name)

    def _traced(self, world: World, name: str) -> Traced:
        before = self.trace.stat().st_size if self.trace.exists() else 0
        requests = OPERATIONS[name].itself(world)
        marks = world.folder / "marks"
        result = self.stage.crasher.run(world.state_dir, requests, to_the_end=True, marks=marks)
        assert result.error is None, result.error
        with self.trace.open() as trace:
            trace.seek(before)
            calls = read_trace(trace.read())
        return Traced(calls, str(world.state_dir), (str(world.folder / "src"), str(world.folder / "dst")))


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    """What is sent to QEMU 7.2 is sent to 10 in the same order."""
    folder = tmp_path_factory.mktemp("trace")
    with Stage.open("distribution", folder) as stage, Crasher(strace(folder / "trace")) as crasher:
        yield Tracer(Stage(stage.version, stage.binaries, crasher, stage.template), folder / "trace")


@pytest.mark.parametrize("name", DEPENDS)
def test_what_a_command_depends_on_is_on_disk_before_it_is_sent(name: str, tracer: Tracer, tmp_path: Path) -> None:
    with playground(tmp_path) as folder:
        traced = asyncio.run(tracer.run(name, folder / name))
    require_journal_before_commands(traced)
    require_files_before_records(traced)
    require_record_before_what_depends(traced, DEPENDS[name])
    if name in HEADERS:
        require_headers_before_records(traced)


@pytest.mark.parametrize("name", MOVES)
def test_a_move_records_each_of_its_steps_before_what_depends_on_it(name: str, tracer: Tracer, tmp_path: Path) -> None:
    with playground(tmp_path) as folder:
        traced = asyncio.run(tracer.run(name, folder / name))
    require_journal_before_commands(traced)
    pauses = records_within_pauses(traced)
    assert pauses or name == "move-cancel"
    require_copies_before_records(traced, pauses)
    sources = {f"{traced.images[0]}/{target}.img" for target in TARGETS}
    removed = removed_sources(traced, sources, pauses)
    wanted = {f"{traced.images[0]}/{target}.img" for target in REMOVED.get(name, ())}
    assert removed == wanted, "what is removed is what was asked for"
    answer = next(call for call in traced.named("write") if ANSWER in call.text)
    assert traced.records()[-1][1].ended < answer.began


def test_a_new_journal_is_found_again(tmp_path: Path) -> None:
    """The state directory's name, and those of the folders that are made for it, are on disk before the first transaction."""
    state = tmp_path / "new/state"
    code = (
        "import sys; from pathlib import Path; from blockferry import hostprocess; from blockferry.journal import journal;"
        "state = hostprocess.StateDir(sys.argv[1]); hostprocess.prepare_state_dir(state);"
        "journal.Journal(state.path / 'journal.sqlite').close()"
    )
    traced = [*strace(tmp_path / "trace"), sys.executable, "-c", code, str(state)]
    subprocess.run(traced, check=True, timeout=60)
    calls = read_trace((tmp_path / "trace").read_text())
    committed = next(call for call in calls if call.flushes and call.path == f"{state}/{WAL}")
    flushed = [call.path for call in calls if call.flushes and call.ended < committed.began]
    assert {str(tmp_path), str(state.parent), str(state)} <= set(flushed)


def require_journal_before_commands(traced: Traced) -> None:
    """What is in the journal when a command is sent is on disk, and so is the name of the journal's new file."""
    made = [call for call in traced.named("openat") if call.path.endswith(WAL) and "O_CREAT" in call.text]
    sent = traced.sent()
    assert sent
    assert made
    for command in sent:
        written = [call for call in traced.wal() if call.began < command.began]
        if written:
            traced.flush_of(written[-1], until=command)
            traced.flush_of(made[0], until=command, path=traced.state)


def require_files_before_records(traced: Traced) -> None:
    """A file that was made is on disk, and so is its name, before the record."""
    for made in traced.calls:
        if made.creates and os.path.dirname(made.path) in traced.images:
            record = next(first for first, _flush in traced.records() if first.began > made.began)
            traced.flush_of(made, until=record, path=os.path.dirname(made.path))
            traced.flush_of(made, until=record)


def require_record_before_what_depends(traced: Traced, commands: tuple[str, ...]) -> None:
    """A record is on disk before the first command that depends on it is sent, a file removed, or the caller told."""
    records = traced.records()
    assert records
    for first, _flush in records:
        before = [what for what, act in traced.acts() if act.began < first.began]
        assert before[-1:] not in ([command] for command in (*commands, "unlink")), f"{before[-1]} precedes its record"
    _first, flush = records[-1]
    after = [what for what, act in traced.acts() if act.began > flush.ended]
    assert set(commands) <= set(after), f"not sent after the record: {set(commands) - set(after)}"
    answer = next(call for call in traced.named("write") if ANSWER in call.text)
    assert flush.ended < answer.began


def records_within_pauses(traced: Traced) -> list[tuple[Call, Call]]:
    """The guest goes on only when what it is on by then is on disk: the record of it, in each pause."""
    records, found, stopped = traced.records(), [], None
    for what, act in traced.acts():
        if what == "stop":
            stopped = act
        elif what == "cont":
            assert stopped is not None
            began, until = stopped.ended, act.began
            inside = [(first, flush) for first, flush in records if first.began > began and flush.ended < until]
            assert inside, "the guest goes on without a record"
            found += inside
            stopped = None
    return found


def require_copies_before_records(traced: Traced, pauses: Sequence[tuple[Call, Call]]) -> None:
    """A file's name is on disk before the next record, and its contents before the record that the guest is on it."""
    for made in traced.calls:
        if made.creates and os.path.dirname(made.path) in traced.images:
            record = next(first for first, _flush in traced.records() if first.began > made.began)
            traced.flush_of(made, until=record, path=os.path.dirname(made.path))
            for first, _flush in pauses:
                if first.began > made.began:
                    traced.flush_of(made, until=first)


def removed_sources(traced: Traced, sources: set[str], pauses: Sequence[tuple[Call, Call]]) -> set[str]:
    """What the guest came from is removed only when it is on record that it is elsewhere."""
    unlinks = [each for each in traced.named("unlink") if each.path in sources]
    for removed in unlinks:
        assert pauses[0][1].ended < removed.began, f"{removed.path} is removed too soon"
        assert any(removed.ended < call.began for call in traced.wal()), "nothing is written of its removal"
    return {each.path for each in unlinks}


def require_headers_before_records(traced: Traced) -> None:
    """Between the finalize of a job that rewrites an image's header and the record, the image is flushed."""
    for finalize in [act for what, act in traced.acts() if what == "job-finalize"]:
        record = next(first for first, _flush in traced.records() if first.began > finalize.began)
        between = [call for call in traced.calls if finalize.ended < call.began and call.ended < record.began]
        assert any(call.flushes and os.path.dirname(call.path) in traced.images for call in between)
