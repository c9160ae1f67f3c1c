"""What was done: events, operations, recovery."""

from __future__ import annotations

import asyncio

from blockferry import answers, errors
from blockferry.engine.keeper import Keeper
from blockferry.journal.records import OperationRecord
from blockferry.model import request as ask
from blockferry.model import view
from blockferry.model.operation import OperationState
from blockferry.plan.steps import Freeze
from blockferry.service.desk import Desk

IN_PROGRESS: frozenset[OperationState] = frozenset({"in-progress"})


class History:
    """The room of what was done.

    Args:
        desk: what the rooms share.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list_events(self, request: ask.ListEvents) -> view.EventList:
        """Recorded events."""
        events = self._desk.journal.events(request.domain, request.since)
        return view.EventList(events=events, last=self._desk.journal.last_event())

    async def list_operations(self, request: ask.ListOperations) -> view.OperationList:
        """Operations, without their steps."""
        records = self._desk.journal.operations(request.domain)
        return view.OperationList(operations=tuple(self._operation_view(record) for record in records))

    async def show_operation(self, request: ask.ShowOperation) -> view.OperationView:
        """One operation with its steps."""
        record = self._desk.journal.operation(request.operation)
        if record is None:
            raise errors.NoSuchOperation(operation=request.operation)
        return self._operation_view(record, steps=True)

    def _operation_view(self, record: OperationRecord, *, steps: bool = False) -> view.OperationView:
        quiesced = any(isinstance(step, Freeze) for step in record.plan.prepare)
        own = self._desk.journal.steps(record.id) if steps or quiesced else ()
        return answers.operation_view(
            record,
            own if steps else (),
            self._desk.following(record),
            in_flight=self._in_flight(record),
            frozen_ms=answers.frozen_for(own),
        )

    async def recover(self, _request: ask.Recover) -> view.RecoveryReport:
        """Settle what is not settled."""
        busy: dict[str, str] = {}
        reports = await asyncio.gather(*(self._recover_domain(keeper, busy) for keeper in self._desk.keepers.values()))
        operations = tuple(each for report in reports for each in report)
        unreachable = {
            keeper.name: keeper.problem.message for keeper in self._desk.keepers.values() if keeper.problem is not None
        } | busy
        return view.RecoveryReport(operations=operations, unreachable=unreachable)

    async def _recover_domain(self, keeper: Keeper, busy: dict[str, str]) -> list[view.RecoveredOperation]:
        """The report of one domain; one that is busy holds up no other."""
        try:
            async with keeper.turns.alone():
                rows = dict(await keeper.reconcile())
        except errors.DomainBusy as error:
            busy[keeper.name] = error.message
            return []
        found = []
        working = {record.id: record for record in self._desk.journal.operations(keeper.name, states=IN_PROGRESS)}
        settled = {number: self._desk.journal.operation(number) for number in rows}
        for record in (each for _number, each in sorted((working | settled).items()) if each is not None):
            decision = rows.get(record.id)
            shown = self._operation_view(record)
            found.append(
                view.RecoveredOperation(
                    operation=record.id,
                    domain=keeper.name,
                    what=record.plan.what,
                    row=decision.row if decision else "-",
                    why=decision.why if decision else _works(shown),
                    state=shown.state,
                    next=shown.next,
                )
            )
        return found

    def _in_flight(self, record: OperationRecord) -> bool:
        keeper = self._desk.keepers.get(record.domain)
        return keeper is not None and record.id in keeper.turns.in_flight


def _works(shown: view.OperationView) -> str:
    return f"Its {'move is not over' if shown.what == 'move' else 'job works'}: nothing to settle."
