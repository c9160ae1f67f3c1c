"""Targets: libvirt's names, in order, kept once given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.model.domain import TARGET_PREFIX, assign_targets, names_that_last, target_name

BUSES = sorted(TARGET_PREFIX)


@pytest.mark.parametrize(
    ("bus", "index", "name"),
    [
        ("virtio", 0, "vda"),
        ("virtio", 25, "vdz"),
        ("virtio", 26, "vdaa"),
        ("virtio", 27, "vdab"),
        ("virtio", 26 + 26 * 26 - 1, "vdzz"),
        ("virtio", 26 + 26 * 26, "vdaaa"),
        ("scsi", 1, "sdb"),
        ("sata", 2, "sdc"),
        ("usb", 3, "sdd"),
        ("ide", 0, "hda"),
        ("nvme", 0, "nvme0n1"),
        ("nvme", 30, "nvme30n1"),
    ],
)
def test_target_name(bus: str, index: int, name: str) -> None:
    assert target_name(bus, index) == name


def test_in_the_order_given_each_prefix_for_itself() -> None:
    devices = [("a", "virtio"), ("b", "scsi"), ("c", "virtio"), ("d", "usb"), ("e", "nvme"), ("f", "sata")]
    assert assign_targets(devices, {}) == {
        "a": "vda",
        "b": "sda",
        "c": "vdb",
        "d": "sdb",
        "e": "nvme0n1",
        "f": "sdc",
    }


def test_kept_and_never_given_twice() -> None:
    kept = {"gone": "vda", "b": "vdc"}
    assert assign_targets([("new", "virtio"), ("b", "virtio"), ("newer", "virtio")], kept) == {
        "new": "vdb",
        "b": "vdc",
        "newer": "vdd",
    }
    assert assign_targets([("gone", "virtio")], kept) == {"gone": "vda"}
    assert assign_targets([], kept) == {}


def test_more_than_26_disks() -> None:
    given = assign_targets([(f"d{number}", "virtio") for number in range(30)], {})
    assert [given["d25"], given["d26"], given["d29"]] == ["vdz", "vdaa", "vdad"]
    assert len(set(given.values())) == 30


plugged = st.lists(st.tuples(st.integers(0, 60).map(str), st.sampled_from(BUSES)), unique_by=lambda each: each[0])


@given(plugged, plugged)
def test_property_names_are_unique_and_stable(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> None:
    before = assign_targets(first, {})
    assert len(set(before.values())) == len(before) == len(first)
    after = assign_targets(second, before)
    assert set(after) == {qdev for qdev, _bus in second}
    for qdev, _bus in second:
        assert after[qdev] == before.get(qdev, after[qdev])
    assert len({**before, **after}) == len(set({**before, **after}.values()))


def test_names_that_last_are_of_devices_with_an_id() -> None:
    lasting = {
        "d2-dev": "sda",
        "/machine/peripheral/d0-dev/virtio-backend": "vda",
        "/machine/peripheral/u/u.0/legacy[0]": "sdb",
    }
    counted = {"/machine/peripheral-anon/device[0]/virtio-backend": "vdb", "/machine/unattached/device[19]": "hda"}
    assert names_that_last({**lasting, **counted}) == lasting
