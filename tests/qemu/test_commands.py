"""Commands that are on their way to a QEMU at the same time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockferry.qemu.session import COMMANDS_AT_ONCE, Session, has_null
from blockferry.testing import QemuBinaries, TestQemu, make_image


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, False),
        ({"node-name": "a", "size": 0, "read-only": False, "file": {"filename": ""}}, False),
        ({"backing": None}, True),
        ({"actions": [{"type": "abort", "data": {}}, {"data": {"backing": None}}]}, True),
    ],
)
def test_nulls_are_found_wherever_they_are(arguments: dict[str, Any], found: bool) -> None:
    assert has_null(arguments) is found


async def test_a_command_with_a_null_goes_alone(
    qemu: QemuBinaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go together, as many as QEMU takes without becoming deaf."""
    images = [make_image(qemu, tmp_path / f"{number}.qcow2", "qcow2", 1 << 20) for number in range(4)]
    async with TestQemu(qemu, tmp_path) as guest:
        session = await Session.connect(str(guest.qmp), 10.0)
        try:
            under_way: list[bool] = []
            together: list[tuple[bool, ...]] = []
            client = session._client
            really = client.execute

            async def execute(command: str, arguments: Any = None) -> Any:
                under_way.append(has_null(arguments or {}))
                together.append(tuple(under_way))
                try:
                    return await really(command, arguments)
                finally:
                    under_way.remove(has_null(arguments or {}))

            monkeypatch.setattr(client, "execute", execute)
            file = {"driver": "file"}
            adds = [
                session.execute(
                    "blockdev-add",
                    driver="qcow2",
                    node_name=f"n{number}",
                    backing=None,
                    file=file | {"filename": str(image)},
                )
                for number, image in enumerate(images)
            ]
            asks = [session.execute("query-status") for _each in range(20)]
            await asyncio.gather(*asks[:10], *adds, *asks[10:])
            assert {(True,)} == {each for each in together if any(each)}
            assert max(len(each) for each in together) == COMMANDS_AT_ONCE
            nodes = {node["node-name"] for node in await session.execute("query-named-block-nodes")}
            assert {f"n{number}" for number in range(4)} <= nodes
        finally:
            await session.close()
