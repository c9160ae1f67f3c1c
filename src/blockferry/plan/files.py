"""Steps about files: claiming, making, syncing and removing them, and copies of images that are made outside QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blockferry.model.files import Renamed
from blockferry.plan.verb import Verb

if TYPE_CHECKING:
    from blockferry.plan.steps import Step


class ClaimFile(Verb, frozen=True, kw_only=True, tag="claim-file"):
    """Create the file exclusively, empty, with owner and mode of `like`; its inode is remembered as ours."""

    alongside: ClassVar[bool] = True
    path: str
    like: str | None = None

    def undo(self) -> tuple[Step, ...]:
        """Remove it, if it is the one that we made."""
        return (RemoveFile(path=self.path),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"create {self.path}, which must not exist"


class CreateImage(Verb, frozen=True, kw_only=True, tag="create-image"):
    """Write an empty image of `size` bytes into a claimed file, or over a block device (`overwrites`)."""

    alongside: ClassVar[bool] = True
    path: str
    format: str
    size: int
    backing: str | None = None
    backing_format: str | None = None
    overwrites: bool = False

    @property
    def text(self) -> str:
        """A line for people."""
        if self.overwrites:
            return f"overwrite {self.path} with an empty {self.format} image of {self.size} bytes"
        onto = f" backing onto {self.backing} ({self.backing_format})" if self.backing else ""
        return f"make {self.path} an empty {self.format} image of {self.size} bytes{onto}"


class RemoveFile(Verb, frozen=True, kw_only=True, tag="remove-file"):
    """Remove a file that this operation claimed; a file that is another by now is left alone."""

    path: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"remove {self.path}, which we created"


class SyncFiles(Verb, frozen=True, kw_only=True, tag="sync-files"):
    """Write files' dirty pages to disk and have their beginnings in memory: the window's flush and reads are short then.

    Before that, what QEMU itself still holds back of the images of `nodes`. Those of `readable` have to be: the guest is to go there.
    Of `renamed` the header is changed after this, and mended where the power fails meanwhile.
    """

    paths: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    renamed: Renamed | None = None

    def undo(self) -> tuple[Step, ...]:
        """What mends a half written header."""
        return (MendBacking(header=self.renamed),) if self.renamed is not None else ()

    @property
    def text(self) -> str:
        """A line for people."""
        return "sync " + ", ".join(self.paths)


class FlushFiles(Verb, frozen=True, kw_only=True, tag="flush-files"):
    """Write files' dirty pages to disk, while the guest writes to them: QEMU's own flush, for which it waits, is short then."""

    paths: tuple[str, ...]

    @property
    def text(self) -> str:
        """A line for people."""
        return "flush " + ", ".join(self.paths)


class MendBacking(Verb, frozen=True, kw_only=True, tag="mend-backing"):
    """Of an image that no QEMU has open any more: have a header that names neither of the two name the one that it did.

    QEMU's header takes two sectors of 512 bytes, the name being in the second one and its length and format in the first. With one of them on
    disk and the other one not, it names nothing, another file, or a file as of another format: the guest would read what never was.
    """

    header: Renamed

    @property
    def text(self) -> str:
        """A line for people."""
        return f"mend the header of {self.header.path}, if it was half written"


class DropFile(Verb, frozen=True, kw_only=True, tag="drop-file"):
    """Remove a file that was merged away, as the caller asked; one that somebody has open is left."""

    path: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"remove {self.path}, whose data is elsewhere now"


class NameBacking(Verb, frozen=True, kw_only=True, tag="name-backing"):
    """Write into the header of a copy, which nobody has open, what it backs onto: the copy of what its source backs onto."""

    path: str
    format: str
    backing: str
    backing_format: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"let the header of {self.path} name {self.backing} ({self.backing_format})"


class ShareBlocks(Verb, frozen=True, kw_only=True, tag="share-blocks"):
    """Have a claimed file, as long as the source, share all blocks of it; the guest may write to the source meanwhile."""

    alongside: ClassVar[bool] = True
    source: str
    file: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"share the blocks of {self.source} with {self.file}"


class RemoveCopy(Verb, frozen=True, kw_only=True, tag="remove-copy"):
    """Remove a copy that an earlier operation created, with that device and inode; another file is left alone."""

    path: str
    device: int
    inode: int

    @property
    def text(self) -> str:
        """A line for people."""
        return f"remove {self.path}, which we created"
