"""Twenty at once, from processes and from threads: one writer a domain, and nothing is lost."""

import asyncio
import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commandkit import Command

import blockferry
from blockferry import errors
from blockferry.client import Domain
from blockferry.model.snapshot import DiskWish, SnapshotWish
from blockferry.testing import QemuBinaries, TestQemu, blockdev_disk, find_qemu, make_image

MANY = 20
SIZE = 1 << 20


@pytest.fixture
def qemu() -> QemuBinaries:
    return find_qemu("qemu10")


async def small_guest(qemu: QemuBinaries, folder: Path) -> TestQemu:
    folder.mkdir(exist_ok=True)
    disk = make_image(qemu, folder / "vda.img", "qcow2", SIZE)
    guest = TestQemu(qemu, folder, args=blockdev_disk("d0", disk, "qcow2"), memory_mib=16)
    await guest.start()
    return guest


def in_thread(state_dir: Path, domain: str, name: str, file: Path) -> str | None:
    """Take a snapshot with a client of this thread's own; the code of its error."""

    async def take() -> None:
        async with blockferry.connect(state_dir) as ferry:
            wish = SnapshotWish(name=name, disks=(DiskWish(name="vda", file=str(file)),))
            await (await ferry.domain(domain)).snapshot_create(wish)

    try:
        asyncio.run(take())
    except errors.BlockferryError as error:
        return error.code
    return None


async def agree(command: Command, domain: str, guest: TestQemu, taken: set[str], folder: Path) -> None:
    """The graph, the XML, the snapshots and the journal say the same, and it is what the answers said."""
    snapshots = (await command.json("snapshot", "list", domain))["snapshots"]
    assert {each["name"] for each in snapshots} == taken
    parents = {each["name"]: each["parent"] for each in snapshots}
    (newest,) = taken - set(parents.values())
    order = [newest]
    while (parent := parents[order[-1]]) is not None:
        order.append(parent)
    assert len(order) == len(taken), "one after the other, each on the one before"
    files = [*(str(folder / name) for name in order), str(folder / "vda.img")]
    (disk,) = (await command.json("show", domain))["disks"]
    assert [image["file"] for image in disk["chain"]] == files
    (device,) = [each for each in await guest.command("query-block") if "inserted" in each]
    image = device["inserted"]["image"]
    for file in files:
        assert image["filename"] == file
        image = image.get("backing-image")
    assert image is None
    xml = (await command.json("show", domain))["xml"]
    assert re.findall(r"<source file=[\'\"]([^\'\"]+)", xml)[: len(files)] == files
    operations = (await command.json("operations", domain))["operations"]
    assert len([each for each in operations if each["state"] == "done"]) == len(taken)
    assert {each["state"] for each in operations} <= {"done", "undone"}


async def test_on_one_domain(command: Command, qemu: QemuBinaries, tmp_path: Path) -> None:
    guest = await small_guest(qemu, tmp_path / "vm1")
    try:
        await command.json("attach", "vm1", "--qmp", str(guest.qmp))
        folder = tmp_path / "vm1"
        names = [f"p{number}" for number in range(MANY // 2)]
        processes = [
            asyncio.create_task(command("snapshot", "create", "vm1", name, "--disk", f"vda={folder / name}"))
            for name in names
        ]
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(MANY) as pool:
            threads = [
                loop.run_in_executor(pool, in_thread, command.state_dir, "vm1", f"t{number}", folder / f"t{number}")
                for number in range(MANY // 2)
            ]
            assert await asyncio.gather(*threads) == [None] * (MANY // 2)
        await asyncio.gather(*processes)
        taken = {*names, *(f"t{number}" for number in range(MANY // 2))}
        await agree(command, "vm1", guest, taken, folder)
    finally:
        await guest.kill()


async def test_of_the_same_name(command: Command, guest: TestQemu) -> None:
    """All ask for the same snapshot: one of them takes it, the others are told that it is there."""
    await command.json("attach", "vm1", "--qmp", str(guest.qmp))
    runs = [await command.start("snapshot", "create", "vm1", "s1", "--disk", "vda", "--json") for _ in range(4)]
    results = await asyncio.gather(*(command.ends(each) for each in runs))
    assert sorted(result.status for result in results) == [0, *[errors.SnapshotExists.exit_status] * 3]
    assert [each["name"] for each in (await command.json("snapshot", "list", "vm1"))["snapshots"]] == ["s1"]


async def test_on_twenty_domains(command: Command, qemu: QemuBinaries, tmp_path: Path) -> None:
    names = [f"vm{number}" for number in range(MANY)]
    async with contextlib.AsyncExitStack() as stack:
        guests = {}
        for name in names:
            guests[name] = await small_guest(qemu, tmp_path / name)
            stack.push_async_callback(guests[name].kill)
        async with blockferry.connect(command.state_dir) as ferry:
            attached = await asyncio.gather(*(ferry.attach(name, guests[name].qmp) for name in names))
            assert all(isinstance(each, Domain) for each in attached)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(MANY) as pool:
            threads = [
                loop.run_in_executor(pool, in_thread, command.state_dir, name, "s1", tmp_path / name / "s1")
                for name in names[MANY // 2 :]
            ]
            runs = [
                command("snapshot", "create", name, "s1", "--disk", f"vda={tmp_path / name / 's1'}")
                for name in names[: MANY // 2]
            ]
            await asyncio.gather(*runs)
            assert await asyncio.gather(*threads) == [None] * (MANY // 2)
        for name in (names[0], names[-1]):
            await agree(command, name, guests[name], {"s1"}, tmp_path / name)
        operations = (await command.json("operations"))["operations"]
        assert sorted((each["domain"], each["state"]) for each in operations) == sorted(
            (name, "done") for name in names
        )
        assert len({each["id"] for each in operations}) == MANY
