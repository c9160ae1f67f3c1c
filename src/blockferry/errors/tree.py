"""The root of the tree and its three branches, the three outcomes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

# So much of a value is repeated in a message; a path has up to 4095 bytes, and a chain's has many.
_VALUE_MAX = 4096


def _short(value: Any) -> Any:
    return f"{value[:_VALUE_MAX]}..." if isinstance(value, str) and len(value) > _VALUE_MAX else value


def _encodable(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _printable(character: str) -> str:
    """Nothing that a terminal obeys, and nothing that can't be encoded."""
    return character if character.isprintable() else repr(character)[1:-1]


@dataclass(eq=False)
class BlockferryError(Exception):
    """The root: catch this to catch everything that blockferry raises on purpose."""

    code: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1
    outcome: ClassVar[str] = ""
    template: ClassVar[str] = ""

    @property
    def message(self) -> str:
        """The whole sentence that people read: one line, whatever a caller wrote or a header says."""
        values = {name: _short(value) for name, value in self.fields().items()}
        return "".join(map(_printable, self.template.format(**values)))

    def fields(self) -> dict[str, Any]:
        """The error's own values, by name, as in its template."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __reduce__(self) -> tuple[type[BlockferryError], tuple[Any, ...]]:
        """Pickled by its fields: as an exception it has no arguments."""
        return type(self), tuple(self.fields().values())

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as `--json` and the API give it: code, outcome, exit_status, message and fields."""
        return {
            "code": self.code,
            "outcome": self.outcome,
            "exit_status": self.exit_status,
            "message": self.message,
            "fields": {name: _encodable(value) for name, value in self.fields().items()},
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
