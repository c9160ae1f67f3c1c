"""Who uses which file, of all domains: those that run, those that are started on it next, and those that copy to it."""

from __future__ import annotations

import asyncio
import os

from blockferry.engine.keeper import Keeper
from blockferry.formats.definition import parse_definition
from blockferry.model.blockjob import Mirror
from blockferry.model.domain import Observation
from blockferry.model.operation import ENDED
from blockferry.plan.destinations import Files
from blockferry.qemu.images import aliases
from blockferry.service.desk import Desk

# A disk's target and the files of its chain.
Chain = tuple[str, tuple[str, ...]]


async def look_up(
    desk: Desk, keeper: Keeper, seen: Observation | None, paths: tuple[str, ...], headers: dict[str, str]
) -> Files:
    """What is known of these files, and who uses which file, of all domains.

    Args:
        desk: of all domains.
        keeper: of the domain that the request is about.
        seen: that domain as observed, None when it is shut off; it is not asked again.
        paths: the files.
        headers: path -> format, of those whose headers are to be read.
    """
    facts = await desk.images.facts(paths)
    known = [*paths, *(image.file for disk in (seen.disks if seen is not None else ()) for image in disk.chain)]
    images = {path: await desk.images.chain(path, image_format, known) for path, image_format in headers.items()}
    return Files(facts=facts, images=images, users=await _users(desk, keeper, seen))


async def standing(desk: Desk, own: Keeper, own_seen: Observation) -> dict[str, tuple[str, ...]]:
    """By the file of each image in a domain's chains: who stands on it, under whichever name. See `plan.chain.Users`."""
    found: dict[str, list[str]] = {}
    for keeper, chains in await _all(desk, own, own_seen):
        whose = "" if keeper is own else f"{keeper.name}'s "
        for target, files in chains:
            for file in files:
                found.setdefault(_one_name(file), []).append(f"{whose}{target}")
        for copy in _copies(desk, keeper):
            if copy.backing is not None:
                found.setdefault(_one_name(copy.backing), []).append(f"the copy of {whose}{copy.target}")
        for file, backing in _left_behind(desk, keeper.name, {file for _target, files in chains for file in files}):
            found.setdefault(_one_name(backing), []).append(f"{file}, which a revert left behind")
    return {image.file: tuple(found[_one_name(image.file)]) for disk in own_seen.disks for image in disk.chain}


async def _users(desk: Desk, own: Keeper, own_seen: Observation | None) -> dict[str, str]:
    """Real path, identity or URI -> the domain and disk that has it open, starts on it, or mirrors to it."""
    users: dict[str, str] = {}
    for keeper, chains in await _all(desk, own, own_seen):
        for copy in _copies(desk, keeper):
            if copy.backing is not None:
                users |= dict.fromkeys(_names(copy.backing), f"the copy of {keeper.name}'s {copy.target} backs onto it")
            users |= dict.fromkeys(_names(copy.file), f"{keeper.name} copies its {copy.target} to it")
        for target, files in chains:
            for file in files:
                users |= dict.fromkeys(_names(file), f"it is in the chain of {keeper.name}'s {target}")
    return users


async def _all(desk: Desk, own: Keeper, own_seen: Observation | None) -> list[tuple[Keeper, list[Chain]]]:
    """Every domain with its chains, as they are now, or as it is started next.

    Of one that can't be asked nothing is known; of one that does not answer, what it was. `own` is not asked again.
    """
    others = [keeper for keeper in desk.keepers.values() if keeper is not own]
    observed = await asyncio.gather(*(desk.seen_lately(keeper) for keeper in others))
    found = []
    for keeper, seen in [(own, own_seen), *zip(others, observed, strict=True)]:
        chains: list[Chain] = []
        if seen is not None:
            chains = [(disk.target, tuple(image.file for image in disk.chain)) for disk in seen.disks]
        elif keeper.record.defined:
            closed = await desk.chains(parse_definition(desk.inactive(keeper.name)))
            chains = [(target, tuple(image.path for image in chain)) for target, chain in closed.items()]
        found.append((keeper, chains))
    return found


def _copies(desk: Desk, keeper: Keeper) -> list[Mirror]:
    """The mirrors and copies of a domain that work or rest; those that are still being filled too."""
    copies = [job.copy for job in keeper.active() if job.copy is not None]
    return [*copies, *desk.resting(keeper.name)]


def _left_behind(desk: Desk, domain: str, in_chains: set[str]) -> list[tuple[str, str]]:
    """(file, backing) of images that back onto a snapshot's and are in no chain, because the guest was reverted."""
    known: dict[str, str] = {}
    for snapshot in desk.journal.snapshots(domain):
        for disk in snapshot.disks if snapshot.reverted else ():
            known |= dict.fromkeys((disk.file, *snapshot.reverted.get(disk.target, ())), disk.backing)
    return [(file, backing) for file, backing in known.items() if file not in in_chains and os.path.exists(file)]


def _names(file: str) -> tuple[str, ...]:
    return aliases(file) if file.startswith("/") else (file,)


def _one_name(file: str) -> str:
    """The same for every name of a file."""
    return _names(file)[-1]


async def mentioned(
    desk: Desk, own: Keeper, own_seen: Observation | None, more: dict[str, str | None], *, but: int | None = None
) -> frozenset[str]:
    """Real paths and identities of all files in a chain, snapshot, mirror, move or finished copy of any domain.

    With what those back onto, as their headers say: a snapshot's image may be in no chain, and stand on another. `more`
    are other files, with their formats where they are known; `but` is a move that does not count.
    """
    found: dict[str, str] = {file: image_format for file, image_format in more.items() if image_format is not None}
    files: set[str] = set()
    for keeper, chains in await _all(desk, own, own_seen):
        files |= {file for _target, chain in chains for file in chain}
        for copy in _copies(desk, keeper):
            found |= {copy.file: copy.format} | _backing(copy.backing, copy.backing_format)
        for snapshot in desk.journal.snapshots(keeper.name):
            for disk in snapshot.disks:
                left = (disk.file, disk.mirror, *snapshot.reverted.get(disk.target, ()))
                found |= dict.fromkeys((file for file in left if file is not None), "qcow2")
                found |= {
                    disk.backing: disk.backing_format,
                    **_backing(disk.mirror_backing, disk.mirror_backing_format),
                }
        for move in desk.journal.moves(keeper.name):
            found |= move.images if not move.over and move.operation != but else {}
        for operation in desk.journal.operations(keeper.name, states=ENDED):
            window = operation.plan.window
            if operation.plan.what == "finish" and window is not None:
                found |= {disk.mirror.file: disk.mirror.format for disk in window.disks}
    for file, image_format in found.items():
        if file not in files and os.path.exists(file):
            files |= {image.path for image in await desk.images.chain(file, image_format)}
    return frozenset(name for file in files | set(found) | set(more) for name in _names(file))


def _backing(file: str | None, image_format: str | None) -> dict[str, str]:
    return {file: image_format} if file is not None and image_format is not None else {}
