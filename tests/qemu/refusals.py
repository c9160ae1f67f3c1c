"""Everything that is refused, in one table: what it is, of which operation, and the error.

test_refusals.py asks all of it of real QEMUs; docs/refusals.md is the same table for people, held equal by
tests/house/test_refusal_docs.py. How a row is made is in refusal_kit.py.
"""

import os
from collections.abc import Iterator, Mapping

from refusal_kit import (
    PAGE,
    Asked,
    Place,
    Row,
    Setting,
    Vanishing,
    as_it_is,
    attach,
    commit,
    committing,
    copy,
    copying,
    corrupt,
    created,
    delete,
    deserted,
    document,
    encrypted,
    given_up,
    image,
    layered,
    linked,
    listening,
    loop,
    made,
    move,
    moving,
    over,
    overlay,
    overlays,
    read_only,
    rebase,
    replaced,
    served,
    silent,
    small,
    storage_daemon,
    twins,
    two_ready,
    within,
    xml,
)
from rig import KIB, MIB, SIZE, wish_xml

from blockferry import errors
from blockferry.model import request as ask
from blockferry.model.flags import BlockCopy, SnapshotCreate, SnapshotDelete
from blockferry.model.snapshot import SnapshotWish

# --- the table ------------------------------------------------------------------------------------------------

REUSE = SnapshotCreate.REUSE_EXT
COPY_REUSE = BlockCopy.REUSE_EXT
LONG_NAME, LONG_PATH = "DIR/offered/" + "n" * 256, "DIR/offered/" + "/".join(["p" * 200] * 21)


def new(path: str) -> dict[str, Asked]:
    """Every operation that makes a file, with that path for it."""
    return {"snapshot": overlay(path), "mirror": overlay(to=path), "copy": copy(path)}


def existing(path: str) -> dict[str, Asked]:
    """Every operation that takes a file which is there."""
    return {"snapshot --reuse-ext": overlay(path, flags=REUSE), "copy --reuse-ext": copy(path, flags=COPY_REUSE)}


def rows(
    what: str,
    asked: Mapping[str, Asked],
    error: type[errors.BlockferryError],
    says: str,
    setting: Setting = as_it_is,
) -> Iterator[Row]:
    for operation, request in asked.items():
        yield Row(what, operation, error, says, request, setting)


def pivot(_place: Place) -> ask.Request:
    return ask.PivotJobs(domain="vm1", disks=("vda", "vdb"))


NAMES = (
    Row("no such domain", "show", errors.NoSuchDomain, "no domain 'vm3'", lambda _: ask.ShowDomain(domain="vm3")),
    Row("no such domain", "detach", errors.NoSuchDomain, "no domain 'vm3'", lambda _: ask.Detach(domain="vm3")),
    Row(
        "no such domain",
        "snapshot",
        errors.NoSuchDomain,
        "no domain 'vm3'",
        lambda _: ask.CreateSnapshot(domain="vm3", wish=SnapshotWish()),
    ),
    Row(
        "no such domain",
        "copy",
        errors.NoSuchDomain,
        "no domain 'vm3'",
        lambda _: ask.StartCopy(domain="vm3", disk="vda", dest="/x"),
    ),
    Row(
        "no such domain",
        "move",
        errors.NoSuchDomain,
        "no domain 'vm3'",
        lambda _: ask.MoveStorage(domain="vm3", dest="/x"),
    ),
    *rows(
        "no such disk",
        {
            "snapshot": overlay(disk="vdx"),
            "copy": copy(disk="vdx"),
            "move": move("DIR/offered", "vdx"),
            "rebase": rebase("vdx"),
            "commit": commit("vdx"),
            "pivot": lambda _: ask.PivotJobs(domain="vm1", disks=("vdx",)),
        },
        errors.NoSuchDisk,
        "no disk 'vdx'.*It has: hda, vda, sda, vdb, vdc",
    ),
    *rows(
        "an image of no disk",
        {"copy": copy(disk="DIR/other/top")},
        errors.NoSuchDisk,
        "It has: hda, vda, sda, vdb, vdc",
    ),
    *rows(
        "a disk's name of a megabyte",
        {"copy": copy(disk="x" * MIB)},
        errors.NoSuchDisk,
        "It has: hda, vda, sda, vdb, vdc",
    ),
    *rows(
        "a disk twice",
        {
            "snapshot": xml("<disk name='vda'/><disk name='DIR/vda.img'/>"),
            "move": move("DIR/offered", "vda", "DIR/vda.img"),
        },
        errors.BadRequest,
        "twice",
    ),
    *rows("a disk twice, by one name", {"snapshot": xml("<disk name='vda'/>" * 2)}, errors.InvalidXml, "twice"),
    *rows(
        "no disk at all",
        {"snapshot": xml(*(f"<disk name='{each}' snapshot='no'/>" for each in ("vda", "vdb", "sda")))},
        errors.BadRequest,
        "no disk is left",
    ),
    *rows(
        "no disk at all", {"pivot": lambda _: ask.PivotJobs(domain="vm1", disks=())}, errors.BadRequest, "at least one"
    ),
    *rows(
        "no such snapshot",
        {"snapshot delete": delete("s9"), "snapshot show": lambda _: ask.ShowSnapshot(domain="vm1", snapshot="s9")},
        errors.NoSuchSnapshot,
        "no snapshot 's9'",
    ),
    *rows("a snapshot of that name", {"snapshot": document(wish_xml("s1"))}, errors.SnapshotExists, "'s1' already"),
    *rows(
        "a mirror that it has not",
        {"snapshot delete": delete("s1", SnapshotDelete.REOPEN_MIRROR)},
        errors.NoMirror,
        "s1",
    ),
    *rows(
        "no such operation",
        {"operations show": lambda _: ask.ShowOperation(operation=1 << 40)},
        errors.NoSuchOperation,
        "no operation",
    ),
    *rows(
        "no such job",
        {
            "pivot": lambda _: ask.PivotJobs(domain="vm1", disks=("vda",)),
            "finish": lambda _: ask.FinishJobs(domain="vm1", disks=("vda",)),
            "cancel": lambda _: ask.CancelJobs(domain="vm1", disks=("vda",)),
            "speed": lambda _: ask.SetJobSpeed(domain="vm1", disk="vda", bandwidth=1),
        },
        errors.NoSuchJob,
        "disk vda has no job",
    ),
    *rows(
        "no name",
        {"attach": attach("DIR/offered/sock", domain="../x"), "snapshot": document(wish_xml("a/b"))},
        errors.InvalidName,
        "can't be a name",
    ),
)

SOCKETS = (
    *rows("no such socket", {"attach": attach("DIR/offered/none")}, errors.QmpUnreachable, "No such file"),
    *rows(
        "a socket that nobody listens on",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpUnreachable,
        "Connection refused",
        made(lambda place: deserted(place.offered / "sock")),
    ),
    *rows(
        "a file that is no socket",
        {"attach": attach("DIR/offered/file")},
        errors.QmpUnreachable,
        "Connection refused",
        made(lambda place: (place.offered / "file").touch()),
    ),
    *rows("a directory", {"attach": attach("DIR/offered")}, errors.QmpUnreachable, "Connection refused"),
    *rows("a relative path", {"attach": attach("vm.qmp")}, errors.QmpUnreachable, "absolute"),
    *rows("a name over 255 bytes", {"attach": attach(LONG_NAME)}, errors.QmpUnreachable, "."),
    *rows("a path over 4095 bytes", {"attach": attach(LONG_PATH)}, errors.QmpUnreachable, "longer than 4095 bytes"),
    *rows("a path with a NUL", {"attach": attach("DIR/offered/a\0b")}, errors.QmpUnreachable, "control character"),
    *rows(
        "a socket that is not QMP",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpUnreachable,
        "no QEMU answers",
        listening(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    ),
    *rows(
        "a socket that says other JSON",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpUnreachable,
        "no QEMU answers",
        listening(b'{"no": "greeting"}\r\n'),
    ),
    *rows(
        "a socket that closes at once",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpUnreachable,
        "no QEMU answers",
        listening(),
    ),
    *rows(
        "a socket with a line that does not end",
        {"attach": attach("DIR/offered/sock", timeout=20)},
        errors.QmpUnreachable,
        "no QEMU answers",
        listening(b"x" * 64 * KIB, close=False),
    ),
    *rows(
        "a socket that says nothing",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpBusy,
        r"within 0\.3 s.*-qmp unix:",
        silent,
    ),
    *rows(
        "QMP without a guest",
        {"attach": attach("DIR/offered/sock")},
        errors.QmpUnreachable,
        "query-",
        storage_daemon,
    ),
    *rows("a guest that is attached", {"attach": attach("DIR/qmp.sock")}, errors.DomainExists, "vm1"),
    *rows(
        "a guest that is attached, through a link",
        {"attach": attach("DIR/offered/sock")},
        errors.DomainExists,
        "vm1",
        made(lambda place: (place.offered / "sock").symlink_to(place.rig.guest.qmp)),
    ),
    *rows("a name that is attached", {"attach": attach("DIR/offered/sock", "vm1")}, errors.DomainExists, "vm1"),
)

NEW_FILES = (
    *rows(
        "a file that is there",
        new("DIR/offered/file"),
        errors.DestinationExists,
        "file exists",
        made(lambda place: (place.offered / "file").write_text("somebody's")),
    ),
    *rows(
        "a symbolic link to a file",
        new("DIR/offered/link"),
        errors.DestinationExists,
        "link exists",
        made(lambda place: linked(place.offered / "link", place.path / "read-only")),
    ),
    *rows(
        "a symbolic link to nothing",
        new("DIR/offered/link"),
        errors.DestinationExists,
        "link exists",
        made(lambda place: linked(place.offered / "link", place.offered / "nothing")),
    ),
    *rows(
        "a symbolic link to itself",
        new("DIR/offered/link"),
        errors.DestinationUnusable,
        "symbolic links",
        made(lambda place: linked(place.offered / "link", place.offered / "link")),
    ),
    *rows(
        "outside the storage roots",
        {**new("DIR/offered/new"), "move": move("DIR/offered", "vda")},
        errors.DestinationUnusable,
        "it is outside the storage roots",
        within,
    ),
    *rows(
        "outside the storage roots, through a link that lies within",
        {**new("DIR/offered/inside/way-out/new"), "move": move("DIR/offered/inside/way-out", "vda")},
        errors.DestinationUnusable,
        "it is outside the storage roots",
        within,
    ),
    *rows("a directory", new("DIR/offered"), errors.DestinationUnusable, "it is a directory"),
    *rows(
        "a FIFO",
        new("DIR/offered/fifo"),
        errors.DestinationUnusable,
        "neither a file nor a block device",
        made(lambda place: os.mkfifo(place.offered / "fifo")),
    ),
    *rows("a character device", new("/dev/null"), errors.DestinationUnusable, "neither a file nor a block device"),
    *rows("a directory that is missing", new("DIR/offered/a/b"), errors.DestinationUnusable, "a: No such file"),
    *rows(
        "a directory that is a file",
        new("DIR/offered/file/b"),
        errors.DestinationUnusable,
        "Not a directory",
        made(lambda place: (place.offered / "file").touch()),
    ),
    *rows("a read-only mount", new("DIR/offered/ro/new"), errors.DestinationUnusable, "mounted read-only", read_only),
    *rows("a block device that is mounted", new("DIR/offered/loop"), errors.DestinationUnusable, "is mounted", loop),
    *rows("a name over 255 bytes", new(LONG_NAME), errors.DestinationUnusable, "File name too long"),
    *rows("a path over 4095 bytes", new(LONG_PATH), errors.DestinationUnusable, "longer than 4095 bytes"),
    *rows("a path with a NUL", new("DIR/offered/a\0b"), errors.DestinationUnusable, "control character"),
    *rows("a path with a line break", new("DIR/offered/a\nb"), errors.DestinationUnusable, "control character"),
    *rows("a path that is no text", new("DIR/offered/\udc80"), errors.DestinationUnusable, "not UTF-8"),
    *rows("an empty path", new(""), errors.DestinationUnusable, "not an absolute path"),
    *rows("a relative path", new("image"), errors.DestinationUnusable, "not an absolute path"),
    *rows("a path with ..", new("DIR/offered/../x"), errors.DestinationUnusable, "'\\.\\.'"),
    *rows("the disk's own image", {"copy": copy("DIR/vda.img")}, errors.DestinationUnusable, "in the chain of vda"),
    *rows(
        "the disk's own image, by another name",
        {"copy": copy("DIR/./offered/link")},
        errors.DestinationUnusable,
        "in the chain of vda",
        made(lambda place: linked(place.offered / "link", place.path / "vda.img")),
    ),
    *rows(
        "the disk's own image, through a hard link",
        {"copy": copy("DIR/offered/link")},
        errors.DestinationUnusable,
        "in the chain of vda",
        made(lambda place: os.link(place.path / "vda.img", place.offered / "link")),
    ),
    *rows(
        "an image of the disk's chain",
        {"copy": copy("DIR/sda.img", "sda")},
        errors.DestinationUnusable,
        "in the chain of sda",
    ),
    *rows(
        "an image of another domain's chain",
        new("DIR/other/base"),
        errors.DestinationExists,
        "base exists",
    ),
    *rows(
        "where another copy goes",
        {"snapshot": overlay("DIR/offered/running", "vdb"), "copy": copy("DIR/offered/running", "vdb")},
        errors.DestinationExists,
        "running exists",
        copying,
    ),
)

TWICE = (
    *rows(
        "two disks onto one file",
        {
            "snapshot": overlays(("vda", "DIR/offered/a", None), ("vdb", "DIR/offered/a", None)),
            "mirror": overlays(("vda", "DIR/offered/a", "DIR/offered/m"), ("vdb", "DIR/offered/b", "DIR/offered/m")),
        },
        errors.DuplicateFile,
        "offered/[am] is named twice",
    ),
    *rows(
        "an overlay and its mirror in one file",
        {"mirror": overlay("DIR/offered/a", to="DIR/offered/./a")},
        errors.DuplicateFile,
        "a is named twice",
    ),
    *rows(
        "two disks onto one file, through a symbolic link",
        {"snapshot": overlays(("vda", "DIR/offered/a", None), ("vdb", "DIR/offered/here/a", None))},
        errors.DuplicateFile,
        "here/a is named twice",
        made(lambda place: linked(place.offered / "here", place.offered)),
    ),
    *rows(
        "two disks onto one file, through a hard link",
        {"snapshot --reuse-ext": overlays(("vda", "DIR/offered/a", None), ("vdb", "DIR/offered/b", None), flags=REUSE)},
        errors.DuplicateFile,
        "b is named twice",
        made(twins),
    ),
    *rows(
        "a mirror that backs onto itself",
        {"mirror": overlay(to="DIR/offered/m", backing="DIR/offered/./m", backing_format="qcow2")},
        errors.DuplicateFile,
        "m is named twice",
    ),
    *rows(
        "a mirror that backs onto a new overlay",
        {"mirror": overlay("DIR/offered/a", to="DIR/offered/m", backing="DIR/offered/a", backing_format="qcow2")},
        errors.DuplicateFile,
        "a is named twice",
    ),
)

EXISTING_FILES = (
    *rows("no such file", existing("DIR/offered/none"), errors.ImageUnsuitable, "does not exist"),
    *rows(
        "outside the storage roots",
        {
            "snapshot --reuse-ext": overlay("DIR/offered/there", flags=REUSE),
            "copy --reuse-ext": copy("DIR/offered/alone", flags=COPY_REUSE),
        },
        errors.ImageUnsuitable,
        "it is outside the storage roots",
        within,
    ),
    *rows("a directory", existing("DIR/offered"), errors.ImageUnsuitable, "it is a directory"),
    *rows(
        "a FIFO",
        existing("DIR/offered/fifo"),
        errors.ImageUnsuitable,
        "neither a file nor a block device",
        made(lambda place: os.mkfifo(place.offered / "fifo")),
    ),
    *rows("a name over 255 bytes", existing(LONG_NAME), errors.ImageUnsuitable, "File name too long"),
    *rows(
        "a symbolic link to nothing",
        existing("DIR/offered/link"),
        errors.ImageUnsuitable,
        "No such file",
        made(lambda place: linked(place.offered / "link", place.offered / "nothing")),
    ),
    *rows(
        "a file on a read-only mount",
        {
            "snapshot --reuse-ext": overlay("DIR/offered/ro/there", flags=REUSE),
            "copy --reuse-ext": copy("DIR/offered/ro/alone", flags=COPY_REUSE),
        },
        errors.ImageUnsuitable,
        "Read-only file system",
        read_only,
    ),
    *rows(
        "another size",
        {"snapshot --reuse-ext": overlay("DIR/offered/o", flags=REUSE)},
        errors.ImageUnsuitable,
        f"virtual size is {SIZE // 2} bytes, and the disk's is {SIZE}",
        image("o", size=SIZE // 2, backing="DIR/vda.img", of="qcow2"),
    ),
    *rows(
        "another size",
        {"copy --reuse-ext": copy("DIR/offered/o", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        f"virtual size is {SIZE * 2} bytes, and the disk's is {SIZE}",
        image("o", size=SIZE * 2),
    ),
    *rows(
        "a raw image of another size",
        {"copy --reuse-ext": copy("DIR/offered/o", "vdb", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        f"virtual size is {SIZE - 512} bytes",
        image("o", "raw", SIZE - 512),
    ),
    *rows(
        "another format: raw for qcow2",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "not in qcow2 format",
        image("o", "raw"),
    ),
    *rows(
        "another format: qcow2 for raw",
        {"copy --reuse-ext": copy("DIR/offered/o", format="raw", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        "virtual size is",
        image("o"),
    ),
    *rows(
        "an image over another",
        {"snapshot --reuse-ext": overlay("DIR/offered/o", flags=REUSE)},
        errors.ImageUnsuitable,
        r"not onto .*vda\.img, the disk's current image",
        image("o", backing="DIR/read-only", of="raw"),
    ),
    *rows(
        "an image that calls its backing by another format",
        {"snapshot --reuse-ext": overlay("DIR/offered/o", flags=REUSE)},
        errors.ImageUnsuitable,
        "is raw, and it is qcow2",
        image("o", backing="DIR/vda.img", of="raw"),
    ),
    *rows(
        "an image without a backing file",
        {"snapshot --reuse-ext": overlay("DIR/offered/o", flags=REUSE)},
        errors.ImageUnsuitable,
        "it has no backing file",
        image("o"),
    ),
    *rows(
        "an image without a backing file",
        {"copy --reuse-ext": copy("DIR/offered/o", "sda", base="DIR/sda.img", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        "it has no backing file",
        image("o"),
    ),
    *rows(
        "an image with a backing file for a whole copy",
        {"copy --reuse-ext": copy("DIR/offered/o", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        "a whole copy stands alone",
        image("o", backing="DIR/sda.img", of="qcow2"),
    ),
    *rows(
        "an image over something that is no file",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "is no plain file name",
        made(lambda place: over(place, "o", "nbd://127.0.0.1/x", "raw")),
    ),
    *rows(
        "an image that names no format for its backing",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "formats are never probed|what format",
        made(lambda place: over(place, "o", str(place.path / "vda.img"), None)),
    ),
    *rows(
        "an image over itself",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "it backs onto .*offered/o",
        made(lambda place: over(place, "o", "o", "qcow2")),
    ),
    *rows(
        "an image whose data lie in another file",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "its data lie in",
        made(lambda place: created(place, "o", f"data_file={place.offered / 'data'}")),
    ),
    *rows(
        "an encrypted image",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "it is encrypted",
        made(encrypted),
    ),
    *rows(
        "an image that is marked corrupt",
        existing("DIR/offered/o"),
        errors.ImageUnsuitable,
        "marked corrupt",
        made(corrupt),
    ),
    *rows(
        "an image that is open elsewhere",
        existing("DIR/offered/image"),
        errors.ImageUnsuitable,
        "in use: a QEMU or qemu-img holds a lock on it",
        served(),
    ),
    *rows(
        "an image of another disk's chain",
        existing("DIR/vdb.img"),
        errors.ImageUnsuitable,
        "in use: it is in the chain of vm1's vdb",
    ),
    *rows(
        "an image of another domain's chain",
        existing("DIR/other/base"),
        errors.ImageUnsuitable,
        "in use: it is in the chain of vm2's vda",
    ),
    *rows(
        "an image of another domain's chain, through a symbolic link",
        existing("DIR/offered/link"),
        errors.ImageUnsuitable,
        "in use: it is in the chain of vm2's vda",
        made(lambda place: linked(place.offered / "link", place.path / "other/top")),
    ),
    *rows(
        "an image of another domain's chain, through a hard link",
        existing("DIR/offered/link"),
        errors.ImageUnsuitable,
        "in use: it is in the chain of vm2's vda",
        made(lambda place: os.link(place.path / "other/base", place.offered / "link")),
    ),
    *rows(
        "an image of another domain's chain",
        {"mirror --reuse-ext": overlay("DIR/offered/o", to="DIR/other/top", flags=REUSE)},
        errors.ImageUnsuitable,
        "in use: it is in the chain of vm2's vda",
        image("o", backing="DIR/vda.img", of="qcow2"),
    ),
    *rows(
        "where another copy goes",
        {"copy --reuse-ext": copy("DIR/offered/running", "vdb", flags=COPY_REUSE)},
        errors.ImageUnsuitable,
        "in use: vm1 copies its vda to it",
        copying,
    ),
    *rows(
        "mode relative with --reuse-ext",
        {"snapshot --reuse-ext": document(wish_xml("new", "<disk name='vda' mode='relative'/>"), flags=REUSE)},
        errors.BadRequest,
        "mode relative of vda makes one",
    ),
)

BASES = (
    *rows(
        "raw with a base",
        {"copy": copy(disk="sda", base="DIR/sda.img", format="raw")},
        errors.BadRequest,
        "raw image can't back onto",
    ),
    *rows(
        "raw with a base",
        {"copy --reuse-ext": copy("DIR/offered/o", "sda", base="DIR/sda.img", format="raw", flags=COPY_REUSE)},
        errors.BadRequest,
        "raw image can't back onto",
        image("o", "raw"),
    ),
    *rows(
        "a base that is none of the chain",
        {
            "copy": copy(disk="sda", base="DIR/vda.img"),
            "rebase": rebase(base="/nowhere"),
            "commit": commit(base="/nowhere"),
        },
        errors.ImageUnsuitable,
        "no image under sda's active one",
    ),
    *rows(
        "a base that is no path",
        {
            "copy": copy(disk="sda", base="relative\0"),
            "rebase": rebase(base="relative\0"),
            "commit": commit(top="relative\0"),
        },
        errors.ImageUnsuitable,
        "no image under sda's active one",
    ),
    *rows("the active image as base", {"rebase": rebase(base="DIR/sda.s1")}, errors.ImageUnsuitable, "no image under"),
    *rows("nothing to do", {"rebase": rebase(base="DIR/sda.img")}, errors.DiskUnsuitable, "backs onto .* already"),
    *rows(
        "a disk without a chain",
        {"rebase": rebase("vda"), "commit": commit("vda")},
        errors.DiskUnsuitable,
        "no backing file|backs onto nothing",
    ),
)

DISKS = (
    *rows(
        "an empty drive",
        {
            "snapshot": overlay(disk="hda"),
            "copy": copy(disk="hda"),
            "move": move("DIR/offered", "hda"),
            "rebase": rebase("hda"),
            "commit": commit("hda"),
        },
        errors.DiskUnsuitable,
        "hda can't take part: the drive is empty",
    ),
    *rows(
        "a read-only disk",
        {
            "snapshot": overlay(disk="vdc"),
            "copy": copy(disk="vdc"),
            "move": move("DIR/offered", "vdc"),
            "rebase": rebase("vdc"),
            "commit": commit("vdc"),
        },
        errors.DiskUnsuitable,
        "vdc can't take part: it is read-only",
    ),
    *rows(
        "a disk with a job on it",
        {"snapshot": overlay(), "copy": copy(), "move": move(), "commit": commit("vda")},
        errors.DiskBusy,
        "disk vda has a job on it",
        copying,
    ),
    *rows(
        "a disk that is being copied elsewhere",
        {"rebase": rebase("vda", base="/elsewhere")},
        errors.RebaseElsewhere,
        "disk vda is being copied",
        copying,
    ),
    *rows(
        "a disk with a commit on it",
        {
            "snapshot": overlay(disk="sda"),
            "copy": copy(disk="sda"),
            "rebase": rebase(),
            "commit": commit(),
            "snapshot delete": delete("s1"),
        },
        errors.DiskBusy,
        "disk sda has a job on it",
        committing,
    ),
    *rows(
        "a job that ends by itself",
        {
            "pivot": lambda _: ask.PivotJobs(domain="vm1", disks=("sda",)),
            "finish": lambda _: ask.FinishJobs(domain="vm1", disks=("sda",)),
        },
        errors.BadRequest,
        "ends by itself",
        committing,
    ),
    *rows(
        "a copy that is not ready in time",
        {
            "pivot": lambda _: ask.PivotJobs(domain="vm1", disks=("vda",), timeout=0.05),
            "finish": lambda _: ask.FinishJobs(domain="vm1", disks=("vda",), timeout=0.05),
        },
        errors.JobNotReady,
        "vda is not ready",
        copying,
    ),
    *rows("a domain that has work", {"detach": lambda _: ask.Detach(domain="vm1")}, errors.DomainInUse, "vda", copying),
)

ROOM = (
    *rows(
        "no room, by a page: a raw copy of what the image takes up",
        {"copy": copy("DIR/offered/small/new", "vdb")},
        errors.NoRoom,
        r"needs (\d+) bytes and its file system has",
        small(lambda place: taken(place, "vdb") - PAGE),
    ),
    *rows(
        "no room, by a page: a copy and its own tables",
        {"copy": copy("DIR/offered/small/new", format="qcow2")},
        errors.NoRoom,
        r"needs (\d+) bytes and its file system has",
        small(lambda place: taken(place, "vda") + 5 * 64 * KIB - PAGE),
    ),
    *rows(
        "no room, by a page: an overlay",
        {"snapshot": overlay("DIR/offered/small/new"), "mirror": overlay(to="DIR/offered/small/new")},
        errors.NoRoom,
        f"needs {256 * KIB} bytes and its file system has {256 * KIB - PAGE}",
        small(lambda _: 256 * KIB - PAGE),
    ),
    *rows(
        "no room for all of them together, by a page",
        {
            "mirror": overlays(
                ("vda", "DIR/offered/small/a", "DIR/offered/small/am"), ("vdb", "DIR/offered/small/b", None)
            )
        },
        errors.NoRoom,
        f"needs {768 * KIB} bytes and its file system has {768 * KIB - PAGE}",
        small(lambda _: 768 * KIB - PAGE),
    ),
)

XML = (
    *rows(
        "XML that is not well-formed",
        {"snapshot": document("<domainsnapshot><name>new</domainsnapshot>")},
        errors.InvalidXml,
        "mismatch",
    ),
    *rows("no XML", {"snapshot": document("")}, errors.InvalidXml, "document"),
    *rows("another root", {"snapshot": document("<domain/>")}, errors.InvalidXml, "must be a <domainsnapshot>"),
    *rows(
        "an element that means nothing",
        {"snapshot": document("<domainsnapshot><nmae>new</nmae></domainsnapshot>")},
        errors.InvalidXml,
        "<nmae> is not carried out",
    ),
    *rows(
        "entities that grow (a billion laughs)",
        {
            "snapshot": document(
                "<!DOCTYPE d [<!ENTITY a 'ha'>"
                + "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
                + "]><domainsnapshot><name>&j;</name></domainsnapshot>"
            )
        },
        errors.InvalidXml,
        "a DOCTYPE is not accepted",
    ),
    *rows(
        "an external entity",
        {
            "snapshot": document(
                "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domainsnapshot><description>&x;</description>"
                "</domainsnapshot>"
            )
        },
        errors.InvalidXml,
        "a DOCTYPE is not accepted",
    ),
    *rows("XML of 20 MB", {"snapshot": document(wish_xml("new", " " * 20_000_000))}, errors.InvalidXml, "larger than"),
    *rows(
        "XML nested 100000 deep", {"snapshot": document("<a>" * 100_000 + "</a>" * 100_000)}, errors.InvalidXml, "depth"
    ),
    *rows("a NUL in XML", {"snapshot": document(wish_xml("n\0"))}, errors.InvalidXml, "NUL"),
    *rows("XML that is no text", {"snapshot": document(wish_xml("\udc80"))}, errors.InvalidXml, "Unicode"),
    *rows(
        "a path in XML that is none",
        {
            "snapshot": xml("<disk name='vda'><source file='relative'/></disk>"),
            "mirror": xml("<disk name='vda'><mirror file='/a/../b'/></disk>"),
        },
        errors.InvalidXml,
        "absolute|'..'",
    ),
    *rows(
        "a path in XML over 4095 bytes",
        {"snapshot": xml(f"<disk name='vda'><source file='{LONG_PATH}'/></disk>")},
        errors.InvalidXml,
        "longer than",
    ),
    *rows(
        "an internal snapshot",
        {"snapshot": xml("<disk name='vda' snapshot='internal'/>")},
        errors.InvalidXml,
        "external",
    ),
    *rows(
        "a raw overlay",
        {"snapshot": xml("<disk name='vda'><driver type='raw'/></disk>")},
        errors.InvalidXml,
        "qcow2 only",
    ),
)

WISHES = (
    *rows(
        "a flag that is not carried out",
        {
            "snapshot": document(wish_xml("new"), flags=SnapshotCreate.HALT),
            "copy": copy(flags=1 << 12),
            "rebase": rebase(flags=1 << 12),
            "commit": commit(flags=1 << 12),
            "snapshot delete": delete("s1", 1 << 12),
        },
        errors.UnsupportedFlag,
        "HALT|0x1000",
    ),
    *rows("a format that is not carried out", {"copy": copy(format="vmdk")}, errors.BadRequest, "vmdk"),
    *rows(
        "wishes that contradict each other",
        {
            "copy": copy(format="qcow2", flags=BlockCopy.CREATE_RAW),
            "snapshot delete": delete("s1", SnapshotDelete.CHILDREN | SnapshotDelete.METADATA_ONLY),
        },
        errors.BadRequest,
        "contradict",
    ),
    *rows(
        "a bandwidth below zero",
        {
            "copy": copy(bandwidth=-1),
            "move": move(bandwidth=-1),
            "rebase": rebase(bandwidth=-1),
            "commit": commit(bandwidth=-1),
        },
        errors.BadRequest,
        "bytes per second",
    ),
    *rows(
        "a granularity or buffer of no such size",
        {"copy": copy(granularity=1000)},
        errors.BadRequest,
        "power of two",
    ),
)

NBD = (
    *rows("an NBD URI without a socket", {"copy": copy("nbd+unix:///x")}, errors.DestinationUnusable, "socket="),
    *rows("an NBD URI without a host", {"copy": copy("nbd:///x")}, errors.DestinationUnusable, "HOST"),
    *rows(
        "an NBD URI with a port that is none", {"copy": copy("nbd://h:99999/x")}, errors.DestinationUnusable, "range"
    ),
    *rows(
        "an NBD server that does not listen",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/none")},
        errors.DestinationUnusable,
        "No such file",
    ),
    *rows(
        "an NBD server that does not listen",
        {"copy": copy("nbd://127.0.0.1:1/t")},
        errors.DestinationUnusable,
        "refused",
    ),
    *rows(
        "a server that is no NBD server",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/sock")},
        errors.DestinationUnusable,
        "NBD",
        listening(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    ),
    *rows(
        "an NBD server that hangs",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/sock")},
        errors.DestinationUnusable,
        "no answer within",
        silent,
    ),
    *rows(
        "an NBD server without that export",
        {"copy": copy("nbd+unix:///other?socket=DIR/offered/t.nbd.sock")},
        errors.DestinationUnusable,
        "export 'other'",
        served(),
    ),
    *rows(
        "an NBD export that is too small",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/t.nbd.sock")},
        errors.DestinationUnusable,
        f"{SIZE - MIB} bytes, and the disk has {SIZE}",
        served(size=SIZE - MIB),
    ),
    *rows(
        "an NBD export that is too large",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/t.nbd.sock")},
        errors.DestinationUnusable,
        f"{SIZE + MIB} bytes, and the disk has {SIZE}",
        served(size=SIZE + MIB),
    ),
    *rows(
        "an NBD export that is read-only",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/t.nbd.sock")},
        errors.DestinationUnusable,
        "exported read-only",
        served(read_only=True),
    ),
    *rows(
        "an NBD export as qcow2",
        {"copy": copy("nbd+unix:///t?socket=DIR/offered/t.nbd.sock", format="qcow2")},
        errors.DestinationUnusable,
        "can't grow",
        served(),
    ),
)

GONE = "vm1: QEMU is not there any more .*of operation .*was undone"
VANISHING = (
    Vanishing(
        "a guest that vanishes before anything is begun",
        "snapshot",
        errors.QmpUnreachable,
        "Nothing was done",
        overlay("DIR/new"),
        command="query-named-block-nodes",
    ),
    *(
        Vanishing(
            "a guest that vanishes in the middle", operation, errors.GuestGone, GONE, request, setting, command=at
        )
        for operation, request, setting, at in (
            ("snapshot", overlay("DIR/new"), as_it_is, "blockdev-add"),
            ("snapshot", overlay("DIR/new"), as_it_is, "transaction"),
            ("mirror", overlay("DIR/new", to="DIR/mirror"), as_it_is, "blockdev-mirror"),
            ("copy", copy("DIR/new"), as_it_is, "blockdev-add"),
            ("copy", copy("DIR/new"), as_it_is, "blockdev-mirror"),
            ("rebase", rebase("vda"), layered, "block-stream"),
            ("commit", commit("vda"), layered, "block-commit"),
            ("pivot", pivot, two_ready, "stop"),
            ("pivot", pivot, two_ready, "job-complete"),
            ("pivot", pivot, two_ready, "job-finalize"),
        )
    ),
)


def taken(place: Place, target: str) -> int:
    """What a disk's image takes up, holes left out."""
    return (place.path / f"{target}.img").stat().st_blocks * 512


# By the headings of the docs; what is asked at one place for all, and what takes a guest each.
MOVES = (
    *rows(
        "a directory that is not there",
        {"move": move("DIR/offered/none")},
        errors.DestinationUnusable,
        "No such file|does not exist|is not there",
    ),
    *rows(
        "a file that is there already",
        {
            "move": move("DIR/offered", "vda=there"),
            "move --strategy mirror": move("DIR/offered", "vda=there", strategy="mirror"),
        },
        errors.DestinationExists,
        "there exists",
        image("there"),
    ),
    *rows("where the disks are", {"move": move("DIR")}, errors.DestinationExists, "vda.img exists"),
    *rows("one file for two disks", {"move": move("DIR/offered", "vda=x", "vdb=x")}, errors.DuplicateFile, "offered/x"),
    *rows(
        "a file system that is too small for all of it",
        {
            "move": move("DIR/offered/small"),
            "move --strategy mirror": move("DIR/offered/small", strategy="mirror", chain="flatten"),
        },
        errors.NoRoom,
        r"needs (\d+) bytes and its file system has",
        small(lambda _: 256 * KIB),
    ),
    *rows(
        "raw, and images under it that are kept",
        {"move": move("DIR/offered", "sda", format="raw")},
        errors.BadRequest,
        "--chain flatten",
    ),
    *rows(
        "what can't be offloaded: one image of several, another format",
        {
            "move --strategy offload": move("DIR/offered", "sda", chain="flatten", strategy="offload"),
            "move --strategy offload --format": move("DIR/offered", "vda", format="raw", strategy="offload"),
        },
        errors.DiskUnsuitable,
        "can't be offloaded",
    ),
    *rows(
        "an image that is to be copied outside QEMU, and another file lies there",
        {"move --strategy offload": move("DIR/offered", "vdb", strategy="offload")},
        errors.DiskUnsuitable,
        "it may be another file than the one that the guest has open",
        replaced,
    ),
    *rows(
        "an image that is to be removed, and another file lies there",
        {"move --delete-source": move("DIR/offered", "vdb", strategy="mirror", delete_source=True)},
        errors.ImageUnsuitable,
        "it may be another file than the one that the guest has open",
        replaced,
    ),
    *rows(
        "sources to be removed after a sample was compared",
        {"move": move(verify="sample", delete_source=True)},
        errors.BadRequest,
        "verify full",
    ),
    *rows(
        "an NBD server that does not listen",
        {"move": move("DIR/offered", "vdb=nbd+unix:///t?socket=DIR/offered/none")},
        errors.DestinationUnusable,
        "No such file|can't be reached|does not",
    ),
    *rows(
        "a disk that is being moved",
        {
            "snapshot": overlay(),
            "copy": copy(),
            "move": move("DIR/offered", "vda=elsewhere"),
            "rebase": rebase("vda"),
            "commit": commit("vda"),
        },
        errors.MoveUnderWay,
        "disk vda is part of move .*operations cancel",
        moving,
    ),
    *rows(
        "a guest that is being moved",
        {"detach": lambda _: ask.Detach(domain="vm1")},
        errors.MoveUnderWay,
        "the domain is part of move",
        moving,
    ),
    *rows(
        "a move that is over",
        {
            "operations resume": lambda place: ask.ResumeOperation(operation=place.operation),
            "operations cancel": lambda place: ask.CancelOperation(operation=place.operation),
        },
        errors.MoveNotPossible,
        "is over",
        given_up,
    ),
    *rows(
        "an operation that is no move and no copy",
        {
            "operations resume": lambda _: ask.ResumeOperation(operation=1),
            "operations cancel": lambda _: ask.CancelOperation(operation=1),
        },
        errors.NothingToResume,
        "is no move",
    ),
)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Names": NAMES,
    "QMP sockets": SOCKETS,
    "Disks": DISKS,
    "Files that are made": NEW_FILES,
    "One file twice": TWICE,
    "Files that are there": EXISTING_FILES,
    "Bases": BASES,
    "Room": ROOM,
    "NBD": NBD,
    "XML": XML,
    "Wishes": WISHES,
    "Moves": MOVES,
}
ROWS = tuple(row for section in SECTIONS.values() for row in section)
