"""What people read and what is sent, whatever a caller wrote or a header says."""

import json
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry import errors


@given(st.text(st.characters()), st.text(st.characters()))
def test_message_is_one_printable_line(path: str, reason: str) -> None:
    error = errors.DestinationUnusable(path=path, reason=reason)
    assert error.message.isprintable()
    sent = errors.from_dict(json.loads(msgspec.json.encode(error.to_dict())))
    assert isinstance(sent, errors.DestinationUnusable)
    assert sent.message.isprintable()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("/a b/ä\u20ac", "/a b/ä\u20ac"),
        ("/a\n/b\x1b[2J", "/a\\n/b\\x1b[2J"),
        ("/\udc80", "/\\udc80"),
        ("/\0", "/\\x00"),
        ("x" * 10_000, "x" * 4096 + "..."),
    ],
)
def test_message_of(written: str, read: str) -> None:
    error = errors.DestinationExists(path=written)
    assert error.message.startswith(f"{read} exists already, ")
    assert error.path == written


def test_an_error_can_be_handed_to_another_process() -> None:
    error = errors.NoRoom(path="/a", needed=2, available=1)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), again.message) == (errors.NoRoom, error.message)
