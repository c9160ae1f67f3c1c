"""What has to be so after a case, whatever happened in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worlds import MIB, OURS, TARGETS, World, read_image

from blockferry.model import request as ask
from blockferry.model import view
from blockferry.service import Service
from blockferry.testing import check_image
from blockferry.testing.guest import WritingGuest
from blockferry.testing.pen import RECORD_BYTES, RECORDS_AT, Records

PIECES = [bytes([byte]) * RECORD_BYTES for byte in range(256)]
SETTLED = {"done", "undone", "in-progress"}
WORKING = {"copying", "ready", "catching up", "running"}


@dataclass(frozen=True)
class Standing:
    """How things stand: each disk's chain by file name, the active image's first; and the disks that each snapshot keeps."""

    chains: Mapping[str, tuple[str, ...]]
    snapshots: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Look:
    """A guest as the service shows it at one moment: each look costs QEMU what a dozen commands do."""

    shown: view.DomainView
    snapshots: view.SnapshotList

    @property
    def standing(self) -> Standing:
        return Standing(
            chains={disk.target: tuple(Path(image.file).name for image in disk.chain) for disk in self.shown.disks},
            snapshots={
                each.name: tuple(sorted(disk.target for disk in each.disks)) for each in self.snapshots.snapshots
            },
        )

    @property
    def images(self) -> dict[str, tuple[str, str]]:
        """Each disk's image and its format."""
        return {disk.target: (str(disk.source), str(disk.format)) for disk in self.shown.disks}


async def look(service: Service) -> Look:
    listed = await service.submit(ask.ListSnapshots(domain="vm"))
    assert isinstance(listed, view.SnapshotList)
    return Look(await show(service), listed)


async def standing(service: Service) -> Standing:
    return (await look(service)).standing


async def show(service: Service, *, inactive: bool = False) -> view.DomainView:
    shown = await service.submit(ask.ShowDomain(domain="vm", inactive=inactive))
    assert isinstance(shown, view.DomainView)
    return shown


async def jobs(service: Service) -> dict[str, view.JobView]:
    listed = await service.submit(ask.ListJobs(domain="vm"))
    assert isinstance(listed, view.JobList)
    return {job.disk: job for job in listed.jobs}


async def require_settled(service: Service) -> set[str]:
    """Every operation is done, undone or in progress, and a second recovery finds nothing to do; the states there are."""
    report = await service.submit(ask.Recover())
    assert isinstance(report, view.RecoveryReport)
    assert all(each.row == "-" for each in report.operations), f"a second recovery found something to do: {report}"
    listed = await service.submit(ask.ListOperations())
    assert isinstance(listed, view.OperationList)
    for each in listed.operations:
        assert each.state in SETTLED, each
        assert each.state != "in-progress" or each.next, f"in progress, and no command to go on with: {each}"
    return {each.state for each in listed.operations}


async def under(world: World, dests: set[str]) -> set[str]:
    """The nodes that mirrors' destinations stand on, by QEMU's graph."""
    graph = await world.command("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"] if node["type"] == "block-driver"}
    below: dict[str, set[str]] = {}
    for edge in graph["edges"]:
        if edge["parent"] in names:
            below.setdefault(names[edge["parent"]], set()).add(names[edge["child"]])
    nodes = await world.command("query-named-block-nodes", {"flat": True})
    found: set[str] = set()
    new = {node["node-name"] for node in nodes if any(dest in node["file"] for dest in dests)}
    while new := {child for name in new for child in below.get(name, ())} - found:
        found |= new
    return found


async def require_nothing_left(service: Service, world: World, seen: Look, *, flushless: bool = False) -> None:
    """No node, job or bitmap of ours but those of a chain or of a job that works.

    Where a destination can't be flushed QEMU does not reopen it: what was put under it stays there until its mirror ends.
    """
    listed = await jobs(service)
    working = [job for job in listed.values() if job.state in WORKING]
    files = {image.file for disk in seen.shown.disks for image in disk.chain} | {job.dest for job in working}
    stays = await under(world, {job.dest for job in working}) if flushless else set()
    for node in await world.command("query-named-block-nodes", {"flat": True}):
        if node["node-name"] in stays:
            continue
        # A format node that was opened without its backing is shown as json:{...} with the file name inside.
        if node["node-name"].startswith(OURS) and node["drv"] in ("file", "qcow2", "raw"):
            assert any(file in node["file"] for file in files), f"{node['node-name']} ({node['file']}) is left over"
        for bitmap in node.get("dirty-bitmaps", ()):
            assert not bitmap.get("name") or listed, f"the bitmap {bitmap['name']} is left over"
    there = sorted(job["id"] for job in await world.command("query-jobs"))
    assert len(there) == len(working), f"jobs {there}, working {working}"


async def require_agreement(world: World, seen: Look) -> None:
    """QEMU's own chains, what is shown, the XML and the snapshots are of one mind."""
    by_device = {}
    for drive in await world.command("query-block"):
        image, chain = drive["inserted"]["image"], []
        while image:
            # The filter of a mirror has the file's name as well.
            if image["format"] in ("qcow2", "raw"):
                chain.append(image["filename"])
            image = image.get("backing-image")
        by_device[drive["qdev"]] = chain
    for disk in seen.shown.disks:
        assert any(chain == [image.file for image in disk.chain] for chain in by_device.values()), (disk, by_device)
        # An export is a protocol, a name and a socket there.
        named_so = str(disk.source).rpartition("socket=")[2]
        assert f"'{named_so}'" in (seen.shown.xml or "").replace('"', "'"), "the XML names another image"
    for each in seen.snapshots.snapshots:
        for kept in each.disks:
            assert Path(kept.backing).exists(), f"{each.name} keeps {kept.backing}, which is not there"


def require_contents(world: World, images: Mapping[str, tuple[str, str]], *, leaks: bool = False) -> int:
    """Every image is clean and holds what the guest was told is written; how many records there are."""
    records = world.records()
    found = 0
    for target in TARGETS:
        file, fmt = images[target]
        if fmt == "qcow2":
            check_image(world.stage.binaries, Path(file), fmt, leaks=leaks)
        data = read_image(world.stage, world.file_of(file), fmt, world.folder / f"{target}.raw")
        if world.guest is not None:
            found += require_writings(world.guest, target, data, world)
        else:
            found += require_records(target, data, world.contents[target], records[target])
    return found


def require_writings(guest: WritingGuest, target: str, data: bytes, world: World) -> int:
    """What a Linux that writes by itself was told is written is there, and so is what it never wrote to."""
    assert data[:MIB] == world.contents[target][:MIB], f"{target} is not what the disk held"
    contents = world.folder / f"{target}.raw"
    contents.write_bytes(data)
    assert guest.records.missing(contents, target, guest.acked[target]) == []
    contents.unlink()
    return guest.acked[target] - guest.records.first + 1


def require_records(target: str, data: bytes, expected: bytes | bytearray, records: Records) -> int:
    """What a pen wrote is there, and so is what was there before it."""
    found = 0
    assert data.startswith(expected[:RECORDS_AT]), f"{target} is not what the disk held"
    for slot in range((len(expected) - RECORDS_AT) // RECORD_BYTES):
        at = RECORDS_AT + slot * RECORD_BYTES
        piece = data[at : at + RECORD_BYTES]
        must = records.must.get(slot, 0)
        if piece == PIECES[must]:
            found += must != 0
            continue
        # Announced and not acknowledged: each sector of it may be either.
        may = {must, *records.may.get(slot, ())}
        assert len(may) > 1, f"{target}: record {must} in slot {slot} is lost: {set(piece)}"
        assert set(piece) <= may, f"{target}: slot {slot} holds {set(piece)}, not one of {may}"
    return found


async def images_of(service: Service) -> dict[str, tuple[str, str]]:
    """Each disk's image and its format, of a guest that runs or is defined."""
    return {disk.target: (str(disk.source), str(disk.format)) for disk in (await show(service)).disks}


def named(findings: Any, before: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Where a guest that is gone has its disks, as doctor says; where it says nothing, they are where they were."""
    images = dict(before)
    for finding in findings.findings:
        if finding.code == "start-on":
            file = finding.text.split(" holds what it held")[0]
            images[finding.disk] = (file, "raw" if file.endswith((".copy", "vdb.img", ".sock")) else "qcow2")
    return images
