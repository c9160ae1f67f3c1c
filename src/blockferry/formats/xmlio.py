"""XML in and out: the one parser, strict reading, and building. lxml is imported nowhere else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from lxml import etree

from blockferry.errors import InvalidXml

# lxml's only name for it.
Element: TypeAlias = etree._Element  # noqa: SLF001

# A request for 64 disks, each with four paths (name, source, mirror, backing) of PATH_MAX 4096, is 1 MiB.
XML_BYTES_MAX = 1 << 20
# So much of what a caller wrote is repeated in an error.
_QUOTED_MAX = 80
# What XML 1.0 can't carry, not even escaped (its production [2], Char).
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse(xml: str, root: str) -> Element:
    """Parse a document from an untrusted caller.

    Args:
        xml: the document.
        root: what its root element must be.

    Returns:
        The root. Below it there are elements and text only: no comments, processing instructions or entities.

    Raises:
        InvalidXml: it is malformed, too large, nested too deeply, has a DOCTYPE or another root.
    """
    try:
        data = xml.encode()
    except UnicodeEncodeError:
        raise InvalidXml(element="document", reason="it is not Unicode text") from None
    if len(data) > XML_BYTES_MAX:
        raise InvalidXml(element="document", reason=f"it is larger than {XML_BYTES_MAX} bytes")
    if "\0" in xml:
        raise InvalidXml(element="document", reason="it has a NUL character in it")
    if "<!DOCTYPE" in xml:
        # Looked for in the text, so that libxml2 sees no DTD at all: attributes expand entities while they are parsed.
        raise InvalidXml(element="document", reason="a DOCTYPE is not accepted")
    try:
        tree: Element = etree.fromstring(data, _parser())
    except etree.XMLSyntaxError as error:
        raise InvalidXml(element="document", reason=shorten(error.msg or "it is malformed")) from None
    if tree.tag != root:
        raise InvalidXml(element=shorten(tree.tag), reason=f"the document must be a <{root}>")
    return tree


def _parser() -> etree.XMLParser:
    return etree.XMLParser(
        encoding="utf-8",  # ours, whatever the document declares
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        # libxml2 then refuses to nest deeper than 256; libvirt nests once a backing layer, and follows 200 of these.
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )


def shorten(text: str) -> str:
    """What a caller wrote, short enough to be repeated in an error."""
    return text if len(text) <= _QUOTED_MAX else text[:_QUOTED_MAX] + "..."


def invalid(element: Element, reason: str) -> InvalidXml:
    """The error for `element`, named by its path in the document."""
    return InvalidXml(element=shorten(path_of(element)), reason=reason)


def path_of(element: Element) -> str:
    """Where an element is in its document."""
    return element.getroottree().getpath(element).lstrip("/")


def paths(root: Element) -> dict[Element, str]:
    """The path of every element, as path_of; that looks at all siblings each time."""
    found = {root: path_of(root)}
    for parent in root.iter():
        counts = Counter(child.tag for child in parent)
        numbers: Counter[str] = Counter()
        for child in parent:
            numbers[child.tag] += 1
            local = etree.QName(child).localname
            name = f"{child.prefix}:{local}" if child.prefix else local
            found[child] = f"{found[parent]}/{name}" + (f"[{numbers[child.tag]}]" if counts[child.tag] > 1 else "")
    return found


class Schema:
    """A RelaxNG schema from a file.

    Raises:
        SchemaUnusable: there is none, or it is none.
    """

    def __init__(self, path: str) -> None:
        try:
            self._relaxng = etree.RelaxNG(file=path)
        except (etree.RelaxNGParseError, etree.XMLSyntaxError, OSError) as error:
            raise SchemaUnusable(str(error)) from error

    def allows(self, root: Element) -> bool:
        """Whether a document is valid."""
        return bool(self._relaxng.validate(root))


class SchemaUnusable(Exception):
    """A schema's file is not there, or is broken."""


def expect(
    element: Element,
    *,
    attributes: AbstractSet[str] = frozenset(),
    once: AbstractSet[str] = frozenset(),
    many: AbstractSet[str] = frozenset(),
) -> None:
    """Refuse all that an element says beyond this: nothing that a caller wrote is ever ignored unseen.

    Args:
        element: the element; its children are not looked into.
        attributes: the attributes that it may have.
        once: the children that it may have one of each.
        many: the children that it may have any number of.

    Raises:
        InvalidXml: it has others, or text beside its children.
    """
    for name in element.attrib:
        if name not in attributes:
            raise invalid(element, f"attribute {shorten(str(name))!r} is not carried out in this version")
    for tag, count in Counter(child.tag for child in element).items():
        if tag not in once | many:
            raise invalid(element, f"<{shorten(tag)}> is not carried out in this version")
        if count > 1 and tag in once:
            raise invalid(element, f"at most one <{tag}> is carried out, not {count}")
    stray = "".join((element.text or "", *(child.tail or "" for child in element))).strip()
    if stray:
        raise invalid(element, f"the text {shorten(stray)!r} does not belong there")


def text(parent: Element, tag: str) -> str | None:
    """The text of the child `tag`, which may hold nothing else; None when there is no child or no text, as libvirt."""
    child = parent.find(tag)
    if child is None:
        return None
    if len(child) or child.attrib:
        raise invalid(child, "only text belongs there")
    return child.text or None


def add(parent: Element, tag: str, content: str | None = None, /, **attributes: str | None) -> Element:
    """Append an element.

    Args:
        parent: what to append it to.
        tag: its name.
        content: its text.
        **attributes: its attributes, in order; those that are None are left out.

    Returns:
        The new element.
    """
    child = etree.SubElement(parent, tag)
    fill(child, content, **attributes)
    return child


def fill(element: Element, content: str | None = None, /, **attributes: str | None) -> None:
    """Give an element text and attributes; characters that XML can't carry become U+FFFD."""
    if content is not None:
        element.text = _NOT_XML.sub("\ufffd", content)
    for name, value in attributes.items():
        if value is not None:
            element.set(name, _NOT_XML.sub("\ufffd", value))


def document(tag: str, **attributes: str | None) -> Element:
    """A root element, with the attributes that are not None."""
    root = etree.Element(tag)
    fill(root, **attributes)
    return root


def pretty(root: Element) -> str:
    """The document as text, indented by two as libvirt's."""
    etree.indent(root, space="  ")
    return etree.tostring(root, encoding="unicode") + "\n"
