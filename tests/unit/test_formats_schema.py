"""Libvirt's schema, beside our own checks: it says which element, and never refuses what only we know."""

from __future__ import annotations

from pathlib import Path

import pytest
from definitions import EVERYTHING, VIRT_MANAGER, disk, guest
from lxml import etree

from blockferry.errors import InvalidXml
from blockferry.formats import schema
from blockferry.formats.definition import parse_definition
from blockferry.formats.xmlio import XML_BYTES_MAX, Schema


def flaw(xml: str) -> str:
    parse_definition(xml)  # our own checks find nothing: it is libvirt's schema that says this
    with pytest.raises(InvalidXml) as caught:
        schema.require_valid(xml)
    assert "libvirt's schema does not allow it" in caught.value.reason
    return caught.value.element


@pytest.mark.parametrize("xml", [VIRT_MANAGER, EVERYTHING, guest(), guest(disk("dev='vdb' bus='nvme'"))])
def test_what_people_have_is_valid(xml: str) -> None:
    schema.require_valid(xml)


def test_this_is_libvirts_schema() -> None:
    """Which does not know NVMe yet, of which the test before says that it is accepted nevertheless."""
    plain = Schema(f"{schema.FOLDER}/domain.rng")
    assert plain.allows(etree.fromstring(VIRT_MANAGER))
    assert not plain.allows(etree.fromstring(guest("<nonsense/>")))


@pytest.mark.parametrize(
    ("xml", "element"),
    [
        (guest("<nonsense/>"), "domain/devices/nonsense"),
        (guest(disk() + disk("vdb", "<nonsense><b/></nonsense>")), "domain/devices/disk[2]/nonsense"),
        (guest(disk() + disk("vdb", driver="queues='many'")), "domain/devices/disk[2]/driver/@queues"),
        (guest(disk(attributes="new='1'")), "domain/devices/disk/@new"),
        (guest().replace("type='qemu'", "type='qemu' new='1'"), "domain/@new"),
        (guest(more="<vcpu placement='somewhere'>1</vcpu>"), "domain/vcpu/@placement"),
        (guest(more="<vcpu>0x1</vcpu>"), "domain/vcpu"),
        (guest(os="<bios useserial='maybe'/>"), "domain/os/bios/@useserial"),
        (guest("<interface type='user'><mac address='53:54:00:00:00:01'/></interface>"),
         "domain/devices/interface/mac"),  # its address has to be there, so that nothing smaller can be taken away
        (guest("<sound/>"), "domain/devices/sound"),
        (guest("<tpm model='tpm-crb'><backend type='psychic'/></tpm>"), "domain/devices/tpm"),
        # several: one of them is named, with its own number
        (guest("<a/><sound model='ich9'/><b/>", more="<c/>"), "domain/c"),
        (guest(disk(attributes="new='1'") + disk("vdb") + disk("vdc", driver="queues='x'")), "domain/devices/disk[1]/@new"),
        (guest(disk(attributes="new='1' newer='2'")), "domain/devices/disk"),
        (guest(os="<a/>", more="<b/>"), "domain/os/a"),
    ],
)  # fmt: skip
def test_the_smallest_part_that_is_wrong_is_named(xml: str, element: str) -> None:
    assert flaw(xml) == element


def test_a_huge_document_is_given_up_sooner() -> None:
    """With what was found until then: nobody waits for a validation of every part of it."""
    many = "".join(f"<sound model='ich9' id='{number}'/>" for number in range(XML_BYTES_MAX // 60))
    assert flaw(guest(many)) in ("domain", "domain/devices")


def test_without_libvirt_our_own_checks_are_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCKFERRY_LIBVIRT_SCHEMAS", str(tmp_path))
    schema.require_valid(guest("<nonsense/>"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "domain.rng").write_text("<grammar>")
    monkeypatch.setenv("BLOCKFERRY_LIBVIRT_SCHEMAS", str(tmp_path / "b"))
    schema.require_valid(guest("<nonsense/>"))


def test_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "domain.rng").write_text(
        "<element name='domain' xmlns='http://relaxng.org/ns/structure/1.0'><empty/></element>"
    )
    monkeypatch.setenv("BLOCKFERRY_LIBVIRT_SCHEMAS", str(tmp_path))
    assert flaw(guest()) == "domain"
