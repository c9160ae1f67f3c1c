"""`serve --storage-root`: nothing outside is opened or made, whoever names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from commandkit import Command

from blockferry.testing import TestQemu


async def serve(command: Command, *words: str, environment: Mapping[str, str] | None = None) -> None:
    process = await command.start("serve", "--json", *words, env={**os.environ, **(environment or {})})
    assert process.stdout is not None
    await process.stdout.readline()


@pytest.mark.parametrize("how", ["option", "environment"])
async def test_a_copy_stays_within(command: Command, guest: TestQemu, tmp_path: Path, how: str) -> None:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "inside" / "way-out").symlink_to(tmp_path / "outside")
    images = [str(tmp_path / "a.qcow2"), str(tmp_path / "b.raw"), str(tmp_path / "inside")]
    if how == "option":
        await serve(command, *(word for each in images for word in ("--storage-root", each)))
    else:
        await serve(command, environment={"BLOCKFERRY_STORAGE_ROOTS": ":".join(images)})
    await command.json("attach", "vm1", "--qmp", str(guest.qmp))
    for elsewhere in ("outside/c", "inside/way-out/c", "inside/../outside/c"):
        told = await command.json("copy", "vm1", "vda", str(tmp_path / elsewhere), status=35)
        assert told["error"]["code"] == "destination-unusable"
        assert "it is outside the storage roots" in told["error"]["message"]
        assert "--storage-root" in told["error"]["message"]
    assert list((tmp_path / "outside").iterdir()) == []
    await command("copy", "vm1", "vda", str(tmp_path / "inside/c"), "--wait")
    assert (tmp_path / "inside/c").exists()


async def test_a_root_is_an_absolute_path(command: Command) -> None:
    """The command makes it one; of the environment it is asked for."""
    told = await command("serve", env={**os.environ, "BLOCKFERRY_STORAGE_ROOTS": "images"}, status=13)
    assert "storage root 'images' is not an absolute path" in told.stderr
