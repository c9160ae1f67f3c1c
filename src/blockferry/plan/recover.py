"""The decision table: what an operation that was interrupted becomes, from its journal and what is there now.

One row a case, a letter and a sentence of why; ARCHITECTURE.md has the table, made from ROWS. Recovery never goes on
with a copy or a window that had not begun; it never guesses: a domain that can't be asked is left open (row W).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from blockferry.model.blockjob import ChainJob
from blockferry.model.domain import Observation
from blockferry.model.job import Job
from blockferry.model.operation import OperationState, StepState
from blockferry.plan.chain import has_ended
from blockferry.plan.plan import Plan, Window
from blockferry.plan.steps import (
    AddNode,
    CreateImage,
    FinalizeJobs,
    FinalizeStream,
    Freeze,
    RequireBacking,
    SetBacking,
    StartBackup,
    StartCommit,
    StartMirror,
    StartStream,
    Step,
    TakeSnapshots,
    Thaw,
)
from blockferry.plan.tracking import AddBitmap, OpenAgain
from blockferry.plan.window import stands_on

Action = Literal[
    "nothing", "undo", "leave-window", "leave-chain", "record", "record-as-is", "record-part", "settle", "wait"
]

ROWS: dict[str, str] = {
    "A": "The point of no return is recorded: settle forwards; every step of settling finds what it did before.",
    "B": "Nothing was sent to QEMU and no file was made: it is undone as it stands.",
    "C": "Every prepared step shows in the graph and nothing was left to do but the record: write it.",
    "D": "It was interrupted while preparing: undo what shows, in reverse order; the guest never noticed.",
    "E": "The window had not begun: undo its preparation; the mirrors go on, nothing is pivoted.",
    "F": "The guest stands still with every disk switched and every job concluded without an error: record, go on.",
    "G": "The guest may stand still with some disks switched or none: bring all back to their sources, let it run.",
    "H": "QEMU is gone and nothing had been switched: remove the files that we made.",
    "I": "QEMU is gone and the overlays hold data: the switch had happened, so the overlays are authoritative: record.",
    "J": "QEMU is gone inside the window: the guest never ran after it, so the sources are authoritative.",
    "K": "QEMU is gone after the record: nothing is left to settle in it.",
    "L": "The guest runs with a disk switched and no record: its source is stale; record every disk as it is.",
    "M": "The window of a commit, rebase or resumed copy, and the graph shows its end, which holds everything: record, go on.",
    "N": "The window of a commit, rebase or resumed copy, and the chain is the old one, which is whole: cancel, let it run.",
    "P": "Without `transaction` some disks have switched, as was announced: they stay, and are recorded; the rest is undone.",
    "T": "The guest's file systems may be frozen and its agent does not thaw them: the operation stays open until it does.",
    "W": "QEMU can't be asked now: the operation stays open until it can.",
}


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do: a row of the table and its action."""

    row: str
    action: Action

    @property
    def why(self) -> str:
        """The row's sentence."""
        return ROWS[self.row]


class Interrupted(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that is not settled, as the journal has it.

    Attributes:
        state: its state when it was interrupted.
        plan: what was to be done.
        steps: state of every prepared step that was begun, by index.
    """

    state: OperationState
    plan: Plan
    steps: Mapping[int, StepState]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is there now.

    Attributes:
        seen: the domain as observed; None when QEMU is gone or can't be asked.
        gone: whether QEMU is known to be gone (its process has ended), rather than unreachable.
        written: overlays of ours that hold data, by path; looked at only when QEMU is gone.
        dead: targets whose destination does not answer.
        frozen: whether the guest's file systems may be frozen and could not be thawed now.
    """

    seen: Observation | None
    gone: bool = False
    written: frozenset[str] = frozenset()
    dead: Mapping[str, str] = {}
    frozen: bool = False


def may_be_frozen(operation: Interrupted) -> bool:
    """Whether a freeze of this operation may still hold: to be thawed before anything else is looked at.

    A step that failed did nothing; one that was undone is thawed.
    """
    frozen = False
    for index, step in enumerate(operation.plan.prepare):
        if isinstance(step, Freeze):
            frozen = operation.steps.get(index) in ("intent", "done")
        elif isinstance(step, Thaw):
            frozen = frozen and operation.steps.get(index) != "done"
    return frozen


def shows(step: Step, seen: Observation) -> bool:
    """Whether the graph or the jobs show what the step does; True for steps that leave nothing to see there."""
    match step:
        case AddNode() | OpenAgain():
            return step.node in seen.graph.nodes
        case AddBitmap():
            return step.node in seen.graph.nodes and step.bitmap in seen.graph.nodes[step.node].bitmaps
        case TakeSnapshots():
            return all(seen.graph.child(pair.overlay, "backing") == pair.node for pair in step.pairs)
        case StartMirror():
            job = seen.jobs.get(step.job)
            return job is not None and job.error is None and job.status != "concluded"
        case StartCommit() | StartStream() | StartBackup():
            job = seen.jobs.get(step.job)
            return job is not None and job.error is None
        case FinalizeJobs():
            return all(_finalized(seen.jobs.get(name)) for name in step.jobs)
        case FinalizeStream():
            return step.job not in seen.jobs
        case RequireBacking():
            return seen.graph.child(step.node, "backing") == step.backing
        case SetBacking():
            return seen.graph.child(step.node, "backing") == step.backing
    return True


def _finalized(job: Job | None) -> bool:
    return job is None or (job.status == "concluded" and job.error is None)


def switched(window: Window, seen: Observation) -> bool:
    """Whether every disk of the window stands where it was to go and its job has concluded without an error."""
    for disk in window.disks:
        job = seen.jobs.get(disk.mirror.job)
        wanted = disk.mirror.node if window.ends_on == "destination" else disk.source_node
        if job is None or job.status != "concluded" or job.error is not None or stands_on(disk, seen) != wanted:
            return False
    return True


def decide(operation: Interrupted, evidence: Evidence) -> Decision:
    """The row for this operation and this evidence."""
    # A guest that has ended holds nothing frozen.
    ended = evidence.gone or (evidence.seen is not None and evidence.seen.status == "shutdown")
    if evidence.frozen and not ended:
        return Decision(row="T", action="wait")
    if evidence.seen is None:
        return _decide_gone(operation, evidence) if evidence.gone else Decision(row="W", action="wait")
    seen, plan = evidence.seen, operation.plan
    if operation.state == "recorded":
        return Decision(row="A", action="settle")
    if operation.state == "window" and plan.window is not None:
        if plan.window.chain is not None:
            return _decide_chain(plan.window.chain, seen)
        if not evidence.dead and switched(plan.window, seen):
            return Decision(row="F", action="record")
        if seen.running and any(stands_on(disk, seen) == disk.mirror.node for disk in plan.window.disks):
            return Decision(row="L", action="record-as-is")
        return Decision(row="G", action="leave-window")
    if not operation.steps:
        return Decision(row="B", action="nothing")
    if plan.window is not None:
        return Decision(row="E", action="undo")
    begun = len(operation.steps) == len(plan.prepare)
    files_made = all(
        operation.steps.get(index) == "done" for index, step in enumerate(plan.prepare) if isinstance(step, CreateImage)
    )
    if begun and files_made and all(shows(step, seen) for step in plan.prepare) and _healthy_state(operation):
        return Decision(row="C", action="record")
    if plan.in_part and any(isinstance(step, TakeSnapshots) and shows(step, seen) for step in plan.prepare):
        return Decision(row="P", action="record-part")
    return Decision(row="D", action="undo")


def _decide_chain(job: ChainJob, seen: Observation) -> Decision:
    return Decision(row="M", action="record") if has_ended(job, seen) else Decision(row="N", action="leave-chain")


def _healthy_state(operation: Interrupted) -> bool:
    """Not one that was being undone: what has begun to be undone is undone to the end."""
    return all(state in ("intent", "done") for state in operation.steps.values())


def _decide_gone(operation: Interrupted, evidence: Evidence) -> Decision:
    plan = operation.plan
    if operation.state == "recorded":
        return Decision(row="K", action="settle")
    if operation.state == "window":
        return Decision(row="J", action="nothing")
    if not operation.steps:
        return Decision(row="B", action="nothing")
    overlays = {path for path in plan.record.authoritative.values() if path in evidence.written}
    if any(isinstance(step, TakeSnapshots) for step in plan.prepare) and overlays:
        return Decision(row="I", action="record")
    return Decision(row="H", action="undo")
