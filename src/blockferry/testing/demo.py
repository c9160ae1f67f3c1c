"""The main job, to watch: `make demo`.

    python -m blockferry.testing.demo

A Linux guest with two disks writes and fsyncs all the time. Its disks are snapshotted with a mirror each, the guest goes
over to the mirrors, and one disk is copied to raw and pivoted, all by the `blockferry` command, each line as one would
type it. Then the guest is stopped, and every write that it saw acknowledged is looked for in the final images.

Exit status: 0, 1 when a record is missing or something failed, 130 after Ctrl-C. Nothing is left behind.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockferry.testing.guest import GuestError, WritingGuest
from blockferry.testing.images import ToolError, make_image, raw_contents, write_pattern
from blockferry.testing.launcher import blockdev_disk, find_qemu, legacy_drive
from blockferry.testing.missing import MissingComponentError
from blockferry.testing.process import StartError

MIB = 1024 * 1024
VDA_BYTES, VDB_BYTES = 256 * MIB, 128 * MIB
SLOTS = 16384  # 64 MiB, more than the guest fills in the demo: no record overwrites another
DATA_START, DATA_BYTES, DATA_BYTE = 96 * MIB, 100 * MIB, 0x42  # what lies on vda before the guest boots
RATE = "20M"  # the copy's, so that its progress can be watched
HOST_PROCESS_END_S = 10.0
COMMAND = Path(sys.executable).with_name("blockferry")

Json = dict[str, Any]


class DemoError(RuntimeError):
    """The demo can't go on; the message says why."""


class Terminal:
    """What is printed: headings, words, pictures; a little colour, where a terminal shows it and NO_COLOR is unset."""

    def __init__(self) -> None:
        self._coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._section = 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._section += 1
        self.line()
        self.line(self._paint("1;36", f"{self._section}. {text}"))
        self.line()

    def typed(self, text: str) -> None:
        """Print a command line as one types it."""
        self.line(self._paint("1", f"$ {text}"))

    def verdict(self, text: str, *, good: bool) -> None:
        """Print a result."""
        self.line(self._paint("32" if good else "1;31", text))

    def line(self, text: str = "") -> None:
        """Print a line now, before anything that a command prints."""
        print(text, flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._coloured else text


class Demo:
    """One run, in a folder of its own.

    Args:
        folder: empty; src, dest, vm and state are made in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.terminal = Terminal()
        self._chains: dict[str, dict[str, str]] = {}
        self._environment = {**os.environ, "BLOCKFERRY_STATE_DIR": str(self.state_dir)}

    async def run(self) -> bool:
        """Do all of it; returns whether every acknowledged write is there.

        Raises:
            DemoError: a command failed.
            GuestError: the guest did not boot or write.
            MissingComponentError: a component is not installed.
            StartError: QEMU did not come up.
            ToolError: one of QEMU's tools failed.
        """
        out = self.terminal
        out.heading("A Linux guest with two disks that writes and fsyncs all the time")
        guest = self._prepare_guest()
        async with guest:
            await guest.booted()
            out.line(f"{guest.qemu.binaries.system.name} runs, pid {guest.qemu.pid}; its QMP socket is vm/vm1.sock")
            out.line("vda  qcow2  -blockdev, virtio, with an iothread    vdb  raw  a legacy -drive")
            out.line()
            out.typed(f"cd {self.folder}")
            out.typed(f"export BLOCKFERRY_STATE_DIR={self.state_dir}")
            await self._blockferry("attach", "vm1", "--qmp", "vm/vm1.sock")
            await self._draw("before")
            await self._snapshot(guest)
            await self._reopen(guest)
            await self._copy(guest)
            disks = (await self._ask("show", "vm1"))["disks"]
            out.heading("The guest is stopped: is every write there that it saw acknowledged?")
            await guest.stop()
        complete = self._complete(guest, {disk["target"]: disk for disk in disks})
        self._summary(guest)
        return complete

    def _prepare_guest(self) -> WritingGuest:
        binaries = find_qemu("distribution")
        if not COMMAND.exists():
            raise MissingComponentError(f"the command ({COMMAND})", "make setup")
        for name in ("src", "dest", "vm"):
            (self.folder / name).mkdir()
        vda = make_image(binaries, self.folder / "src/vda.qcow2", "qcow2", VDA_BYTES)
        vdb = make_image(binaries, self.folder / "src/vdb.raw", "raw", VDB_BYTES)
        write_pattern(binaries, vda, "qcow2", DATA_START, DATA_BYTES, DATA_BYTE)
        disks = {
            "vda": blockdev_disk("vda", vda, "qcow2", iothread="iothread0"),
            "vdb": legacy_drive(vdb, "raw"),
        }
        return WritingGuest(binaries, self.folder / "vm", disks, slots=SLOTS, sockets=("vm1",))

    # --- the three acts -------------------------------------------------------------------------------------------

    async def _snapshot(self, guest: WritingGuest) -> None:
        self.terminal.heading("An atomic snapshot of both disks, with a mirror each; disks are named by their images")
        self._write_snapshot_xml()
        self.terminal.typed("cat snapshot.xml")
        self.terminal.line((self.folder / "snapshot.xml").read_text())
        await self._blockferry("snapshot", "create", "vm1", "--xml", "snapshot.xml", "--atomic")
        await self._draw("snapshot, mirrored")
        await self._blockferry("show", "vm1")
        await self._blockferry("show", "vm1", "--xml")
        await self._writes_on(guest)

    def _write_snapshot_xml(self) -> None:
        source, destination = self.folder / "src", self.folder / "dest"
        (self.folder / "snapshot.xml").write_text(f"""\
<domainsnapshot>
  <name>s1</name>
  <disks>
    <disk name='{source}/vda.qcow2' snapshot='external'>
      <source file='{source}/vda.s1'/>
      <mirror file='{destination}/vda.s1'/>
    </disk>
    <disk name='{source}/vdb.raw' snapshot='external'>
      <source file='{source}/vdb.s1'/>
      <mirror file='{destination}/vdb.s1'/>
    </disk>
  </disks>
</domainsnapshot>
""")

    async def _reopen(self, guest: WritingGuest) -> None:
        self.terminal.heading("The guest goes over to the mirrors, both disks at one instant")
        await self._blockferry("snapshot", "delete", "vm1", "s1", "--reopen-mirror")
        await self._draw("on the mirrors")
        await self._blockferry("show", "vm1")
        await self._writes_on(guest)

    async def _copy(self, guest: WritingGuest) -> None:
        self.terminal.heading("vda is copied to raw, its whole chain, and the guest goes over to the copy")
        how = ("--format", "raw", "--bandwidth", RATE, "--wait", "--pivot")
        await self._blockferry("copy", "vm1", "vda", "dest/vda.raw", *how)
        await self._draw("vda copied")
        await self._blockferry("show", "vm1")
        await self._writes_on(guest)

    async def _writes_on(self, guest: WritingGuest) -> None:
        """Let the guest write some more, on the images as they are now."""
        await guest.progress(20)
        acked = ", ".join(f"{record + 1} on {disk}" for disk, record in guest.acked.items())
        self.terminal.line()
        self.terminal.line(f"Acknowledged so far: {acked}. The guest's pauses so far: {_pauses(guest)}.")

    # --- the command ----------------------------------------------------------------------------------------------

    async def _blockferry(self, *words: str) -> None:
        """Run the command, with its output on ours: a terminal is one for it, too."""
        self.terminal.typed(shlex.join(["blockferry", *words]))
        await self._run(words, None)
        self.terminal.line()

    async def _ask(self, *words: str) -> Json:
        answer: Json = json.loads(await self._run([*words, "--json"], asyncio.subprocess.PIPE))
        return answer

    async def _run(self, words: tuple[str, ...] | list[str], stdout: int | None) -> bytes:
        process = await asyncio.create_subprocess_exec(
            str(COMMAND),
            *words,
            cwd=self.folder,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
        )
        try:
            output, _nothing = await process.communicate()
        finally:
            if process.returncode is None:  # Ctrl-C
                process.terminate()
                await process.wait()
        if process.returncode != 0:
            raise DemoError(f"`{shlex.join(['blockferry', *words])}` ended with {process.returncode}")
        return output or b""

    # --- what came of it ------------------------------------------------------------------------------------------

    async def _draw(self, moment: str) -> None:
        """Keep the chains as they are now, for the picture at the end."""
        disks = (await self._ask("show", "vm1"))["disks"]
        self._chains[moment] = {disk["target"]: self._chain(disk) for disk in disks}

    def _chain(self, disk: Json) -> str:
        images = " <- ".join(self._short(image["file"]) for image in disk["chain"])
        mirror = disk["mirror"]
        works = mirror is not None and mirror["state"] in {"copying", "ready"}
        return f"{images}   => {self._short(mirror['file'])}" if works else images

    def _short(self, path: str) -> str:
        return os.path.relpath(path, self.folder)

    def _complete(self, guest: WritingGuest, disks: Mapping[str, Json]) -> bool:
        """Look for every acknowledged record, and for the data from before, in the images that the guest ended on."""
        complete = True
        for target, disk in disks.items():
            image, fmt = Path(disk["source"]), disk["format"]
            missing = guest.verify(target, image, fmt)
            count, where = guest.acked[target] + 1, self._short(disk["source"])
            found = f"{len(missing)} of {count} are MISSING, the first: {missing[0]}" if missing else "none is missing"
            self.terminal.verdict(f"{target}  {count} records acknowledged, {found}  ({where})", good=not missing)
            complete = complete and not missing
        vda = disks["vda"]
        with (
            raw_contents(guest.qemu.binaries, Path(vda["source"]), vda["format"]) as contents,
            contents.open("rb") as raw,
        ):
            raw.seek(DATA_START)
            kept = raw.read(DATA_BYTES) == bytes([DATA_BYTE]) * DATA_BYTES
        state = "are all there" if kept else "are NOT all there"
        self.terminal.verdict(f"vda  the {DATA_BYTES // MIB} MiB that lay on it before {state}", good=kept)
        for disk_name, record in guest.errors:
            self.terminal.verdict(f"{disk_name}  the guest saw record {record} FAIL", good=False)
        return complete and kept and not guest.errors

    def _summary(self, guest: WritingGuest) -> None:
        self.terminal.line(f"The guest's pauses: {_pauses(guest)}.")
        self.terminal.heading("The chains, from before to after (active <- backing => mirror)")
        width = max(map(len, self._chains))
        for target in ("vda", "vdb"):
            for moment, chains in self._chains.items():
                self.terminal.line(f"  {target}  {moment:<{width}}  {chains[target]}")
            self.terminal.line()


def _pauses(guest: WritingGuest) -> str:
    return ", ".join(f"{pause:.1f} ms" for pause in guest.pauses_ms()) or "none"


def end_host_process(state_dir: Path) -> None:
    """End the host process of a state directory; it would go by itself, once it has been idle for a while."""
    try:
        lock = (state_dir / "lock").open("r+")
    except FileNotFoundError:
        return  # none was started
    with lock, contextlib.suppress(ProcessLookupError):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pidfd_open(int(lock.read()))
        else:
            return  # it has gone already
        with os.fdopen(owner, "rb", buffering=0):
            signal.pidfd_send_signal(owner, signal.SIGTERM)
            ended, _, _ = select.select([owner], [], [], HOST_PROCESS_END_S)
            if not ended:
                signal.pidfd_send_signal(owner, signal.SIGKILL)


async def demo() -> int:
    """Run the demo, clean up, and return the exit status."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="blockferry-demo-"))
    run = Demo(folder)
    try:
        complete = await run.run()
    except (DemoError, GuestError, MissingComponentError, StartError, ToolError) as error:
        sys.stdout.flush()
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        end_host_process(run.state_dir)
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    words = "Nothing is missing" if complete else "Something IS MISSING"
    run.terminal.verdict(f"{words}. {seconds:.0f} s; the guest, the host process and {folder} are gone.", good=complete)
    return 0 if complete else 1


def main() -> int:
    """Run the demo; returns the exit status."""
    try:
        return asyncio.run(demo())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\ndemo: interrupted; everything is cleaned up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
