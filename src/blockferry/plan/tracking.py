"""Steps that keep account of what a copy's destination lacks, so that it can be resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from blockferry.plan.verb import Verb

if TYPE_CHECKING:
    from blockferry.plan.steps import Step

# What a bitmap counts in: as coarse as a mirror's own, and 2 KiB of memory a GiB of disk.
CHUNK = 64 * 1024


class AddBitmap(Verb, frozen=True, kw_only=True, tag="add-bitmap"):
    """block-dirty-bitmap-add: from now on every write to the node is counted, until QEMU ends."""

    alongside: ClassVar[bool] = True
    node: str
    bitmap: str

    def undo(self) -> tuple[Step, ...]:
        """Remove it."""
        return (RemoveBitmap(node=self.node, bitmap=self.bitmap),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"keep account of what is written to {self.node}"


class RemoveBitmap(Verb, frozen=True, kw_only=True, tag="remove-bitmap"):
    """block-dirty-bitmap-remove; nothing where the node or the bitmap is gone."""

    node: str
    bitmap: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"keep no account of what is written to {self.node} any more"


class CountAsWritten(Verb, frozen=True, kw_only=True, tag="count-as-written"):
    """Count these extents, (offset, length) in whole chunks, in a node's bitmap.

    QEMU has no command for that. It merges bitmaps of other nodes: `scratch`, which keeps nothing, is written to.
    Done twice it counts the same, and counting too much costs only copying.
    """

    node: str
    bitmap: str
    scratch: str
    extents: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        """A line for people."""
        lacking = sum(length for _offset, length in self.extents)
        return f"count {lacking} bytes as to be copied, in {len(self.extents)} extents"


class RequireNothingWritten(Verb, frozen=True, kw_only=True, tag="require-nothing-written"):
    """Fail unless the bitmap counts nothing: the destination is equal to the node."""

    node: str
    bitmap: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"nothing of {self.node} is left to be copied"


class OpenAgain(Verb, frozen=True, kw_only=True, tag="open-again"):
    """blockdev-add of a destination that was left behind, with these options (QAPI BlockdevOptions)."""

    node: str
    file: str
    options: dict[str, Any]

    def undo(self) -> tuple[Step, ...]:
        """Close it, and remember what it looks like now: it can be resumed another time."""
        return (LeaveDestination(node=self.node, file=self.file),)

    @property
    def text(self) -> str:
        """A line for people."""
        return f"open {self.node} ({self.options.get('driver')} on {self.file}) again"


class LeaveDestination(Verb, frozen=True, kw_only=True, tag="leave-destination"):
    """Close a destination, if its node is there, and remember what its file looks like then.

    Not where somebody else has closed it: whether it was touched since nobody knows.
    """

    node: str
    file: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"close {self.node}, and remember what {self.file} looks like"
