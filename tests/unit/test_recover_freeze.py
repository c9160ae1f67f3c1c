"""What a freeze that may still hold means to recovery: the guest never stays frozen, and nothing is recorded of it."""

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recover import GONE, OVERLAY, SNAPSHOT, observed, row

from blockferry.model.domain import Observation
from blockferry.model.operation import OPEN
from blockferry.plan.plan import Plan
from blockferry.plan.recover import Evidence, Interrupted, decide, may_be_frozen
from blockferry.plan.steps import Freeze, TakeSnapshots, Thaw
from blockferry.plan.waves import waves

QUIESCED = msgspec.structs.replace(
    SNAPSHOT, prepare=(*SNAPSHOT.prepare[:3], Freeze(), SNAPSHOT.prepare[3], Thaw(held=True), SNAPSHOT.prepare[4])
)
FREEZE, TAKE, THAW, MIRROR = 3, 4, 5, 6
ALL_DONE = dict.fromkeys(range(7), "done")
TAKEN = observed({"vda": "s"}, {"vda": ("ready", None)}, running=True, backing={"s": "vda-src"})
BEFORE = observed({"vda": "vda-src"}, running=True, nodes=("s",))
ANY_STATE = st.sampled_from(["intent", "done", "failed", "undone"])


def up_to(last: int, **states: str) -> dict[int, str]:
    """All done up to step `last`, but for freeze, take, thaw as told."""
    named = {"freeze": FREEZE, "take": TAKE, "thaw": THAW}
    return {**dict.fromkeys(range(last + 1), "done"), **{named[name]: state for name, state in states.items()}}


def interrupted(steps: Mapping[int, str], plan: Plan = QUIESCED) -> Interrupted:
    return Interrupted(state="preparing", plan=plan, steps=steps)


@pytest.mark.parametrize(
    ("steps", "frozen"),
    [
        ({}, False),
        (up_to(2), False),
        (up_to(THAW, freeze="intent", take="intent", thaw="intent"), True),
        (up_to(THAW, freeze="done", take="intent", thaw="intent"), True),
        (up_to(THAW, thaw="intent"), True),
        (up_to(THAW, thaw="failed"), True),
        # The agent said no, and has thawed what it had frozen; or we have thawed it.
        (up_to(THAW, freeze="failed", take="intent", thaw="intent"), False),
        (up_to(THAW, freeze="undone", take="failed", thaw="intent"), False),
        (up_to(THAW), False),
        (ALL_DONE, False),
    ],
)
def test_may_be_frozen(steps: Mapping[int, str], frozen: bool) -> None:
    assert may_be_frozen(interrupted(steps)) is frozen
    assert not may_be_frozen(interrupted(steps, SNAPSHOT))


@pytest.mark.parametrize("seen", [TAKEN, BEFORE, None])
@pytest.mark.parametrize("state", sorted(OPEN))
def test_frozen_guest_is_not_left(seen: Observation | None, state: str) -> None:
    """Whatever else is so: it stays open until the agent has thawed."""
    assert row(state, QUIESCED, Evidence(seen=seen, frozen=True), ALL_DONE) == ("T", "wait")


def test_ended_guest_holds_nothing_frozen() -> None:
    steps = up_to(THAW, freeze="intent", take="intent", thaw="intent")
    gone = msgspec.structs.replace(GONE, frozen=True)
    assert row("preparing", QUIESCED, gone, steps) == ("H", "undo")
    written = msgspec.structs.replace(gone, written=frozenset({OVERLAY}))
    assert row("preparing", QUIESCED, written, steps) == ("I", "record")
    down = msgspec.structs.replace(BEFORE, status="shutdown", running=False)
    assert row("preparing", QUIESCED, Evidence(seen=down, frozen=True), steps) == ("D", "undo")


def test_thawed_by_recovery_is_undone() -> None:
    """All shows, and nobody knows whether the freeze held until then."""
    assert row("preparing", QUIESCED, Evidence(seen=TAKEN), {**ALL_DONE, FREEZE: "undone"}) == ("D", "undo")
    assert row("preparing", QUIESCED, Evidence(seen=TAKEN), ALL_DONE) == ("C", "record")
    assert row("preparing", QUIESCED, Evidence(seen=TAKEN), {**ALL_DONE, FREEZE: "intent"}) == ("D", "undo")
    assert row("recorded", QUIESCED, Evidence(seen=TAKEN), ALL_DONE) == ("A", "settle")


@given(st.dictionaries(st.integers(0, 6), ANY_STATE), st.sampled_from([TAKEN, BEFORE]))
def test_property_nothing_is_recorded_of_a_freeze_that_was_ended_early(
    steps: Mapping[int, str], seen: Observation
) -> None:
    """As the runner does it: what may be frozen is thawed, and its freeze undone, before the row is picked."""
    was = interrupted(steps)
    if may_be_frozen(was):
        was = interrupted({**steps, FREEZE: "undone"})
    assert not may_be_frozen(was)
    if was.steps.get(FREEZE) != "done" or was.steps.get(THAW) != "done":
        assert decide(was, Evidence(seen=seen)).action in ("undo", "nothing")


def test_nothing_is_written_while_it_is_frozen() -> None:
    """From freeze to thaw is one wave: its intents are written before it, its outcomes after it."""
    sizes = [len(wave) for wave in waves(QUIESCED.prepare)]
    assert sizes == [1, 1, 1, 3, 1]
    one_by_one = (Freeze(), *[TakeSnapshots(pairs=(), together=False)] * 3, Thaw(held=True), *SNAPSHOT.prepare[4:])
    assert [len(wave) for wave in waves(one_by_one)] == [5, 1]
