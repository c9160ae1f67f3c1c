"""What a guest that stands still looks like: as QEMU sees it, and as its own kernel says it on the console.

A lost request, a lost interrupt and a busy machine look alike from a test, which only sees that nothing came in time.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError

from blockferry.testing.launcher import TestQemu

ANSWER_S = 5.0  # QEMU answers within milliseconds; one whose main loop is held up never
KERNEL_S = 20.0  # the guest's kernel takes a second, on a busy machine some
LOOK_S = 0.1
QUEUES = 8  # virtio-scsi has two beside those of its processors
CONSOLE_CHARS = 4000
# Magic keys: all of the kernel's log to the console, then every task with where it is. The last says that it is over.
KEYS = ("9", "t", "9")
OVER = "Loglevel set to 9"


async def describe(qemu: TestQemu, console: Path) -> str:
    """Return what is known of a QEMU whose guest does not do what was waited for; it is asked, and may not answer.

    Args:
        qemu: the process, which lives.
        console: the guest's console log; its kernel was started with `sysrq_always_enabled=1`.
    """
    before = _read(console)
    lines = [_time_used(qemu.pid)]
    for part in (_status, _jobs, _disks, _queues, _processors):
        try:
            async with asyncio.timeout(ANSWER_S):
                lines += await part(qemu)
        except TimeoutError:
            lines.append(f"QEMU does not answer within {ANSWER_S:.0f} s")
            break
        except QMPError as error:
            lines.append(f"{part.__name__.strip('_')}: {error}")
    else:
        if "status: running" in lines:
            lines += await _tasks(qemu, console, len(before))
    return "\n".join([*lines, "console:", before[-CONSOLE_CHARS:]])


def _time_used(pid: int) -> str:
    """Whether the machine let QEMU work at all."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return f"QEMU {pid} has ended"
    ticks = os.sysconf("SC_CLK_TCK")
    used = (int(words[11]) + int(words[12])) / ticks
    age = float(Path("/proc/uptime").read_text().split()[0]) - int(words[19]) / ticks
    load = " ".join(Path("/proc/loadavg").read_text().split()[:3])
    return f"QEMU {pid} used {used:.1f} s of a processor's time in its {age:.1f} s; load {load}"


# --- what QEMU says -----------------------------------------------------------------------------------------------


async def _status(qemu: TestQemu) -> list[str]:
    return [f"status: {(await qemu.command('query-status'))['status']}"]


async def _jobs(qemu: TestQemu) -> list[str]:
    return [f"job: {job}" for job in await qemu.command("query-jobs")] or ["no jobs"]


async def _disks(qemu: TestQemu) -> list[str]:
    return [_disk(each) for each in await qemu.command("query-blockstats")]


def _disk(answer: Mapping[str, Any]) -> str:
    stats = answer["stats"]
    done = ", ".join(
        f"{stats[f'{short}_operations']} {word} ({stats[f'failed_{short}_operations']} failed)"
        for short, word in (("rd", "reads"), ("wr", "writes"), ("flush", "flushes"))
    )
    idle = stats.get("idle_time_ns")
    last = "" if idle is None else f", the last {idle / 1e9:.1f} s ago"
    return f"disk {answer.get('qdev') or answer.get('device')} on {answer.get('node-name')}: {done}{last}"


async def _queues(qemu: TestQemu) -> list[str]:
    """How far the guest's requests and QEMU's answers have come, where there are any."""
    lines = []
    for device in await qemu.command("x-query-virtio"):
        for number in range(QUEUES):
            try:
                queue = await qemu.command("x-query-virtio-queue-status", {"path": device["path"], "queue": number})
            except QMPError:
                break  # there are no more
            if any(queue.get(name) for name in ("inuse", "last-avail-idx", "used-idx")):
                lines.append(f"queue {number} of {device['path']}: {_progress(queue)}")
    return lines


def _progress(queue: Mapping[str, Any]) -> str:
    names = ("inuse", "last-avail-idx", "shadow-avail-idx", "used-idx", "signalled-used", "signalled-used-valid")
    return ", ".join(f"{name} {queue[name]}" for name in names if name in queue)


async def _processors(qemu: TestQemu) -> list[str]:
    """Where each is, and whether it waits for an interrupt; which have come, and which are due."""
    registers = await _monitor(qemu, "info registers -a")
    lines = [f"processor {found[1]}: {found[2]}" for found in re.finditer(r"CPU#(\d+)[^#]*?(RIP=.*)", registers)]
    for number in range(len(lines)):
        local = await _monitor(qemu, f"info lapic {number}")
        lines += [
            f"interrupts of {number}: {' '.join(line.split())}"
            for line in re.findall(r"^I[RS]R\s.*", local, re.MULTILINE)
        ]
    return [*lines, f"interrupts so far: {' '.join((await _monitor(qemu, 'info irq')).split())}"]


async def _monitor(qemu: TestQemu, line: str) -> str:
    return str(await qemu.command("human-monitor-command", {"command-line": line}))


# --- what the guest's kernel says ---------------------------------------------------------------------------------


async def _tasks(qemu: TestQemu, console: Path, before: int) -> list[str]:
    """The guest's programs and where each waits in the kernel; kernel threads, which mostly wait for work, only when blocked."""
    said: Callable[[], str] = lambda: _read(console)[before:]  # noqa: E731 - what has come since
    with contextlib.suppress(TimeoutError, QMPError):
        async with asyncio.timeout(KERNEL_S):
            for key in KEYS:
                await _monitor(qemu, f"sendkey alt-sysrq-{key}")
            await _until(lambda: said().count(OVER) == KEYS.count("9"))
    text = said()
    if OVER not in text:
        return ["the guest's kernel does not answer its keyboard"]
    tasks = re.split(r"^(?=\[[ \d.]+\] task:)", text, flags=re.MULTILINE)[1:]
    return ["tasks:", *(_shortened(each) for each in tasks if "syscall" in each or " state:D" in each)]


def _shortened(task: str) -> str:
    """Without the times, and without what is only a guess of the kernel's (`?`), registers and what follows the last task."""
    lines = [re.sub(r"^\[[ \d.]+\] ", "", line) for line in task.partition("</TASK>")[0].splitlines()]
    return "\n".join(line for line in lines if line.startswith("task:") or re.match(r" +[\w.]+\+0x", line))


async def _until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110 - what is waited for is in a file that the guest writes
        await asyncio.sleep(LOOK_S)


def _read(console: Path) -> str:
    return console.read_text(errors="replace") if console.exists() else ""
