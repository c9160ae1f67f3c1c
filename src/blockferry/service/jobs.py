"""Jobs: start a copy, list, pivot, finish, cancel, limit."""

from __future__ import annotations

import contextlib
from typing import Literal

import msgspec

from blockferry import answers, errors
from blockferry.engine.keeper import Keeper
from blockferry.journal.records import OperationRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.blockjob import BlockJob, ChainJob, Mirror
from blockferry.model.domain import Observation
from blockferry.model.snapshot import Snapshot
from blockferry.plan import copy as copying
from blockferry.plan import resume as resumption
from blockferry.plan.destinations import Files, is_uri
from blockferry.plan.disks import find_disk
from blockferry.qemu.nbd import inspect
from blockferry.qemu.tool import ImageError
from blockferry.service.desk import Desk, require_bandwidth, require_path
from blockferry.service.usage import look_up
from blockferry.service.windows import run_window


class Jobs:
    """The room of block jobs.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def copy(self, request: ask.StartCopy) -> view.View:
        """Start a block copy."""
        require_bandwidth(request.bandwidth)
        if not is_uri(request.dest):
            require_path(request.dest)
        async with self._desk.writing(request.domain) as (keeper, observed):
            seen = await keeper.observe_work(observed)
            wish = copying.understand(request.domain, seen, request)
            if request.resume:
                return await self._resume(keeper, seen, request, wish)
            operation, names = self._desk.names(dry_run=request.dry_run)
            plan = copying.plan_copy(
                request.domain,
                seen,
                request,
                names=names,
                operation=operation,
                files=await self._files(keeper, seen, wish),
            )
            return await self._desk.start_job(keeper, operation, plan, dry_run=request.dry_run)

    async def _resume(self, keeper: Keeper, seen: Observation, request: ask.StartCopy, wish: copying.Wish) -> view.View:
        """Go on with a copy that was cancelled or lost; the caller holds the domain."""
        journal, disk = self._desk.journal, wish.disk
        job = next((each for each in journal.jobs(keeper.name) if each.target == disk.target), None)
        copy = resumption.resumed(keeper.name, seen, disk, request, job)
        wish = msgspec.structs.replace(wish, file=copy.file, format=copy.format)
        chain = [image.file for image in disk.chain if image.file.startswith("/")]
        operation, names = self._desk.names(dry_run=request.dry_run)
        plan = resumption.plan_resume(
            keeper.name,
            seen,
            request,
            wish,
            copy,
            left=await self._left(copy),
            names=names,
            operation=operation,
            files=await look_up(self._desk, keeper, seen, (*chain, copy.file), {copy.file: copy.format}),
        )
        return await self._desk.start_job(keeper, operation, plan, dry_run=request.dry_run)

    async def _left(self, copy: Mirror) -> resumption.Left:
        """What is there of a copy's destination, which nobody has open."""
        images, journal = self._desk.images, self._desk.journal
        stamp = (await images.stamps((copy.file,))).get(copy.file)
        left = resumption.Left(stamp=stamp)
        if copy.exact or stamp is None or stamp != copy.stamps.get(copy.file):
            return left
        try:
            unit, data = await images.unit(copy.file, copy.format), await images.data(copy.file, copy.format)
        except ImageError as error:
            return msgspec.structs.replace(left, problem=str(error))
        return msgspec.structs.replace(
            left,
            blank=journal.made_blank(copy.operation, copy.file),
            claimed=journal.claim(copy.operation, copy.file),
            data=data,
            unit=unit,
        )

    async def _files(self, keeper: Keeper, seen: Observation, wish: copying.Wish) -> Files:
        paths = [image.file for image in wish.disk.chain if image.file.startswith("/")]
        if not is_uri(wish.file):
            headers = {wish.file: wish.format} if wish.reuse else {}
            files = await look_up(self._desk, keeper, seen, (*paths, wish.file), headers)
            blank = wish.reuse and await self._is_blank(files, wish)
            return msgspec.structs.replace(files, blank=frozenset([wish.file] if blank else []))
        files = await look_up(self._desk, keeper, seen, tuple(paths), {})
        # One that another copy writes to may serve one client at a time, and is refused for that.
        exports = {wish.file: await inspect(wish.file)} if wish.file not in files.users else {}
        return msgspec.structs.replace(files, exports=exports)

    async def _is_blank(self, files: Files, wish: copying.Wish) -> bool:
        """Whether an image that is there holds nothing yet, and one can see that."""
        if files.facts[wish.file].kind != "file" or files.facts[wish.file].used:
            return False
        try:
            return not await self._desk.images.data(wish.file, wish.format)
        except ImageError:
            return False  # the plan says what is wrong with it

    def _jobs(self, keeper: Keeper, seen: Observation, disks: tuple[str, ...]) -> tuple[BlockJob, ...]:
        """The working jobs of these disks, each once."""
        targets = dict.fromkeys(find_disk(keeper.name, seen, disk).target for disk in disks)
        if not targets:
            raise errors.BadRequest(reason="name at least one disk")
        found = tuple(self._desk.job(keeper, target) for target in targets)
        for job in found:
            if job.state == "lost" and isinstance(job, Mirror):
                raise errors.JobLost(domain=keeper.name, disk=job.target, reason=job.reason or "no reason is known")
            if job.state != "active":
                raise errors.NoSuchJob(domain=keeper.name, disk=job.target)
            if isinstance(job, Mirror) and job.move is not None:
                raise errors.MoveUnderWay(domain=keeper.name, operation=job.move, what=f"the mirror of {job.target}")
        return found

    def _mirrors(self, keeper: Keeper, seen: Observation, disks: tuple[str, ...]) -> tuple[Mirror, ...]:
        """The working copies and mirrors of these disks, each once; a copy that is still being filled is none yet."""
        found = []
        for job in self._jobs(keeper, seen, disks):
            if job.copy is None:
                raise errors.BadRequest(
                    reason=f"the {job.type} of {job.target} ends by itself: there is nothing to pivot or finish"
                )
            found.append(job.copy)
        return tuple(found)

    async def list(self, request: ask.ListJobs) -> view.JobList:
        """The jobs of a domain, and how the last ones ended."""
        keeper = self._desk.keeper(request.domain)
        now = await self._desk.jobs_or_none(keeper)
        jobs = tuple(answers.job_view(job, now) for job in self._desk.journal.jobs(request.domain))
        return view.JobList(domain=request.domain, jobs=jobs)

    async def pivot(self, request: ask.PivotJobs) -> view.Done:
        """Let the guest go on on copies: all at one instant, or none."""
        done, mirrors = await self._end(request, what="pivot")
        files = ", ".join(f"{mirror.target} now on {mirror.file}" for mirror in mirrors)
        return view.Done(text=files, operation=done.id, pause_ms=done.pause_ms)

    async def finish(self, request: ask.FinishJobs) -> view.Done:
        """Make copies images of one instant."""
        done, mirrors = await self._end(request, what="finish")
        files = ", ".join(f"{mirror.file} is {mirror.target} as of one instant" for mirror in mirrors)
        return view.Done(text=files, operation=done.id, pause_ms=done.pause_ms)

    async def _end(
        self, request: ask.PivotJobs | ask.FinishJobs, *, what: str
    ) -> tuple[OperationRecord, tuple[Mirror, ...]]:
        keeper = self._desk.keeper(request.domain)
        waiting = self._mirrors(keeper, await keeper.observe(), request.disks)
        for mirror in waiting:
            if mirror.snapshot is not None:
                raise errors.BadRequest(
                    reason=f"the mirror of {mirror.target} belongs to snapshot {mirror.snapshot}: use `blockferry "
                    f"snapshot delete {request.domain} {mirror.snapshot} --reopen-mirror` or --remove-mirror"
                )
        await keeper.wait_ready(tuple(mirror.target for mirror in waiting), request.timeout)
        async with self._desk.writing(request.domain) as (keeper, seen):
            mirrors = self._mirrors(keeper, seen, request.disks)
            ends_on: Literal["destination", "source"] = "destination" if what == "pivot" else "source"
            done = await run_window(self._desk, keeper, seen, mirrors, ends_on=ends_on, what=what)
        return done, mirrors

    async def cancel(self, request: ask.CancelJobs) -> view.Done:
        """Stop jobs."""
        async with self._desk.writing(request.domain) as (keeper, seen):
            jobs = self._jobs(keeper, seen, request.disks)
            operation, _names = self._desk.names()
            done = await keeper.run(operation, copying.plan_cancel(jobs, "cancel", "cancelled"))
        files = ", ".join(job.copy.file for job in jobs if job.copy is not None)
        left = [f"left behind, incomplete: {files}"] if files else []
        ended = {each.target: each.copy for each in self._desk.journal.jobs(request.domain)}
        left += [
            f"to go on with it: blockferry copy {request.domain} {copy.target} {copy.file} --resume"
            for copy in (ended[job.target] for job in jobs)
            if copy is not None and copy.bitmap is not None and copy.stamps
        ]
        chains = [job for job in jobs if isinstance(job, ChainJob) and job.copy is None]
        left += ["the chain is as it was"] if chains else []
        left += [f"written in part: {job.written}" for job in chains if job.written]
        spoilt = [each.name for each in self._desk.journal.snapshots(request.domain) if _written_into(each, chains)]
        left += [f"not what they were any more: snapshots {', '.join(spoilt)}"] if spoilt else []
        return view.Done(text="; ".join(["cancelled", *left]), operation=done.id)

    async def set_speed(self, request: ask.SetJobSpeed) -> view.Done:
        """Limit a job."""
        require_bandwidth(request.bandwidth)
        keeper = self._desk.keeper(request.domain)
        # Not under the domain's lock: it changes nothing that a plan depends on, and must work while others wait.
        (job,) = self._jobs(keeper, await keeper.observe(), (request.disk,))
        if isinstance(job, ChainJob) and job.copy is not None:
            job = await self._limit_copy(request)
        else:
            await keeper.set_speed(job, request.bandwidth)
        limit = f"limited to {request.bandwidth} bytes/s" if request.bandwidth else "not limited any more"
        return view.Done(text=f"the {job.type} of {job.target} is {limit}")

    async def _limit_copy(self, request: ask.SetJobSpeed) -> BlockJob:
        """Limit a copy before its mirror: what comes after this job begins with the limit, or is here already."""
        async with self._desk.writing(request.domain) as (keeper, seen):
            (job,) = self._jobs(keeper, seen, (request.disk,))
            if not isinstance(job, ChainJob):
                await keeper.set_speed(job, request.bandwidth)
                return job
            self._desk.journal.limit_job(job, request.bandwidth)
            # One that has just ended takes no limit; what follows it has it.
            with contextlib.suppress(errors.SpeedRefused):
                await keeper.set_speed(job, request.bandwidth)
            return job


def _written_into(snapshot: Snapshot, commits: list[ChainJob]) -> bool:
    return any(disk.written_into and disk.target == job.target for disk in snapshot.disks for job in commits)
