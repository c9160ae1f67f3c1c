"""Jobs: QEMU's states and verbs, and what an operation's states mean."""

from typing import get_args

import msgspec
import pytest

from blockferry.engine.progress import state_of
from blockferry.model.blockjob import ChainJob, Layer, Mirror
from blockferry.model.job import CAUGHT_UP, ENDED, STATES, VERBS, Job
from blockferry.model.operation import ENDED as OVER
from blockferry.model.operation import OPEN, OperationState


def job(status: str, error: str | None = None) -> Job:
    return Job(id="j", type="mirror", status=status, error=error)


def test_verbs_are_accepted_in_known_states_only() -> None:
    for states in (*VERBS.values(), ENDED, CAUGHT_UP):
        assert states <= STATES


@pytest.mark.parametrize(
    ("verb", "status", "allowed"),
    [
        ("complete", "ready", True),
        ("complete", "running", False),
        ("complete", "standby", False),
        ("finalize", "pending", True),
        ("finalize", "ready", False),
        ("cancel", "pending", True),
        ("cancel", "aborting", False),
        ("cancel", "concluded", False),
        ("dismiss", "concluded", True),
        ("dismiss", "pending", False),
        ("set-speed", "ready", True),
        ("set-speed", "pending", False),
    ],
)
def test_verb(verb: str, status: str, *, allowed: bool) -> None:
    assert job(status).allows(verb) is allowed


@pytest.mark.parametrize("status", sorted(STATES))
def test_caught_up(status: str) -> None:
    assert job(status).caught_up is (status in {"ready", "standby"})
    assert not job(status, "EIO").caught_up


MIRROR = Mirror(
    domain="d",
    target="vda",
    operation=1,
    job="j",
    source_node="s",
    source="/s",
    node="x",
    file_node="xf",
    filter_node="t",
    file="/x",
    format="raw",
)


@pytest.mark.parametrize(
    ("mirror", "job", "state"),
    [
        (MIRROR, job("running"), "copying"),
        (MIRROR, job("paused"), "copying"),
        (MIRROR, job("ready"), "ready"),
        (MIRROR, job("standby"), "ready"),
        (MIRROR, job("pending"), "ready"),
        (MIRROR, job("ready", "EIO"), "lost"),
        (MIRROR, job("concluded", "EIO"), "lost"),
        (MIRROR, None, "lost"),
    ],
)
def test_state_of_a_mirror_that_should_work(mirror: Mirror, job: Job | None, state: str) -> None:
    assert state_of(mirror, job) == state


@pytest.mark.parametrize("ended", ["pivoted", "finished", "cancelled", "removed", "lost"])
def test_state_of_a_mirror_that_has_ended(ended: str) -> None:
    assert state_of(msgspec.structs.replace(MIRROR, state=ended), job("ready")) == ended


def test_a_job_that_concluded_by_itself_is_no_working_copy() -> None:
    """Concluded is not success: nobody of ours has ended it."""
    assert state_of(MIRROR, job("concluded")) == "lost"


@pytest.mark.parametrize(
    ("found", "state"),
    [
        (job("running"), "copying"),
        (job("concluded"), "copying"),  # another round follows, or a mirror
        (job("concluded", "EIO"), "lost"),
        (None, "running"),
    ],
)
def test_state_of_a_copy_that_is_gone_on_with(found: Job | None, state: str) -> None:
    source = Layer(node="s", file="/s", format="raw")
    resume = ChainJob(domain="d", target="vda", operation=1, job="j", type="resume", top=source, base=None, then=MIRROR)
    assert state_of(resume, found) == state


def test_operation_states() -> None:
    assert not OPEN & OVER
    assert set(get_args(OperationState)) == OPEN | OVER | {"in-progress"}
