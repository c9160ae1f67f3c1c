"""Images that lie: what a guest, or who hands an image in, can write into a header (QEMU's docs/interop/qcow2.rst)."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

CLUSTER = 1 << 16
BACKING_FORMAT, DATA_FILE_NAME = 0xE2792ACA, 0x44415441
DATA_FILE = 1 << 2
SIZE = 8 << 20
# Deeper than a chain may be.
DEPTH = 201


def qcow2(
    *,
    size: int = SIZE,
    backing: str = "",
    fmt: str | None = "raw",
    l1_entries: int = 1,
    snapshots: int = 0,
    snapshots_at: int = 4 * CLUSTER,
    table: bytes = b"",
    data_file: str | None = None,
    backing_length: int | None = None,
) -> bytes:
    """An empty image, in order but for what is asked for."""
    extensions = b""
    if backing and fmt is not None:
        extensions += _extension(BACKING_FORMAT, fmt)
    if data_file is not None:
        extensions += _extension(DATA_FILE_NAME, data_file)
    extensions += bytes(8)
    length = len(backing.encode()) if backing_length is None else backing_length
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", 3, 104 + len(extensions) if backing else 0, length, 16, size, 0, l1_entries),
        *(3 * CLUSTER, CLUSTER, 1, snapshots, snapshots_at if snapshots else 0),
    )
    head += struct.pack(">QQQII", DATA_FILE if data_file is not None else 0, 0, 0, 4, 104)
    parts = [head + extensions + backing.encode(), struct.pack(">Q", 2 * CLUSTER), b"\0\1" * 5, b"", table]
    return b"".join(part.ljust(CLUSTER, b"\0") for part in parts)


def _extension(kind: int, text: str) -> bytes:
    data = text.encode()
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def snapshot(name_length: int = 1, extra: int = 0) -> bytes:
    return struct.pack(">QIHHIIQII", 0, 0, 1, name_length, 0, 0, 0, 0, extra).ljust(48, b"1")


# What lies, by its name: given the folder of images, the file that nobody may open, and a port that nobody may connect to.
Lie = Callable[[Path, Path, int], bytes]
LIES: dict[str, Lie] = {
    "a json: backing": lambda _folder, canary, _port: qcow2(
        backing="json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(canary)}})
    ),
    "a json: backing that connects": lambda _folder, _canary, port: qcow2(
        backing=f'json:{{"driver":"nbd","server":{{"type":"inet","host":"127.0.0.1","port":"{port}"}}}}'
    ),
    "an nbd: backing": lambda _folder, _canary, port: qcow2(backing=f"nbd://127.0.0.1:{port}/x"),
    "an old nbd: backing": lambda _folder, _canary, port: qcow2(backing=f"nbd:127.0.0.1:{port}:exportname=x"),
    "a file: backing": lambda _folder, canary, _port: qcow2(backing=f"file:{canary}"),
    "a backing elsewhere": lambda _folder, canary, _port: qcow2(backing=str(canary)),
    "a backing elsewhere, by a relative name": lambda _folder, canary, _port: qcow2(
        backing=f"../outside/{canary.name}"
    ),
    "a backing elsewhere, through a link": lambda _folder, _canary, _port: qcow2(backing="link"),
    "a backing elsewhere, two images down": lambda _folder, _canary, _port: qcow2(backing="middle", fmt="qcow2"),
    "a backing without a format": lambda _folder, canary, _port: qcow2(backing=str(canary), fmt=None),
    "a backing that is to be probed": lambda folder, _canary, _port: qcow2(backing=str(folder / "probed"), fmt=None),
    "a backing of a strange format": lambda folder, _canary, _port: qcow2(backing=str(folder / "probed"), fmt="vmdk"),
    "a backing that is a device": lambda _folder, _canary, _port: qcow2(backing="/dev/zero"),
    "a name that does not end": lambda _folder, canary, _port: qcow2(backing=str(canary), backing_length=1 << 31),
    "a name with a newline": lambda _folder, _canary, _port: qcow2(backing="/images/a\nb"),
    "itself": lambda _folder, _canary, _port: qcow2(backing="lie", fmt="qcow2"),
    "a chain that is too deep": lambda _folder, _canary, _port: qcow2(backing="deep0", fmt="qcow2"),
    "a data file elsewhere": lambda _folder, canary, _port: qcow2(data_file=str(canary)),
    "a data file that connects": lambda _folder, _canary, port: qcow2(data_file=f"nbd://127.0.0.1:{port}/x"),
    "a json: data file": lambda _folder, canary, _port: qcow2(
        data_file="json:" + json.dumps({"driver": "file", "filename": str(canary)})
    ),
    "16 EiB": lambda _folder, _canary, _port: qcow2(size=(1 << 64) - 512, l1_entries=(1 << 32) - 1),
    "8 EiB": lambda _folder, _canary, _port: qcow2(size=1 << 62, l1_entries=1 << 22),
    "a table that is too small": lambda _folder, _canary, _port: qcow2(size=1 << 50),
    "four billion snapshots": lambda _folder, _canary, _port: qcow2(snapshots=(1 << 32) - 1),
    "snapshots beyond the end": lambda _folder, _canary, _port: qcow2(snapshots=2, snapshots_at=1 << 40),
    "snapshots beyond all ends": lambda _folder, _canary, _port: qcow2(snapshots=2, snapshots_at=(1 << 64) - 1),
    "a snapshot's name that is too long": lambda _f, _c, _p: qcow2(snapshots=2, table=snapshot(0xFFFF) * 2),
    "a snapshot with 4 GiB of its own": lambda _f, _c, _p: qcow2(snapshots=1, table=snapshot(1, (1 << 32) - 1)),
    "a header that ends early": lambda _folder, _canary, _port: qcow2()[:80],
    "nothing": lambda _folder, _canary, _port: b"",
}


def lay(folder: Path, canary: Path, port: int) -> Iterator[tuple[str, Path]]:
    """Each lie in its turn, as the file `lie`, among what it needs."""
    (folder / "link").symlink_to(canary)
    (folder / "middle").write_bytes(qcow2(backing=str(canary)))
    (folder / "probed").write_bytes(qcow2(backing=str(canary)))
    for depth in range(DEPTH):
        name = f"deep{depth + 1}" if depth + 1 < DEPTH else str(canary)
        (folder / f"deep{depth}").write_bytes(qcow2(backing=name, fmt="qcow2")[: 4 * CLUSTER])
    for what, lie in LIES.items():
        (folder / "lie").write_bytes(lie(folder, canary, port))
        yield what, folder / "lie"
