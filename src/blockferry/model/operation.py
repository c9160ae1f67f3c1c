"""States of an operation and of its steps, as the journal keeps them."""

from __future__ import annotations

from typing import Literal

# planned: the plan is written, and prepares nothing. preparing: steps with an undo. window: the guest may stand still.
# recorded: past the point of no return. in-progress: recorded and settled, and a copy of it still works.
# done, undone: ended. unsettled: neither; recovery must look.
OperationState = Literal["planned", "preparing", "window", "recorded", "in-progress", "done", "undone", "unsettled"]
ENDED: frozenset[OperationState] = frozenset({"done", "undone"})
# In these recovery has something to do; an operation in progress is looked after by its mirrors.
OPEN: frozenset[OperationState] = frozenset({"planned", "preparing", "window", "recorded", "unsettled"})

ALL: frozenset[OperationState] = ENDED | OPEN | {"in-progress"}

StepState = Literal["intent", "done", "failed", "undone"]
Stretch = Literal["prepare", "window", "settle", "undo"]
