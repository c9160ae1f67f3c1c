"""A move as whoever follows it sees it: the library and the command follow alike, over plain JSON values.

Kept without imports that take long: the command's fast path has it.
"""

from __future__ import annotations

import time
from typing import Any

from blockferry.errors import BlockferryError, MoveCancelled, MoveDiffers, MoveStands

Json = dict[str, Any]
# The name of the part that is all of a comparison.
COMPARISON = "comparison"
# Of differences so many are named in an error; all are in the view.
NAMED = 3
# Events after which nobody works on a move any more.
ENDS = frozenset({"move-done", "move-stands", "move-cancelled"})


class Following:
    """What is known of a move, from a view of it and the events since.

    Args:
        move: a MoveView.
    """

    def __init__(self, move: Json) -> None:
        self.move = move
        self._parts: dict[str, Json] = {}
        self._heard: set[str] = set()
        self._phase = ""
        self.look(move)

    def look(self, move: Json) -> None:
        """Take a newer view."""
        self.move = move
        self._enter(move["phase"])
        if self._phase == "copy":
            for file in move["files"]:
                self._part(file["file"], "copying", file["copied"], file["total"])

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._parts.clear()
            self._heard.clear()

    def _part(self, name: str, state: str, current: int, total: int, **more: Any) -> None:
        before = self._parts.get(name, {"name": name, "state": state, "current": 0, "rate": None, "converging": None})
        if self._phase == "copy":
            # What a view says of a copy is as of its last sync, and may be older.
            current = max(current, before["current"])
            state = "done" if current >= total else state
        self._parts[name] = {**before, "state": state, "current": current, "total": total, **more}

    def hear(self, event: Json) -> bool:
        """Take an event.

        Returns:
            Whether all parts that tell of themselves have done so once more: about once a second.
        """
        data, name = event["data"], event["disk"]
        if event["type"] == "move-progress":
            self._enter(data["phase"])
            # Disks are compared with what they were on all together.
            name, state = (data["file"], "copying") if "file" in data else (COMPARISON, "comparing")
        elif event["type"] == "progress" and self._phase != "copy" and name in self._targets:
            state = data["state"]
        else:
            return False
        self._part(
            name,
            state,
            data["current"],
            data["total"],
            rate=data.get("rate"),
            converging=data.get("converging"),
        )
        again = name in self._heard
        self._heard = {name} if again else {*self._heard, name}
        whole = self._heard >= set(self._targets)
        if whole:
            self._heard.clear()
        return again or whole or event["type"] == "move-progress"

    def concerns(self, event: Json) -> bool:
        """Whether an event says that the move has got on: then it is worth another look."""
        if event["type"].startswith("move-") and event["seq"]:
            return bool(event["data"].get("operation") == self.move["operation"])
        return event["type"] in ("mirror-started", "mirror-ready", "mirror-dropped") and event["disk"] in self._targets

    @property
    def _targets(self) -> list[str]:
        return [disk["target"] for disk in self.move["disks"]]

    def progress(self) -> Json:
        """How far it is now: a MoveProgress."""
        parts = list(self._parts.values())
        current, total = sum(part["current"] for part in parts), sum(part["total"] for part in parts)
        rates = [part["rate"] for part in parts if part["rate"] is not None and part["state"] not in ("done", "ready")]
        rate = sum(rates) if rates else None
        outrun = any(part["converging"] is False for part in parts)
        return {
            "kind": "move-progress",
            "domain": self.move["domain"],
            "operation": self.move["operation"],
            "time": time.time(),
            "state": self.move["state"],
            "phase": self._phase,
            "parts": parts,
            "current": current,
            "total": total,
            "rate": rate,
            "remaining_seconds": (total - current) / rate if rate and not outrun else None,
            "converging": False if outrun else None,
            "version": 1,
        }

    @property
    def over(self) -> bool:
        """Whether nobody works on it any more: it has ended, or stands still."""
        return self.move["state"] not in ("working", "cancelling")


def how_it_ended(move: Json) -> BlockferryError | None:
    """The error for a move that nobody works on any more; None when all went well.

    Args:
        move: a MoveView.
    """
    where = {"domain": move["domain"], "operation": move["operation"]}
    if move["differences"]:
        named = [
            f"{each['target']} from byte {each['offset']} on ({each['length']} bytes)"
            for each in move["differences"][:NAMED]
        ]
        more = len(move["differences"]) - len(named)
        return MoveDiffers(**where, differences=", ".join([*named, *([f"{more} more"] if more else [])]))
    if move["state"] == "cancelled":
        return MoveCancelled(**where, reason=move["reason"] or "no reason is known")
    if move["state"] == "done":
        return None
    return MoveStands(**where, phase=move["phase"], reason=move["reason"] or "the process that drove it has ended")
