"""This interface's own table: error -> HTTP status.

What is not in the table goes by the error's outcome: refused 409, failed 422, unknown 500.
"""

from __future__ import annotations

from blockferry import errors

BY_OUTCOME = {"refused": 409, "failed": 422, "unknown": 500}
BY_ERROR: dict[type[errors.BlockferryError], int] = {
    errors.BadRequest: 400,
    errors.InvalidName: 400,
    errors.InvalidXml: 400,
    errors.DuplicateFile: 400,
    errors.NoSuchDomain: 404,
    errors.NoSuchDisk: 404,
    errors.NoSuchSnapshot: 404,
    errors.NoSuchJob: 404,
    errors.NoSuchOperation: 404,
    errors.MissingCapability: 501,
    errors.UnsupportedFlag: 501,
    errors.QmpUnreachable: 502,
    errors.QmpBusy: 503,
    errors.GuestGone: 502,
    errors.AgentUnreachable: 502,
    errors.QmpTimeout: 504,
    errors.NoRoom: 507,
    errors.JournalUnwritable: 507,
}


def http_status(error: errors.BlockferryError) -> int:
    """The status that this error is answered with."""
    return BY_ERROR.get(type(error), BY_OUTCOME.get(error.outcome, 500))
