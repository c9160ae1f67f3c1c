"""The root of the tree and its three branches, the three outcomes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False)
class BlockferryError(Exception):
    """The root: catch this to catch everything that blockferry raises on purpose."""

    code: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1
    outcome: ClassVar[str] = ""
    template: ClassVar[str] = ""

    @property
    def message(self) -> str:
        """The whole sentence that people read."""
        return self.template.format(**self.fields())

    def fields(self) -> dict[str, Any]:
        """The error's own values, by name, as in its template."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as `--json` and the API give it: code, outcome, exit_status, message and fields."""
        return {
            "code": self.code,
            "outcome": self.outcome,
            "exit_status": self.exit_status,
            "message": self.message,
            "fields": self.fields(),
        }


class Refused(BlockferryError):
    """Nothing was done."""

    outcome = "refused"


class Failed(BlockferryError):
    """It was tried and has been undone."""

    outcome = "failed"


class Unknown(BlockferryError):
    """What became of it can't be said yet; recovery looks and settles it."""

    outcome = "unknown"
