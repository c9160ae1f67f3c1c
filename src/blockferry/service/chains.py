"""Jobs on chains: rebase and commit."""

from __future__ import annotations

import msgspec

from blockferry import answers
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.plan.chain import joined, plan_commit, plan_rebase
from blockferry.service.desk import Desk, require_bandwidth
from blockferry.service.usage import standing


class Chains:
    """The room of jobs on chains.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def rebase(self, request: ask.Rebase) -> view.View:
        """Start a stream into a disk's image, or join the copy that comes to the same."""
        require_bandwidth(request.bandwidth)
        async with self._desk.writing(request.domain) as (keeper, seen):
            copy = joined(request.domain, seen, request, self._desk.journal.jobs(request.domain))
            if copy is not None:
                answer = answers.job_view(copy, seen.jobs)
                note = f"joined the copy to {answer.dest}: once the guest is pivoted onto it, its chain is the one asked for"
                return msgspec.structs.replace(answer, notes=(note,))
            operation, names = self._desk.names(dry_run=request.dry_run)
            plan = plan_rebase(request.domain, seen, request, names=names, operation=operation)
            return await self._desk.start_job(keeper, operation, plan, dry_run=request.dry_run)

    async def commit(self, request: ask.Commit) -> view.View:
        """Start a commit."""
        require_bandwidth(request.bandwidth)
        async with self._desk.writing(request.domain) as (keeper, seen):
            operation, names = self._desk.names(dry_run=request.dry_run)
            snapshots = self._desk.journal.snapshots(request.domain)
            plan = plan_commit(
                request.domain,
                seen,
                request,
                snapshots,
                names=names,
                operation=operation,
                users=await standing(self._desk, keeper, seen),
            )
            return await self._desk.start_job(keeper, operation, plan, dry_run=request.dry_run)
