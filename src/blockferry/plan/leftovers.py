"""What is ours in a guest's QEMU and nobody needs any more: found by its name, whoever was killed before it was closed."""

from __future__ import annotations

from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.domain import Observation
from blockferry.plan.copy import close
from blockferry.plan.plan import is_ours
from blockferry.plan.steps import CancelJob, RemoveNode, Step
from blockferry.plan.tracking import RemoveBitmap


def unused_jobs(seen: Observation, tag: str, jobs: tuple[BlockJob, ...]) -> tuple[CancelJob, ...]:
    """What ends the jobs of ours that nobody knows as working: lost, and the host process was killed before they were ended.

    Args:
        seen: the domain as observed; no operation is under way.
        tag: the state directory's.
        jobs: the domain's newest of each disk.
    """
    working = {job.job for job in jobs if job.state == "active"}
    return tuple(CancelJob(job=name) for name in seen.jobs if is_ours(name, tag) and name not in working)


def unused_nodes(
    seen: Observation, tag: str, jobs: tuple[BlockJob, ...], kept: frozenset[str] = frozenset()
) -> tuple[Step, ...]:
    """What closes the nodes of ours that nothing uses, those on top first.

    A disk's nodes are used by its device, a working job's by the job. What is left belongs to a job that ended while its
    nodes could not be closed, by QEMU's refusal or because the host process was killed. A destination of a job that is
    recorded as working is never left: QEMU's jobs and its graph are not asked at one instant, and a round of a resumed copy
    that ends in between is seen to work while nothing uses the node that the next round needs.

    Args:
        seen: the domain as observed; no operation is under way.
        tag: the state directory's.
        jobs: the domain's newest of each disk.
        kept: names that somebody needs all the same.
    """
    copies = {copy.node: copy for job in jobs if (copy := job.copy) is not None}
    needed = kept | {copy.node for job in jobs if job.state == "active" and (copy := job.copy) is not None}
    ours = [name for name in seen.graph.nodes if is_ours(name, tag) and name not in needed]
    found: list[str] = []
    while more := [
        name for name in ours if name not in found and all(edge.parent in found for edge in seen.graph.parents(name))
    ]:
        found += more
    return tuple(close(copies[name]) if name in copies else RemoveNode(node=name, if_unused=True) for name in found)


def unused_bitmaps(
    seen: Observation, tag: str, jobs: tuple[BlockJob, ...], kept: frozenset[str] = frozenset()
) -> tuple[RemoveBitmap, ...]:
    """What removes the bitmaps of ours, of that state directory's tag, that no copy is or will be resumed with.

    Args:
        seen: the domain as observed; no operation is under way.
        tag: the state directory's.
        jobs: the domain's newest of each disk.
        kept: names that somebody needs all the same.
    """
    wanted = {copy.bitmap for job in jobs if (copy := job.copy) is not None and _may_be_resumed(seen, job, copy)}
    return tuple(
        RemoveBitmap(node=node.name, bitmap=name)
        for node in seen.graph.nodes.values()
        for name in node.bitmaps
        if is_ours(name, tag) and name not in wanted and name not in kept
    )


def _may_be_resumed(seen: Observation, job: BlockJob, copy: Mirror) -> bool:
    disk = seen.disk(copy.target)
    if job.state not in ("cancelled", "lost"):
        return job.state == "active"
    return disk is not None and bool(disk.chain) and disk.active.node == copy.source_node
