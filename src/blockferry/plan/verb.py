"""What every step is: a verb with its arguments, a line for people, and what takes it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

if TYPE_CHECKING:
    from blockferry.plan.steps import Step


class Verb(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb"):
    """The base of steps."""

    # Whether neighbours of the same verb may be under way at the same time (plan.waves).
    alongside: ClassVar[bool] = False

    def undo(self) -> tuple[Step, ...]:
        """The steps that take this one back, in their order; none for steps that change nothing."""
        return ()

    @property
    def text(self) -> str:
        """A line for people."""
        raise NotImplementedError
