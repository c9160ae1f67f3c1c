"""Internal snapshots: QEMU and qemu-img say them in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockferry.model.graph import InternalSnapshot


def internal_snapshots(image: Mapping[str, Any]) -> tuple[InternalSnapshot, ...]:
    """Those of one image.

    Args:
        image: an ImageInfo: of query-named-block-nodes, or of `qemu-img info --output=json`.
    """
    return tuple(
        InternalSnapshot(
            name=each["name"],
            id=each["id"],
            created=each["date-sec"] + each["date-nsec"] / 1e9,
            memory=each["vm-state-size"],
        )
        for each in image.get("snapshots", ())
    )
