"""What paths are: of those whose file system hangs nothing is known, and nobody else is held up."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockferry.qemu import images, paths

HUNG = "/hung/image"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What lies below /hung is on a server that gives no answer."""
    back = threading.Event()

    def held(ask: Callable[..., object]) -> Callable[..., object]:
        def asked(path: object, *args: object, **named: object) -> object:
            if str(path).startswith("/hung"):
                back.wait()
            return ask(path, *args, **named)

        return asked

    monkeypatch.setattr(paths, "PATH_SECONDS", 0.2)
    monkeypatch.setattr(os, "stat", held(os.stat))
    for name in ("exists", "realpath", "isdir"):
        monkeypatch.setattr(os.path, name, held(getattr(os.path, name)))
    yield
    back.set()


@pytest.mark.usefixtures("hanging")
async def test_of_one_that_hangs_nothing_is_known(tmp_path: Path) -> None:
    image, link = tmp_path / "image", tmp_path / "link"
    image.touch()
    link.symlink_to(image)
    both = [str(link), HUNG, str(tmp_path / "gone")]
    found = image.stat()
    assert await paths.aliases(both) == {
        str(link): (str(image), f"{found.st_dev}:{found.st_ino}"),
        HUNG: (HUNG,),
        str(tmp_path / "gone"): (str(tmp_path / "gone"),),
    }
    assert await paths.real_paths(both) == {str(link): str(image), HUNG: HUNG, both[2]: both[2]}
    assert await paths.existing(both) == {str(link), HUNG}
    assert await paths.directories([str(tmp_path), HUNG, str(image)]) == {str(tmp_path)}
    assert await paths.block_devices(both) == frozenset()
    assert await paths.storages([str(tmp_path), "/hung", "/no such folder"]) == {
        str(tmp_path): found.st_dev,
        "/hung": 0,
        "/no such folder": 0,
    }


@pytest.mark.usefixtures("hanging")
async def test_nobody_else_is_held_up(tmp_path: Path) -> None:
    """The loop goes on meanwhile: another question is answered before the bound of the one that hangs."""
    hung = asyncio.ensure_future(paths.existing([HUNG]))
    await asyncio.sleep(0)
    assert await paths.existing([str(tmp_path)]) == {str(tmp_path)}
    assert not hung.done()
    assert await hung == {HUNG}


async def test_an_error_that_is_none_of_the_file_system_s_is_raised() -> None:
    with pytest.raises(ValueError, match="null"):
        await paths.real_paths(["/a\0b"])


def _file_systems(files: list[str]) -> dict[str, str]:
    said = subprocess.run(["stat", "--file-system", "--format=%T", *files], check=True, capture_output=True, text=True)
    return dict(zip(files, said.stdout.split(), strict=True))


@pytest.mark.usefixtures("hanging")
async def test_what_lies_in_memory(tmp_path: Path) -> None:
    """As stat(1) says; /dev/shm is in memory on every Linux."""
    asked = [str(tmp_path), "/dev/shm", "/proc", HUNG, str(tmp_path / "gone")]
    expected = {path for path, kind in _file_systems(asked[:3]).items() if kind in ("tmpfs", "ramfs")}
    assert await paths.in_memory(asked) == expected
    assert "/dev/shm" in expected


async def test_a_block_device_is_a_disk_wherever_its_name_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = os.stat("/dev/shm").st_dev
    device = os.stat_result((stat.S_IFBLK | 0o600, 1, memory, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": os.makedev(254, 0)})
    monkeypatch.setattr(os, "stat", lambda _path: device)
    assert await paths.in_memory(["/dev/shm/disk"]) == set()


@pytest.mark.usefixtures("hanging")
async def test_facts_and_stamps_of_images_one_of_which_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FILE_SECONDS", 0.2)
    (image := tmp_path / "image").touch()
    facts = await images.Images().facts((str(image), HUNG, "/hung/other"))
    assert (facts[str(image)].kind, facts[str(image)].problem) == ("file", None)
    assert [facts[path].problem for path in (HUNG, "/hung/other")] == [
        f"{path}: its file system does not answer within 0.2 s" for path in (HUNG, "/hung/other")
    ]
    assert list(await images.Images().stamps((HUNG, str(image)))) == [str(image)]
