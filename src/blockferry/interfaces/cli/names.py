"""Arguments whose values the shell can complete: domains, their disks and snapshots, operations.

Asked of the host process if one runs; completing starts none, and is silent when it can't.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from blockferry.hostprocess import StateDir, default_state_dir
from blockferry.interfaces.cli import wire
from blockferry.interfaces.cli.wire import Json

F = TypeVar("F", bound=Callable[..., Any])


def domains(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of attached domains."""
    view = _ask(context, {"request": "list"})
    return _matching([row["name"] for row in view.get("domains", [])], incomplete)


def disks(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Targets of the disks of the domain that was named."""
    view = _ask(context, {"request": "show", "domain": context.params.get("name")})
    return _matching([disk["target"] for disk in view.get("disks", [])], incomplete)


def snapshots(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the snapshots of the domain that was named."""
    view = _ask(context, {"request": "snapshot-list", "domain": context.params.get("name")})
    return _matching([row["name"] for row in view.get("snapshots", [])], incomplete)


def operations_of_all(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Numbers of operations, newest first."""
    return _operations(context, incomplete, lambda _row: True)


def operations_to_go_on_with(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Numbers of moves and copies that are not over, newest first."""
    return _operations(
        context, incomplete, lambda row: row["state"] == "in-progress" and row["what"] in ("move", "copy")
    )


def _operations(context: click.Context, incomplete: str, wanted: Callable[[Json], bool]) -> list[CompletionItem]:
    view = _ask(context, {"request": "operations"})
    rows = [row for row in reversed(view.get("operations", [])) if wanted(row)]
    found = {str(row["id"]): f"{row['domain']} {row['text']}" for row in rows}
    return [CompletionItem(number, help=found[number]) for number in _matching(list(found), incomplete)]


def number_argument(
    complete: Callable[[click.Context, click.Parameter, str], list[CompletionItem]],
) -> Callable[[F], F]:
    """Add ID, an operation's number, to a verb."""
    return click.argument("number", metavar="ID", type=int, shell_complete=complete)


def domain_argument(function: F) -> F:
    """Add NAME, a domain, to a verb."""
    return click.argument("name", shell_complete=domains)(function)


def _ask(context: click.Context, request: Json) -> Json:
    from blockferry.errors import BlockferryError

    state_dir = context.find_root().params.get("state_dir") or default_state_dir()
    try:
        return wire.submit_if_running(StateDir(state_dir), request) or {}
    except (wire.Told, BlockferryError):
        return {}


def _matching(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
