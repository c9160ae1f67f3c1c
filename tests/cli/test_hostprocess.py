"""Owning, reaching and starting the host process, with real processes."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandkit import Command, owner, stop

import blockferry
from blockferry import errors
from blockferry.hostprocess import (
    Lock,
    Ownership,
    StateDir,
    connect,
    default_state_dir,
    ensure_running,
    prepare_state_dir,
)
from blockferry.sockets import connect_unix, listen_unix


def ask(connection: socket.socket, path: str = "/v1/health") -> dict[str, object]:
    """GET a path on a connection that there is."""
    client = http.client.HTTPConnection("blockferry")
    client.sock = connection
    client.request("GET", path)
    answer: dict[str, object] = json.loads(client.getresponse().read())
    client.close()
    return answer


def daemon(state_dir: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A host process in the foreground, as a child of ours, once it is ready."""
    receiver, sender = os.pipe()
    command = [sys.executable, "-P", "-m", "blockferry.interfaces.daemon", "--state-dir", str(state_dir)]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(sender), *arguments], pass_fds=[sender], stderr=subprocess.DEVNULL
    )
    os.close(sender)
    with open(receiver) as said:
        assert json.loads(said.read())["kind"] == "serving"
    return process


# --- the directory --------------------------------------------------------------------------------------------


def test_default_state_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BLOCKFERRY_STATE_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state_dir() == Path("/var/lib/blockferry")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "blockferry"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / ".local/state/blockferry"
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", "/here")
    assert default_state_dir() == Path("/here")


def test_everything_is_private(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "deep" / "state")
    before = os.umask(0)
    try:
        prepare_state_dir(state)
        ownership = Ownership.take(state)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (state.path, state.run, state.log.parent)}
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE(state.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.lock.stat().st_mode) == 0o600
    ownership.give_up()


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(errors.StateDirUnusable, match="symbolic link"):
        prepare_state_dir(StateDir(tmp_path / "link"))
    with pytest.raises(errors.StateDirUnusable, match="symbolic link"):
        connect(StateDir(tmp_path / "link"))


def test_someone_elses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
    with pytest.raises(errors.StateDirUnusable, match=f"belongs to user {ours}"):
        prepare_state_dir(StateDir(tmp_path))


def test_one_that_others_may_enter_is_closed_only_when_empty(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    prepare_state_dir(StateDir(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    tmp_path.chmod(0o755)
    with pytest.raises(errors.StateDirUnusable, match="chmod 700"):
        prepare_state_dir(StateDir(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_nobody_connects_where_others_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(errors.StateDirUnusable, match="others may write"):
        connect(StateDir(tmp_path))


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.StateDirUnusable):
        prepare_state_dir(StateDir(tmp_path / "file"))
    with pytest.raises(errors.StateDirUnusable):
        prepare_state_dir(StateDir(tmp_path / "file" / "below"))


# --- sockets and the lock -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [50, 107, 108, 400])
def test_sockets_of_any_path_length(tmp_path: Path, length: int) -> None:
    folder = tmp_path
    while length > len(str(folder)) + 10:
        folder /= "d" * min(200, max(1, length - len(str(folder)) - 10))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("s" * max(1, length - len(str(folder)) - 1))
    before = set(os.listdir("/proc/self/fd"))
    with listen_unix(path) as listener, connect_unix(path) as client:
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ConnectionRefusedError):
        connect_unix(path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_lock_names_its_owner(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    lock = Lock.take(state)
    with pytest.raises(errors.StateDirBusy) as caught:
        Lock.take(state)
    assert caught.value.pid == os.getpid()
    lock.release()
    Lock.take(state).release()


HOLDER = """
import sys, time
from blockferry.hostprocess import Ownership, StateDir, _lock_folder
from pathlib import Path
state = StateDir(Path(sys.argv[1]))
ownership = Ownership.take(state)
doorway = _lock_folder(state)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_locks_of_a_process_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """They go with it, whatever it left in its files: another process may have its number by now."""
    monkeypatch.setattr("blockferry.hostprocess.DOORWAY_SECONDS", 0.3)
    state = StateDir(tmp_path)
    prepare_state_dir(state)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(errors.StateDirBusy) as busy:
                Lock.take(state)
            assert busy.value.pid == holder.pid
            with pytest.raises(errors.StateDirUnusable, match="neither starts nor ends"):
                Ownership.take(state)
        finally:
            holder.send_signal(number)
    assert holder.returncode == -number
    assert state.socket.exists(), "it had no time to remove it"
    state.lock.write_text(f"{os.getppid()}\n")
    assert connect(state) is None
    Ownership.take(state).give_up()


def test_no_connection_is_lost_to_an_idle_end(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    prepare_state_dir(state)
    ownership = Ownership.take(state)
    with connect_unix(state.socket):
        assert not ownership.withdraw(lambda: True), "somebody waits to be accepted"
        accepted, _ = ownership.listener.accept()
        with accepted:
            assert not ownership.withdraw(lambda: False), "it says itself that it is not idle"
    with connect_unix(state.socket):
        accepted, _ = ownership.listener.accept()
        accepted.close()
    assert ownership.withdraw(lambda: True)
    assert connect(state) is None
    ownership.give_up()
    Ownership.take(state).give_up()


# --- the process ----------------------------------------------------------------------------------------------


def test_racing_starters_reach_the_same_process(state_dir: Path) -> None:
    state = StateDir(state_dir)

    def reach(_: int) -> object:
        with ensure_running(state) as connection:
            return ask(connection)["pid"]

    with ThreadPoolExecutor(6) as pool:
        pids = set(pool.map(reach, range(6)))
    assert pids == {owner(state_dir)}


def test_a_killed_one_is_replaced(state_dir: Path) -> None:
    state = StateDir(state_dir)
    ensure_running(state).close()
    first = owner(state_dir)
    stop(state_dir, signal.SIGKILL)
    assert state.socket.exists(), "kill -9 leaves the socket behind"
    assert connect(state) is None
    with ensure_running(state) as connection:
        assert ask(connection)["pid"] == owner(state_dir) != first


def children() -> set[int]:
    """The processes of which this one is the parent; a fixture of another test may have one."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_the_starter_has_no_child_left(state_dir: Path) -> None:
    before = children()
    ensure_running(StateDir(state_dir)).close()
    assert owner(state_dir) not in children()
    assert children() <= before


async def test_a_long_state_dir(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 150) / "state"
    command = Command(deep)
    try:
        assert (await command.json("list"))["domains"] == []
        async with blockferry.connect(deep) as ferry:
            assert await ferry.list() == ()
    finally:
        stop(deep)


async def test_a_program_that_has_it_open_is_named(command: Command) -> None:
    async with blockferry.open(command.state_dir) as ferry:
        assert await ferry.list() == ()
        error = (await command.json("list", status=10))["error"]
        assert error["code"] == "state-dir-busy"
        assert error["fields"]["pid"] == os.getpid()
        with pytest.raises(errors.StateDirBusy):
            async with blockferry.connect(command.state_dir):
                pass
    assert (await command.json("list"))["domains"] == []


async def test_open_says_who_has_it(state_dir: Path) -> None:
    await asyncio.to_thread(lambda: ensure_running(StateDir(state_dir)).close())
    with pytest.raises(errors.StateDirBusy) as caught:
        async with blockferry.open(state_dir):
            pass
    assert caught.value.pid == owner(state_dir)


def test_one_that_can_not_start_says_why(state_dir: Path) -> None:
    state = StateDir(state_dir)
    prepare_state_dir(state)
    (state_dir / "journal.sqlite").write_text("this is no database, however long one looks at it" * 100)
    with pytest.raises(errors.BlockferryError) as caught:
        ensure_running(state)
    assert isinstance(caught.value, (errors.StateDirUnusable, errors.InternalError))


def test_it_ends_when_idle_and_not_before(state_dir: Path) -> None:
    with daemon(state_dir, "--idle-exit", "0.3") as process:
        state = StateDir(state_dir)
        watcher = connect(state)
        assert watcher is not None
        watcher.sendall(b"GET /v1/events HTTP/1.0\r\n\r\n")
        with watcher, watcher.makefile("rb") as stream:
            assert b"200" in stream.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)  # five times as long as it waits when nobody watches
        assert process.wait(10) == 0
        assert not state.socket.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_and_then_it(state_dir: Path, number: signal.Signals) -> None:
    with daemon(state_dir) as process:
        watcher = connect(StateDir(state_dir))
        assert watcher is not None
        watcher.sendall(b"GET /v1/events HTTP/1.0\r\n\r\n")
        with watcher, watcher.makefile("rb") as stream:
            while stream.readline() != b": subscribed\n":
                pass
            process.send_signal(number)
            assert stream.read() == b"\n", "the stream ends where an event ends"
        assert process.wait(10) == 0
        assert (state_dir / "lock").read_text() == ""


async def test_serve_says_that_it_is_ready(command: Command) -> None:
    process = await command.start("serve", "--json")
    assert process.stdout is not None
    said = json.loads(await process.stdout.readline())
    assert said["kind"] == "serving"
    assert said["pid"] == process.pid == owner(command.state_dir)
    second = await command("serve", status=10)
    assert f"process {process.pid}" in second.stderr
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    assert (await command.ends(process)).status == 0


async def test_the_library_outlives_the_host_process(state_dir: Path) -> None:
    async with blockferry.connect(state_dir) as ferry:
        assert await ferry.list() == ()
        await asyncio.to_thread(stop, state_dir, signal.SIGKILL)
        assert await ferry.list() == (), "another one was started"
