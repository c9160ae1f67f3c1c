"""The decision table: what an operation that was interrupted becomes, from its journal and what is there now.

One row a case: a letter, what is done, and a sentence of why; docs/recovery.md is made from ROWS. Recovery never goes on
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
from blockferry.plan.files import CreateImage, MendBacking, RemoveFile
from blockferry.plan.plan import Plan, Window
from blockferry.plan.steps import (
    AddNode,
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
from blockferry.plan.window import keeps_back, stands_on

Action = Literal[
    "nothing", "undo", "leave-window", "leave-chain", "record", "record-as-is", "record-part", "settle", "wait"
]

# What is done, and how the operation ends by it.
ACTIONS: dict[Action, str] = {
    "nothing": "Nothing has to be done. It ends undone.",
    "undo": "What shows of it is undone, the last step first: nodes, jobs and bitmaps go, and the files that we made and"
    " that hold nothing of the guest's. It ends undone.",
    "leave-window": "Every disk is brought back to its source, a mirror that was drained is started again (or lost, where it"
    " held the requests of a guest that runs), and the guest runs if it ran before. It ends undone; if QEMU refuses even that, as row L.",
    "leave-chain": "The job is cancelled, and the guest runs if it ran before. It ends undone.",
    "record": "The point of no return is written, then it is settled: the guest runs if it ran before, jobs are dismissed,"
    " images that were left are closed. It ends done.",
    "record-as-is": "Each disk is recorded where it was found, and the guest runs. It ends done, with the error"
    " `operation-as-it-is`, and `doctor` says which disk is where.",
    "record-part": "The disks that have switched are recorded, the others' preparation is undone. It ends done, and names"
    " both.",
    "settle": "The steps that follow the record are tried again. It ends done.",
    "wait": "Nothing: it stays unsettled, nothing new is begun on its domain, and it is tried again.",
}


class Row(msgspec.Struct, frozen=True):
    """A row of the table.

    Attributes:
        action: what is done.
        why: what was found, and why that is right.
    """

    action: Action
    why: str


ROWS: dict[str, Row] = {
    "A": Row(
        "settle",
        "The point of no return is recorded: settle forwards; every step of settling finds what it did before.",
    ),
    "B": Row("nothing", "Nothing was sent to QEMU and no file was made: it is undone as it stands."),
    "C": Row("record", "Every prepared step shows in the graph and nothing was left to do but the record: write it."),
    "D": Row("undo", "It was interrupted while preparing: undo what shows, in reverse order; the guest never noticed."),
    "E": Row("undo", "The window had not begun: undo its preparation; the mirrors go on, nothing is pivoted."),
    "F": Row(
        "record",
        "The guest stands still with every disk switched and every job concluded without an error: record, go on.",
    ),
    "G": Row(
        "leave-window",
        "The guest may stand still, or be held, with some disks switched or none: bring all back to their sources, let it run.",
    ),
    "H": Row(
        "undo",
        "QEMU is gone and nothing had been switched: remove the files that we made; a half written header is mended.",
    ),
    "I": Row(
        "record",
        "QEMU is gone and the overlays hold data: the switch had happened, so the overlays are authoritative: record.",
    ),
    "J": Row(
        "undo",
        "QEMU is gone inside the window: the guest was answered nothing since it began, so the sources are authoritative, and"
        " what we made for it goes.",
    ),
    "K": Row("settle", "QEMU is gone after the record: nothing is left to settle in it."),
    "L": Row(
        "record-as-is",
        "The guest runs with a disk switched and no record: its source is stale; record every disk as it is.",
    ),
    "M": Row(
        "record",
        "The window of a commit, rebase or resumed copy, and the graph shows its end, which holds everything: record, go on.",
    ),
    "N": Row(
        "leave-chain",
        "The window of a commit, rebase or resumed copy, and the chain is the old one, which is whole: cancel, let it run.",
    ),
    "P": Row(
        "record-part",
        "Without `transaction` some disks have switched, as was announced: they stay, and are recorded; the rest is undone.",
    ),
    "Q": Row(
        "record-as-is",
        "It is recorded that all disks go over, and the job of one that has not is over: record every disk as it is.",
    ),
    "T": Row(
        "wait",
        "The guest's file systems may be frozen and its agent does not thaw them: the operation stays open until it does.",
    ),
    "W": Row("wait", "QEMU can't be asked now: the operation stays open until it can."),
}


class Decision(msgspec.Struct, frozen=True):
    """What to do: a row of the table."""

    row: str

    @property
    def action(self) -> Action:
        """What is done."""
        return ROWS[self.row].action

    @property
    def why(self) -> str:
        """The row's sentence."""
        return ROWS[self.row].why


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


def takes_back(back: Step, *, gone: bool) -> bool:
    """Whether a step of an undo is carried out: with QEMU gone what concerns files, and some of that only then."""
    if isinstance(back, MendBacking):
        return gone
    return not gone or isinstance(back, RemoveFile)


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
        return Decision("T")
    if evidence.seen is None:
        return _decide_gone(operation, evidence) if evidence.gone else Decision("W")
    seen, plan = evidence.seen, operation.plan
    if operation.state == "recorded":
        window = plan.window
        stays = window is not None and keeps_back(window, seen)
        return Decision("Q" if stays else "A")
    if operation.state == "window" and plan.window is not None:
        if plan.window.chain is not None:
            return _decide_chain(plan.window.chain, seen)
        if not evidence.dead and switched(plan.window, seen):
            return Decision("F")
        if seen.running and any(stands_on(disk, seen) == disk.mirror.node for disk in plan.window.disks):
            return Decision("L")
        return Decision("G")
    if not operation.steps:
        return Decision("B")
    if plan.window is not None:
        return Decision("E")
    begun = len(operation.steps) == len(plan.prepare)
    # Neither an image that is whole nor a freeze that held shows in the graph.
    known_done = all(
        operation.steps.get(index) == "done"
        for index, step in enumerate(plan.prepare)
        if isinstance(step, CreateImage | Freeze)
    )
    if begun and known_done and all(shows(step, seen) for step in plan.prepare) and _healthy_state(operation):
        return Decision("C")
    if plan.in_part and any(isinstance(step, TakeSnapshots) and shows(step, seen) for step in plan.prepare):
        return Decision("P")
    return Decision("D")


def _decide_chain(job: ChainJob, seen: Observation) -> Decision:
    return Decision("M") if has_ended(job, seen) else Decision("N")


def _healthy_state(operation: Interrupted) -> bool:
    """Not one that was being undone: what has begun to be undone is undone to the end."""
    return all(state in ("intent", "done") for state in operation.steps.values())


def _decide_gone(operation: Interrupted, evidence: Evidence) -> Decision:
    plan = operation.plan
    if operation.state == "recorded":
        return Decision("K")
    if operation.state == "window":
        return Decision("J")
    if not operation.steps:
        return Decision("B")
    overlays = {path for path in plan.record.authoritative.values() if path in evidence.written}
    if any(isinstance(step, TakeSnapshots) for step in plan.prepare) and overlays:
        return Decision("I")
    return Decision("H")
