"""Who uses which file, of all domains: those that run, those that are started on it next, and those that copy to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from blockferry.engine.keeper import Keeper
from blockferry.formats.definition import parse_definition
from blockferry.model.blockjob import Mirror
from blockferry.model.domain import Observation
from blockferry.model.operation import ENDED
from blockferry.plan.destinations import Files
from blockferry.qemu.paths import aliases, existing
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
    known = [*paths, *(image.file for disk in (seen.disks if seen is not None else ()) for image in disk.chain)]
    chains = (desk.images.chain(path, image_format, known) for path, image_format in headers.items())
    # Each waits for a thread of its own: together they take as long as one of them.
    facts, users, found = await asyncio.gather(
        desk.images.facts(paths), _users(desk, keeper, seen), asyncio.gather(*chains)
    )
    return Files(facts=facts, images=dict(zip(headers, found, strict=True)), users=users)


async def standing(desk: Desk, own: Keeper, own_seen: Observation) -> dict[str, tuple[str, ...]]:
    """By the file of each image in a domain's chains: who stands on it, under whichever name. See `plan.chain.Users`."""
    stands: list[tuple[str, str]] = []  # the file, and who stands on it
    for keeper, chains in await _all(desk, own, own_seen):
        whose = "" if keeper is own else f"{keeper.name}'s "
        stands += [(file, f"{whose}{target}") for target, files in chains for file in files]
        for copy in _copies(desk, keeper):
            if copy.backing is not None:
                stands.append((copy.backing, f"the copy of {whose}{copy.target}"))
        in_chains = {file for _target, files in chains for file in files}
        for file, backing in await _left_behind(desk, keeper.name, in_chains):
            stands.append((backing, f"{file}, which a revert left behind"))
    own_files = [image.file for disk in own_seen.disks for image in disk.chain]
    names = await _names([*own_files, *(file for file, _who in stands)])
    found: dict[str, list[str]] = {}
    for file, who in stands:
        found.setdefault(names[file][-1], []).append(who)
    return {file: tuple(found[names[file][-1]]) for file in own_files}


async def _users(desk: Desk, own: Keeper, own_seen: Observation | None) -> dict[str, str]:
    """Real path, identity or URI -> the domain and disk that has it open, starts on it, or mirrors to it."""
    uses: list[tuple[str, str]] = []  # the file, and who uses it
    for keeper, chains in await _all(desk, own, own_seen):
        for copy in _copies(desk, keeper):
            if copy.backing is not None:
                uses.append((copy.backing, f"the copy of {keeper.name}'s {copy.target} backs onto it"))
            uses.append((copy.file, f"{keeper.name} copies its {copy.target} to it"))
        uses += [
            (file, f"it is in the chain of {keeper.name}'s {target}") for target, files in chains for file in files
        ]
    names = await _names(file for file, _who in uses)
    return {name: who for file, who in uses for name in names[file]}


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
            closed = await desk.chains(parse_definition(await desk.inactive(keeper.name)))
            chains = [(target, tuple(image.path for image in chain)) for target, chain in closed.items()]
        found.append((keeper, chains))
    return found


def _copies(desk: Desk, keeper: Keeper) -> list[Mirror]:
    """The mirrors and copies of a domain that work or rest; those that are still being filled too."""
    copies = [job.copy for job in keeper.active() if job.copy is not None]
    return [*copies, *desk.resting(keeper.name)]


async def _left_behind(desk: Desk, domain: str, in_chains: set[str]) -> list[tuple[str, str]]:
    """(file, backing) of images that back onto a snapshot's and are in no chain, because the guest was reverted."""
    known: dict[str, str] = {}
    for snapshot in desk.journal.snapshots(domain):
        for disk in snapshot.disks if snapshot.reverted else ():
            known |= dict.fromkeys((disk.file, *snapshot.reverted.get(disk.target, ())), disk.backing)
    there = await existing(file for file in known if file not in in_chains)
    return [(file, backing) for file, backing in known.items() if file in there]


async def _names(files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By file, what is the same for every name of it; the last alone says which it is. An export has one name."""
    files = tuple(files)
    return {file: (file,) for file in files} | await aliases(file for file in files if file.startswith("/"))


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
        for move in desk.journal.moves_under_way(keeper.name):
            found |= move.images if move.operation != but else {}
        for operation in desk.journal.operations_of(keeper.name, "finish"):
            window = operation.plan.window
            if operation.state in ENDED and window is not None:
                found |= {disk.mirror.file: disk.mirror.format for disk in window.disks}
    there = await existing(file for file in found if file not in files)
    for file, image_format in found.items():
        if file in there and file not in files:
            files |= {image.path for image in await desk.images.chain(file, image_format)}
    return frozenset(name for names in (await _names(files | set(found) | set(more))).values() for name in names)


def _backing(file: str | None, image_format: str | None) -> dict[str, str]:
    return {file: image_format} if file is not None and image_format is not None else {}
