"""Planning how a defined guest is started and ended."""

from __future__ import annotations

from collections.abc import Mapping

from blockferry import errors
from blockferry.model.definition import Definition
from blockferry.model.domain import Observation
from blockferry.model.files import ImageFact
from blockferry.plan.machine import arguments
from blockferry.plan.plan import Plan, Record
from blockferry.plan.steps import EndQemu, Launch, Resume, SetLimits, Step


def plan_start(
    definition: Definition, program: str, chains: Mapping[str, tuple[ImageFact, ...]], *, paused: bool
) -> Plan:
    """The plan of a start: QEMU with the guest not running yet, all that belongs to it, and then the guest.

    A start that fails or is interrupted before its record is undone: the guest has not run an instruction.

    Args:
        definition: the guest, its disks on their present images.
        program: QEMU.
        chains: each disk's images, top first.
        paused: whether the guest is to stay paused.

    Raises:
        ImageUnsuitable: an image of a chain won't do.
        InvalidXml: the devices don't fit together.
    """
    for chain in chains.values():
        for image in chain:
            if image.problem:
                raise errors.ImageUnsuitable(path=image.path, reason=image.problem)
    words = tuple(arguments(definition, chains))
    limits = [SetLimits(device=disk.id, limits=disk.limits) for disk in definition.disks if disk.limits]
    return Plan(
        what="start",
        text=f"start {definition.name}",
        prepare=(Launch(program=program, arguments=words, environment=definition.environment), *limits),
        record=Record(authoritative={target: chain[0].path for target, chain in chains.items()}),
        settle=() if paused else (Resume(first=True),),
    )


def plan_stop(domain: str, seen: Observation) -> Plan:
    """The plan of ending a guest's QEMU, whatever the guest does: its mirrors are brought to an end first."""
    disks = {disk.target: disk.active.file for disk in seen.disks if disk.chain}
    steps: tuple[Step, ...] = (EndQemu(),)
    return Plan(what="stop", text=f"end {domain}", record=Record(authoritative=disks), settle=steps)
