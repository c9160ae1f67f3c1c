"""Planning how a defined guest is started and ended, its mirrors with it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from blockferry import errors
from blockferry.model.blockjob import BlockJob, Mirror
from blockferry.model.definition import Definition, RunAs
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.plan.files import CreateImage
from blockferry.plan.machine import arguments
from blockferry.plan.plan import Plan, Record
from blockferry.plan.resting import Ground, Look, establish, to_rest
from blockferry.plan.steps import AddNode, DrainMirrors, EndQemu, Launch, Resume, SetLimits, StartMirror, Step, Stop


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a start is planned from.

    Attributes:
        definition: the guest, its disks on their present images.
        program: QEMU.
        chains: each disk's images, top first.
        resting: the mirrors that are to be established again, each with what it stands on and what is there of it.
        paused: whether the guest is to stay paused.
        run_as: whom QEMU is to become; None for who starts it.
    """

    definition: Definition
    program: str
    chains: Mapping[str, tuple[ImageFact, ...]]
    resting: tuple[tuple[Mirror, Ground, Look], ...] = ()
    paused: bool = False
    run_as: RunAs | None = None


def plan_start(start: Start) -> Plan:
    """The plan of a start: QEMU with the guest not running yet, all that belongs to it, and then the guest.

    A start that fails or is interrupted before its record is undone: the guest has not run an instruction.

    Raises:
        ImageUnsuitable: an image of a chain won't do.
        InvalidXml: the devices don't fit together.
    """
    definition, chains = start.definition, start.chains
    for chain in chains.values():
        for image in chain:
            if image.problem:
                raise errors.ImageUnsuitable(path=image.path, reason=image.problem)
    words = tuple(arguments(definition, chains, start.run_as))
    established = [establish(mirror, ground, look) for mirror, ground, look in start.resting]
    made = [step for _mirror, steps in established for step in steps]
    # One verb after the other, each for all mirrors at the same time.
    mirroring: list[Step] = [
        step for verb in (CreateImage, AddNode, StartMirror) for step in made if isinstance(step, verb)
    ]
    limits = [SetLimits(device=disk.backend, limits=disk.limits) for disk in definition.disks if disk.limits]
    return Plan(
        what="start",
        text=f"start {definition.name}"
        + (f" with the mirrors of {', '.join(mirror.target for mirror, _steps in established)}" if established else ""),
        prepare=(
            Launch(
                program=start.program,
                arguments=words,
                environment=definition.environment,
                templates=definition.boot.templates,
                run_as=_with_images(start.run_as, definition, chains) if start.run_as is not None else None,
            ),
            *limits,
            *mirroring,
        ),
        record=Record(
            authoritative={target: chain[0].path for target, chain in chains.items()},
            jobs=tuple(mirror for mirror, _steps in established),
        ),
        settle=() if start.paused else (Resume(first=True),),
        offline=True,
    )


def _with_images(who: RunAs, definition: Definition, chains: Mapping[str, tuple[ImageFact, ...]]) -> RunAs:
    """With the images that QEMU opens as that user."""
    files = {image.path for chain in chains.values() for image in chain if image.path.startswith("/")}
    written = {
        chains[disk.target][0].path for disk in definition.disks if not disk.read_only and chains.get(disk.target)
    } & files
    return msgspec.structs.replace(who, written=tuple(sorted(written)), read=tuple(sorted(files - written)))


def mirror_of(plan: Plan, index: int) -> str | None:
    """The target whose mirror a prepared step of a start is about; None for a step of the start itself."""
    step = plan.prepare[index]
    for mirror in plan.record.jobs:
        if isinstance(mirror, Mirror) and (
            (isinstance(step, CreateImage) and step.path == mirror.file)
            or (isinstance(step, AddNode) and step.node == mirror.node)
            or (isinstance(step, StartMirror) and step.job == mirror.job)
        ):
            return mirror.target
    return None


def plan_stop(domain: str, seen: Observation, jobs: tuple[BlockJob, ...]) -> Plan:
    """The plan of ending a guest's QEMU, whatever the guest does; its mirrors rest until it is started again.

    Args:
        domain: its name.
        seen: as observed.
        jobs: those that work.
    """
    mirrors, others = to_rest(jobs)
    caught_up = {
        mirror.target: mirror.job
        for mirror in mirrors
        if (job := seen.jobs.get(mirror.job)) is not None and job.caught_up and job.error is None
    }
    return Plan(
        what="stop",
        text=f"end {domain}",
        record=Record(
            authoritative={disk.target: disk.active.file for disk in seen.disks if disk.chain},
            jobs=mirrors,
            ended={job.target: "cancelled" for job in others},
            reason="the guest was shut off",
        ),
        settle=(
            *([Stop()] if seen.running else []),
            *([DrainMirrors(jobs=caught_up)] if caught_up else []),
            EndQemu(),
        ),
    )
