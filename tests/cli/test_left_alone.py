"""Drives that no snapshot is taken of: said by every command that leaves one out."""

from pathlib import Path

from commandkit import Command
from makes import PC_ALONE, direct_folder, make_disks, makes_of

from blockferry.testing import TestQemu, find_qemu


async def test_what_is_left_out_is_said(command: Command, tmp_path: Path) -> None:
    qemu = find_qemu("distribution")
    makes = makes_of(qemu, "pc")
    said = {f"left out: {drive.target} ({drive.reason})" for drive in PC_ALONE}
    with direct_folder(tmp_path) as folder:
        args = make_disks(qemu, folder, makes, PC_ALONE)
        async with TestQemu(qemu, folder, args=args) as guest:
            await command("attach", "vm1", "--qmp", str(guest.qmp))
            shown = (await command("show", "vm1")).stdout
            heads = {line.split()[0]: line for line in shown.splitlines()[2:] if line[:1].strip()}
            assert set(heads) == {each.target for each in (*makes, *PC_ALONE)}
            assert [target for target in heads if heads[target].endswith("read-only")] == ["vdh", "sdi"]
            assert {target: "cdrom" in heads[target] for target in ("sdi", "hdd", "vdh")} == {
                "sdi": True,
                "hdd": True,
                "vdh": False,
            }
            assert shown.count("(empty)") == 2
            planned = await command("snapshot", "create", "vm1", "s1", "--atomic", "--dry-run")
            assert said <= set(planned.stdout.splitlines())
            for drive in PC_ALONE:
                refused = await command("snapshot", "create", "vm1", "s1", "--disk", drive.target, status=32)
                assert drive.reason in refused.stderr
            made = await command("snapshot", "create", "vm1", "s1", "--atomic")
            assert said <= set(made.stdout.splitlines())
            view = await command.json("snapshot", "create", "vm1", "s2", "--atomic")
            assert view["left_out"] == {drive.target: drive.reason for drive in PC_ALONE}
            assert {disk["target"] for disk in view["disks"]} == {make.target for make in makes}
