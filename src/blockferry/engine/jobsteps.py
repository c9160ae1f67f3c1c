"""Carrying out the steps that begin, wait for and end block jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from blockferry.model.graph import Graph
from blockferry.model.job import ENDED, Job
from blockferry.plan import steps
from blockferry.qemu.session import CommandRefused, LostReply, Session

# Draining and switching took 83 ms for 8 disks. Of a job that is not waited for in a window, whose deadline is another.
WINDOW_SECONDS = 10.0
# A ready job is on standby while the guest is drained; one that somebody has paused stays there, and so would the guest.
READY_SECONDS = 1.0
# A guest that writes all the time: 3 to 140 ms with 2 to 6 disks on two cores.
HOLD_SECONDS = 0.5
# Commits that undo a snapshot copy what the guest wrote in between, which was milliseconds.
COMMIT_SECONDS = 300.0
JOB_EVENTS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


# QEMU's file-posix.c, handle_aiocb_flush(): what the kernel has dropped of the page cache nobody can tell, so no flush succeeds
# until the file is closed.
STAYS_ON_OVERLAY = (
    "the guest goes on on its overlay, which has what it wrote. Is the storage well again and the same still said: this QEMU flushes "
    "no image of which a flush failed once, so stop the guest, then `blockferry recover`"
)


class StepFailed(Exception):
    """What a step looks for is not so."""


class JobSteps:
    """Carries them out on one QEMU.

    Args:
        session: to it.
        graph: says what it is now.
        within: how long may be waited where so many seconds are meant: not beyond the deadline of a window.
    """

    def __init__(
        self, session: Session, graph: Callable[[], Awaitable[Graph]], within: Callable[[float], float]
    ) -> None:
        self._session = session
        self._graph = graph
        self._within = within

    async def do(self, step: steps.Step) -> dict[str, Any]:
        """Carry a step out; see `Executor.do`."""
        match step:
            case steps.CommitDown():
                await self._commit_down(step)
            case steps.StartMirror():
                await self._start_mirror(step)
            case steps.StartCommit():
                await self._start_commit(step)
            case steps.StartStream():
                await self._start_stream(step)
            case steps.StartBackup():
                await self._start_backup(step)
            case steps.FinalizeStream():
                await self._finalize_stream(step.job)
            case steps.CancelJob():
                await self._cancel(step.job)
            case steps.RequireReady():
                # `stop` drains: a ready job is on standby for a moment.
                await self._wait_jobs(step.jobs, frozenset({"ready"}), READY_SECONDS)
            case steps.AwaitReady():
                await self._wait_jobs(step.jobs, frozenset({"ready", "pending", "concluded"}), WINDOW_SECONDS)
            case steps.CompleteJobs():
                await self._complete(step)
            case steps.FinalizeJobs():
                await self._to_each("job-finalize", step.jobs, "pending")
                # One that QEMU has been let forget is over as well, once that is recorded.
                over = frozenset({"concluded", *(("null",) if step.recorded else ())})
                await self._wait_jobs(step.jobs, over, WINDOW_SECONDS)
            case steps.DrainMirrors():
                return {"equal": await self._drain(step)}
            case steps.DismissJobs():
                await self._to_each("job-dismiss", step.jobs, "concluded")
            case _:
                raise AssertionError(step)
        return {}

    async def _jobs(self) -> dict[str, Job]:
        """Every job now."""
        answer = await self._session.execute("query-jobs")
        return {
            each["id"]: Job(id=each["id"], type=each["type"], status=each["status"], error=each.get("error"))
            for each in answer
        }

    async def _wait_jobs(self, names: tuple[str, ...], states: frozenset[str], seconds: float) -> None:
        """Wait until every one of these jobs is in one of these states (`null`: or forgotten) without an error.

        Raises:
            StepFailed: one ended with an error, or vanished: in QEMU's words.
            LostReply: not within `seconds`.
        """

        async def met() -> bool:
            jobs = await self._jobs()
            for name in names:
                job = jobs.get(name)
                if job is None and "null" in states:
                    continue
                if job is None or job.error is not None or (job.status in ENDED and "concluded" not in states):
                    raise StepFailed(_words(name, job))
            return all(jobs[name].status in states for name in names if name in jobs)

        what = f"wait for {', '.join(names)}"
        await self._session.wait_until(met, JOB_EVENTS, what=what, seconds=self._within(seconds))

    async def _start_job(
        self,
        command: str,
        step: steps.StartMirror | steps.StartCommit | steps.StartStream | steps.StartBackup,
        **arguments: Any,
    ) -> None:
        """Start a job that is kept after its end and not finalized by itself, unless `arguments` say otherwise.

        Those that are None are left out. Looked at only when QEMU refuses, which it does for one that there is. The guest never
        stops for a job: an error ends it, and it says why; that is QEMU's own `on-error`, `on-source-error` and `on-target-error`, and
        what is not said is not read byte by byte (docs/adr/0020-short-commands.md).
        """
        common = {"auto_dismiss": False, "auto_finalize": False, **({"speed": step.speed} if step.speed else {})}
        given = {name: value for name, value in arguments.items() if value is not None}
        names = {"job_id": step.job, "device": step.device, "filter_node_name": step.filter_node}
        try:
            await self._session.execute(command, **{**names, **common, **given})
        except CommandRefused:
            if step.job not in await self._jobs():
                raise

    async def _start_mirror(self, step: steps.StartMirror) -> None:
        await self._start_job(
            "blockdev-mirror",
            step,
            target=step.node,
            sync=step.sync,
            replaces=step.replaces,
            **step.options,
        )

    async def _start_commit(self, step: steps.StartCommit) -> None:
        await self._start_job(
            "block-commit",
            step,
            top_node=step.top,
            base_node=step.base,
            backing_file=step.backing_file,
        )

    async def _start_backup(self, step: steps.StartBackup) -> None:
        await self._start_job(
            "blockdev-backup",
            step,
            target=step.node,
            sync="bitmap",
            bitmap=step.bitmap,
            bitmap_mode="always",
            # Nothing is switched at its end, and until then its filter is in the guest's way.
            auto_finalize=True,
        )

    async def _start_stream(self, step: steps.StartStream) -> None:
        await self._start_job(
            "block-stream",
            step,
            base_node=step.base,
            backing_file=step.backing_file if step.base else None,
            auto_dismiss=True,
        )

    async def _finalize_stream(self, name: str) -> None:
        job = (await self._jobs()).get(name)
        if job is None:
            return
        if not job.allows("finalize"):
            raise StepFailed(_words(name, job))
        await self._session.execute("job-finalize", id=name)

        async def forgotten() -> bool:
            return name not in await self._jobs()

        await self._session.wait_until(
            forgotten, JOB_EVENTS, what=f"finalize {name}", seconds=self._within(WINDOW_SECONDS)
        )

    async def _complete(self, step: steps.CompleteJobs) -> None:
        await self._wait_jobs(step.jobs, frozenset({"ready", "pending", "concluded"}), WINDOW_SECONDS)
        if step.soft_cancel:
            # Not job-cancel, which forces: this one lets the destination become a consistent copy, of a job that is ready.
            ready = [name for name, job in (await self._jobs()).items() if name in step.jobs and job.status == "ready"]
            await self._session.execute_each("block-job-cancel", [{"device": name, "force": False} for name in ready])
        else:
            await self._to_each("job-complete", step.jobs, "ready")
        await self._drained(step)

    async def _drained(self, step: steps.CompleteJobs) -> None:
        """Wait until each has nothing left to be copied; a guest that writes faster is stopped until they have.

        Let run again it does no harm: QEMU holds what it writes to these disks until they are finalized.
        """
        drained = frozenset({"pending", "concluded"})
        if not step.running:
            await self._wait_jobs(step.jobs, drained, WINDOW_SECONDS)
            return
        try:
            await self._wait_jobs(step.jobs, frozenset({"pending"}), HOLD_SECONDS)
        except LostReply:
            if not self._session.alive:
                raise
            await self._session.execute("stop")
            await self._wait_jobs(step.jobs, frozenset({"pending"}), WINDOW_SECONDS)
            await self._session.execute("cont")

    async def _to_each(self, command: str, names: tuple[str, ...], status: str) -> None:
        """Say that to each of these jobs at once; looked at only when QEMU refuses, which it does when it was done before too.

        Nobody has to wait for what another one flushes.

        Args:
            command: what they are told.
            names: the jobs.
            status: the one in which they take it.
        """
        try:
            await self._session.execute_each(command, [{"id": name} for name in names])
        except CommandRefused:
            jobs = await self._jobs()
            if any(jobs[name].status == status for name in names if name in jobs):
                raise

    async def _drain(self, step: steps.DrainMirrors) -> list[str]:
        """The targets whose mirrors have ended without an error; a destination that fails or hangs keeps nobody."""
        names = set(step.jobs.values())
        for name, job in (await self._jobs()).items():
            if name in names and job.status == "ready":
                with contextlib.suppress(CommandRefused):
                    await self._session.execute("block-job-cancel", device=name, force=False)

        async def over() -> bool:
            jobs = await self._jobs()
            for name in names & jobs.keys():
                if jobs[name].status == "pending":
                    await self._session.execute("job-finalize", id=name)
            return all(jobs[name].status in ENDED for name in names & jobs.keys())

        try:
            await self._session.wait_until(over, JOB_EVENTS, what="bring mirrors to rest", seconds=WINDOW_SECONDS)
        except LostReply:
            if not self._session.alive:
                raise
        jobs = await self._jobs()
        ended = {name for name, job in jobs.items() if job.status == "concluded" and job.error is None}
        return [target for target, name in step.jobs.items() if name in ended]

    async def _cancel(self, name: str) -> None:
        job = (await self._jobs()).get(name)
        if job is None:
            return
        if job.allows("cancel"):
            await self._session.execute("job-cancel", id=name)

        async def ended() -> bool:
            now = (await self._jobs()).get(name)
            return now is None or now.status in ENDED

        await self._session.wait_until(ended, JOB_EVENTS, what=f"cancel {name}", seconds=WINDOW_SECONDS)
        now = (await self._jobs()).get(name)
        if now is not None and now.allows("dismiss"):
            await self._session.execute("job-dismiss", id=name)

    async def _commit_down(self, step: steps.CommitDown) -> None:
        graph = await self._graph()
        # One that was committed down before stays on its base, open, until it is closed: nobody uses it.
        in_use = graph.child(step.overlay, "backing") == step.base and bool(graph.parents(step.overlay))
        job = (await self._jobs()).get(step.job)
        if job is not None and job.error is not None:
            # It failed before, of storage that was full or ill then: it is kept until it is dismissed.
            await self._cancel(step.job)
            job = None
        if job is None and not in_use:
            return
        if job is None:
            await self._session.execute(
                "block-commit", job_id=step.job, device=step.overlay, base_node=step.base, auto_dismiss=False
            )
        try:
            await self._wait_jobs((step.job,), frozenset({"ready", "concluded"}), COMMIT_SECONDS)
            if (await self._jobs())[step.job].allows("complete"):
                await self._session.execute("job-complete", id=step.job)
            await self._wait_jobs((step.job,), frozenset({"concluded"}), COMMIT_SECONDS)
        except StepFailed as failure:
            job = (await self._jobs()).get(step.job)
            if job is None or job.error is None:  # where the guest is now is not known
                raise
            raise StepFailed(f"{failure}; {STAYS_ON_OVERLAY}") from failure
        await self._session.execute("job-dismiss", id=step.job)


def _words(name: str, job: Job | None) -> str:
    if job is None:
        return f"QEMU has no job {name} any more"
    return job.error or f"job {name} is {job.status}"
