"""Libvirt's own schema of a `<domain>`, where libvirt is installed: beside our checks, never instead of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from blockferry.errors import InvalidXml
from blockferry.formats import xmlio
from blockferry.formats.xmlio import Element, Schema

# Where libvirt0 puts its schemas, unless BLOCKFERRY_LIBVIRT_SCHEMAS names another folder.
FOLDER = "/usr/share/libvirt/schemas"
# libxml2 says that a document is invalid, not where: that is found by trying, for a second at most. Of n elements a
# validation takes n + n²/400 microseconds.
TRYING_MICROSECONDS = 1_000_000
TRIES_MAX = 2000
# Without these the element around them would be invalid for another reason.
_NEEDED = frozenset({"name", "memory", "os", "type", "target", "source"})


def require_valid(xml: str) -> None:
    """Refuse a document that libvirt's schema does not allow; nothing where there is no schema.

    Args:
        xml: a document that parse_definition has accepted.

    Raises:
        InvalidXml: with the smallest element or attribute without which it would be valid.
    """
    schema = _load(str(Path(os.environ.get("BLOCKFERRY_LIBVIRT_SCHEMAS") or FOLDER) / "domain.rng"))
    if schema is None:
        return
    root = _without_ours(xmlio.parse(xml, "domain"))
    if not schema.allows(root):
        raise _Search(schema, root, tries=_tries(sum(1 for _ in root.iter()))).flaw()


def _tries(elements: int) -> int:
    return min(TRIES_MAX, int(TRYING_MICROSECONDS / (elements + elements**2 / 400)))


@functools.cache
def _load(path: str) -> Schema | None:
    try:
        return Schema(path)
    except xmlio.SchemaUnusable:
        return None


def _without_ours(root: Element) -> Element:
    """What we carry out and libvirt's older schemas lack, written as something that they have."""
    for target in root.iterfind("devices/disk/target[@bus='nvme']"):
        target.set("bus", "virtio")
        target.set("dev", "vda")
    return root


class _Search:
    """Finding what is wrong with an invalid document, by taking parts of it away.

    Args:
        schema: what it has to be valid to.
        root: the document, which is changed.
        tries: how often it is validated at most.
    """

    def __init__(self, schema: Schema, root: Element, tries: int) -> None:
        self._schema = schema
        self._root = root
        self._tries = tries
        # Now: with parts taken away an element would have another number.
        self._paths = xmlio.paths(root)

    def flaw(self) -> InvalidXml:
        """The error."""
        element, attribute = self._locate(self._root)
        path = self._paths[element]
        if attribute is not None:
            value = xmlio.shorten(str(element.get(attribute)))
            return InvalidXml(element=f"{path}/@{attribute}", reason=f"libvirt's schema does not allow it ({value!r})")
        reason = "libvirt's schema does not allow it"
        return InvalidXml(element=path, reason=f"{reason} as it is: something in it, or missing in it")

    def _allows(self) -> bool:
        self._tries -= 1
        return self._tries >= 0 and self._schema.allows(self._root)

    def _locate(self, element: Element) -> tuple[Element, str | None]:
        """What is wrong in an element, without which the document would be valid."""
        found = self._one_of(element)
        if found is not None:
            return found
        # There are several flaws: the last parts are taken away until there is one.
        for child in reversed([child for child in element if child.tag not in _NEEDED]):
            place = element.index(child)
            element.remove(child)
            if self._allows():
                element.insert(place, child)
                return self._locate(child)
        return self._one_of(element) or (element, None)

    def _one_of(self, element: Element) -> tuple[Element, str | None] | None:
        """The one attribute or child that is wrong; None when there is no such one."""
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            valid = self._allows()
            element.set(name, value)
            if valid:
                return element, str(name)
        for child in list(element):
            if self._allows_without(element, child):
                return self._locate(child)
        return None

    def _allows_without(self, element: Element, child: Element) -> bool:
        place = element.index(child)
        element.remove(child)
        valid = self._allows()
        element.insert(place, child)
        return valid
