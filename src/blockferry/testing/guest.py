"""A tiny Linux guest that writes to its disks all the time and says which writes are safe.

It writes numbered records and acknowledges them only once they are flushed, so afterwards, whatever was done
to its disks and whatever died, an image can be checked byte by byte: no acknowledged record may be missing.
"""

import asyncio
import contextlib
import secrets
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp import EventListener

from blockferry.testing.images import raw_contents
from blockferry.testing.initramfs import GuestImages, build_guest
from blockferry.testing.launcher import QemuBinaries, TestQemu, processors
from blockferry.testing.process import socket_path
from blockferry.testing.stall import CONSOLE_CHARS, describe

BLOCK_BYTES = 4096
LINE_BYTES = 64
BOOT_TIMEOUT_S = 60.0  # 2 to 4 s on an idle machine with two cores, without KVM
PROGRESS_TIMEOUT_S = 60.0  # the slowest guest seen acknowledges some records each second

# The clock and the mitigations cost most of a boot under TCG; `quiet` saves the serial console.
BOOT_OPTIONS = "console=ttyS0 quiet tsc=reliable no_timer_check mitigations=off nokaslr random.trust_cpu=on panic=-1"
BOOT_OPTIONS += " sysrq_always_enabled=1"  # a kernel that stands still is asked by its keyboard where, see stall.py

# A processor of the guest looked up a device in a map that had just been replaced (seen with QEMU 10.0 on a busy machine). What
# is noticed is an entry that the new map does not have; one that it has may be another device's, and what is written is lost.
LOST_ITS_MAP = "iotlb_to_section: Assertion"


def agent_channel(path: Path) -> list[str]:
    """Return the arguments for a guest agent's channel, on a socket that QEMU listens on."""
    return [
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={str(path).replace(',', ',,')},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


class GuestError(RuntimeError):
    """The guest did not do what was waited for; the message has what QEMU and its kernel say, and its console."""


class StartedAgainWarning(UserWarning):
    """A guest did not boot in time, and was started again; the message has what is known of it."""


@dataclass(frozen=True)
class Missing:
    """An acknowledged record that an image does not hold."""

    disk: str
    record: int
    offset_bytes: int
    found: str


@dataclass(frozen=True)
class Records:
    """Where a guest puts its records and what they look like.

    Record n fills one block of 4096 bytes, and goes to slot n modulo `slots`.

    Args:
        run: a word of the guest's own, so that an older run's records count as missing.
        slots: size of the region in blocks.
        start_bytes: where the region starts on the disk.
        first: the first record's number.
    """

    run: str
    slots: int = 4096
    start_bytes: int = 1024 * 1024
    first: int = 0

    def offset_bytes(self, record: int) -> int:
        """Return where on the disk a record is."""
        return self.start_bytes + BLOCK_BYTES * (record % self.slots)

    def block(self, disk: str, record: int) -> bytes:
        """Return the bytes of a record: one line, 64 times."""
        text = f"blockferry {self.run} {disk} {record} ".ljust(LINE_BYTES - 1, ".")
        return f"{text}\n".encode() * (BLOCK_BYTES // LINE_BYTES)

    def missing(self, contents: Path, disk: str, last_acked: int) -> list[Missing]:
        """Return the acknowledged records that are neither in the contents nor overwritten by a later record.

        Args:
            contents: the disk's guest-visible contents, as a raw file.
            disk: the disk's name in the guest.
            last_acked: number of the last acknowledged record.
        """
        with contents.open("rb") as file:

            def check(record: int) -> Missing | None:
                file.seek(self.offset_bytes(record))
                block = file.read(BLOCK_BYTES)
                if self._holds_record_from(block, disk, record):
                    return None
                found = block[:LINE_BYTES].decode("ascii", "backslashreplace").strip("\0\n")
                return Missing(disk, record, self.offset_bytes(record), found or "zeroes")

            # The last `slots` acknowledged records have one slot each; earlier ones were overwritten by them.
            newest = range(max(self.first, last_acked - self.slots + 1), last_acked + 1)
            return [missing for missing in map(check, newest) if missing is not None]

    def _holds_record_from(self, block: bytes, disk: str, least: int) -> bool:
        words = block[:LINE_BYTES].split()
        number = int(words[3]) if len(words) > 3 and words[3].isdigit() else -1
        in_its_slot = number >= least and (number - least) % self.slots == 0
        return in_its_slot and block == self.block(disk, number)


class WritingGuest:
    """A booted Linux guest that writes numbered records to every disk; an async context manager.

    Args:
        binaries: which QEMU.
        directory: existing folder for sockets and logs.
        disks: QEMU's arguments for each disk, by its name in the guest; in the guest's order (`vda`, `vdb`).
            Debian's cloud kernel drives virtio, scsi, ide and nvme disks; it has no driver for sata and usb.
        images: kernel and initramfs; built where it is not given.
        slots: size of the region that is written, in records of 4096 bytes; a multiple of `batch`.
        batch: records that are written and flushed at once.
        pause_s: how long each disk rests between two batches; without a pause the guest keeps its processors busy.
        first: number of the first record, for a guest that goes on where another ended; rounded up to a batch.
        run: the word in this guest's records; random unless given.
        machine: the machine type.
        memory_mib: the guest's memory.
        args: more arguments for QEMU.
        sockets: names of the QMP sockets, as in `TestQemu`.
        agent: whether it has qemu-guest-agent, and an ext4 on every disk (`make_ext4`), whose file `records` takes
            the records.

    Attributes:
        qemu: the QEMU process.
        agent: the guest agent's socket, where it has one.
        acked: number of the last record that is safe, by disk.
        errors: (disk, record) of each failed write, in order; the guest tries again.
    """

    def __init__(
        self,
        binaries: QemuBinaries,
        directory: Path,
        disks: Mapping[str, Sequence[str]],
        *,
        images: GuestImages | None = None,
        slots: int = 4096,
        batch: int = 4,
        pause_s: float = 0.0,
        first: int = 0,
        run: str | None = None,
        machine: str = "pc",
        memory_mib: int = 128,
        args: Sequence[str] = (),
        sockets: Sequence[str] = ("qmp",),
        agent: bool = False,
    ) -> None:
        assert slots % batch == 0, "a batch must not wrap around"
        self.records = Records(run or secrets.token_hex(4), slots, first=-(-first // batch) * batch)
        self.acked = dict.fromkeys(disks, self.records.first - 1)
        self.errors: list[tuple[str, int]] = []
        self.console = directory / "console.log"
        self._changed = asyncio.Condition()
        self._stopped = False
        self._died = ""
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.agent = socket_path(directory / "agent.sock")
        self._batch = batch
        self._woken = "-incoming" in args
        boot = images or build_guest(agent=agent)
        # Where there can be a second, a guest's barriers are some: who looks at its queues in QEMU are threads of their own.
        arguments = ["-cpu", "max", "-smp", f"{processors(binaries)},maxcpus=2", "-no-reboot"]
        arguments += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd)]
        arguments += ["-chardev", f"file,id=console,path={str(self.console).replace(',', ',,')}"]
        for disk_arguments in disks.values():
            arguments += disk_arguments
        if agent:
            arguments += agent_channel(self.agent)
        options = f"{BOOT_OPTIONS}{' bf_agent=1' if agent else ''}{f' bf_pause={pause_s:g}' if pause_s else ''}"

        def make(port: int) -> TestQemu:
            """One that acknowledges on this descriptor."""
            serial = ["-chardev", f"socket,id=acks,fd={port}", "-serial", "chardev:console", "-serial", "chardev:acks"]
            return TestQemu(
                binaries,
                directory,
                args=["-append", f"{options} {self._environment()}", *serial, *arguments, *args],
                machine=machine,
                memory_mib=memory_mib,
                paused=False,
                sockets=sockets,
                pass_fds=[port],
                boots=True,
            )

        self._make = make
        self._prepare()

    def _prepare(self) -> None:
        """Make what is to be started, with nothing acknowledged."""
        self.acked = dict.fromkeys(self.acked, self.records.first - 1)
        self._ended = False
        self._port, self._qemu_port = socket.socketpair()
        self.qemu = self._make(self._qemu_port.fileno())
        self._run_states = EventListener(("STOP", "RESUME"))
        self.qemu.control.register_listener(self._run_states)

    def _environment(self) -> str:
        records = self.records
        return (
            f"bf_disks={','.join(self.acked)} bf_run={records.run} bf_first={records.first} bf_slots={records.slots} "
            f"bf_batch={self._batch} bf_block={records.start_bytes // BLOCK_BYTES}"
        )

    async def start(self) -> None:
        """Start QEMU; the guest boots meanwhile, see `booted`.

        Raises:
            StartError: QEMU did not come up.
        """
        with self._qemu_port:
            await self.qemu.start()
        reader, self._writer = await asyncio.open_unix_connection(sock=self._port)
        self._reader = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                match line.decode("ascii", "replace").split():
                    case ["ACK", disk, record]:
                        self.acked[disk] = int(record)
                    case ["IOERROR", disk, record]:
                        self.errors.append((disk, int(record)))
                    case ["DIED", disk, status]:
                        self._died = f"; the program that writes to {disk} died with status {status}"
                    case ["STOPPED"]:
                        self._stopped = True
                await self._notify()
        self._ended = True
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, reached: Callable[[], bool], what: str, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self._ended or self._died or reached())
        except TimeoutError:
            pass
        if reached():
            return
        state = f"acked {self.acked}, errors {self.errors[-5:]}"
        if self._ended:  # nobody is left to be asked
            console = self.console.read_text(errors="replace")[-CONSOLE_CHARS:]
            last_words = self.qemu.process.stderr_text[-CONSOLE_CHARS:]
            raise GuestError(f"{what}: QEMU ended; {state}, its stderr:\n{last_words}\nconsole:\n{console}")
        late = self._died or f": not within {timeout} s"
        found = await describe(self.qemu, self.console)
        meanwhile = "reached since" if reached() else "still not reached"
        raise GuestError(f"{what}{late}; {state}; {meanwhile}, acked {self.acked}\n{found}")

    async def booted(self, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Wait until every disk has an acknowledged record.

        A guest that was not up in time, or whose QEMU ended by that fault of its own, is started again, once, with a warning
        that has all that is known of the first: as long as it has not been waited for nobody has been promised anything. One
        that woke from saved memory is not: its memory goes with the disks as they were.

        Raises:
            GuestError: it did not happen within `timeout` seconds, nor within a minute the second time, or QEMU ended.
        """
        up = lambda: min(self.acked.values()) >= self.records.first  # noqa: E731
        try:
            await self._until(up, "boot", timeout)
        except GuestError as error:
            lost_its_map = LOST_ITS_MAP in self.qemu.process.stderr_text
            if self._woken or self._died or (self._ended and not lost_its_map):
                raise
            warnings.warn(f"started again: {error}", StartedAgainWarning, stacklevel=2)
        else:
            return
        await self.stop()
        # Higher than any number that the first may have written: no record of its can stand for one that the second loses.
        self.records = replace(self.records, first=max(self.acked.values()) + 1 + self._batch)
        self._prepare()
        await self.start()
        await self._until(up, "second boot", BOOT_TIMEOUT_S)

    async def acks(self, disk: str, at_least: int, timeout: float = PROGRESS_TIMEOUT_S) -> None:
        """Wait until record `at_least` of a disk is acknowledged.

        Raises:
            GuestError: as `booted`.
        """
        await self._until(lambda: self.acked[disk] >= at_least, f"record {at_least} on {disk}", timeout)

    async def progress(self, count: int = 1, timeout: float = PROGRESS_TIMEOUT_S) -> None:
        """Wait until every disk has `count` more acknowledged records than now.

        Raises:
            GuestError: as `booted`.
        """
        goals = {disk: record + count for disk, record in self.acked.items()}
        reached = lambda: all(self.acked[disk] >= goal for disk, goal in goals.items())  # noqa: E731
        await self._until(reached, f"{count} more records on each disk", timeout)

    async def failed(self, disk: str, timeout: float = PROGRESS_TIMEOUT_S) -> None:
        """Wait until a write to the disk failed for the guest.

        Raises:
            GuestError: as `booted`.
        """
        await self._until(lambda: any(name == disk for name, _record in self.errors), f"error on {disk}", timeout)

    async def stop_writing(self, timeout: float = PROGRESS_TIMEOUT_S) -> None:
        """Let the guest finish what it writes and write no more; afterwards `acked` is final.

        Raises:
            GuestError: as `booted`.
        """
        assert self._writer is not None, "not started"
        self._writer.write(b"stop\n")
        await self._until(lambda: self._stopped, "end of writing", timeout)

    def pauses_ms(self) -> list[float]:
        """Return how long each pause of the guest was, by QEMU's own timestamps of STOP and RESUME."""
        pauses: list[float] = []
        stopped_us: int | None = None
        for event in self._run_states.history:
            stamp = event["timestamp"]
            assert isinstance(stamp, dict)
            at_us = stamp["seconds"] * 1_000_000 + stamp["microseconds"]
            if event["event"] == "STOP":
                stopped_us = at_us
            elif stopped_us is not None:
                pauses.append((at_us - stopped_us) / 1000)
                stopped_us = None
        return pauses

    def verify(self, disk: str, path: Path, fmt: str, last_acked: int | None = None) -> list[Missing]:
        """Return the acknowledged records that an image, which nobody has open for writing, does not hold.

        Args:
            disk: the disk's name in the guest.
            path: the image.
            fmt: its format.
            last_acked: the last record that must be there; all that was acknowledged unless given.

        Raises:
            ToolError: the image cannot be read.
        """
        with raw_contents(self.qemu.binaries, path, fmt) as contents:
            return self.records.missing(contents, disk, self.acked[disk] if last_acked is None else last_acked)

    async def stop(self) -> None:
        """End QEMU by `quit`; what the guest acknowledged until then is in `acked`."""
        await self.qemu.stop()
        await self._finish()

    async def kill(self) -> None:
        """SIGKILL QEMU; what the guest acknowledged until then is in `acked`."""
        await self.qemu.kill()
        await self._finish()

    async def _finish(self) -> None:
        if self._reader is not None and self._writer is not None:
            await self._reader
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        self._port.close()
        self._qemu_port.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
