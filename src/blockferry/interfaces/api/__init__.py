"""The service over HTTP, on a Unix socket: what the command and `blockferry.connect` talk to.

    POST /v1/request            a request (model.request) as JSON; answers a view (model.view)
    GET  /v1/events             server-sent events; `domain` and `since` narrow them
    GET  /v1/health             {"version": 1, "kind": "health", "pid": ..., "blockferry": "0.1.0"}

An error is {"version": 1, "kind": "error", "error": {code, outcome, exit_status, message, fields}} with the HTTP status
of `status.py`'s table.
"""

from blockferry.interfaces.api.app import Api

__all__ = ["Api"]
