"""Reading a document of which not everything is understood: what was not looked at is listed, never silently dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

from blockferry.formats import xmlio
from blockferry.formats.names import path_flaw
from blockferry.formats.xmlio import Element

_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
# Not what Python takes for one, such as 1_000 and other scripts' digits.
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}")
_NUMBER_MAX = (1 << 63) - 1


class Reading:
    """A document being read, with what was not understood of it.

    Args:
        root: its root.
    """

    def __init__(self, root: Element) -> None:
        self._root = root
        self._known: set[Element | tuple[Element, str]] = {root}

    def child(self, parent: Element, tag: str) -> Element | None:
        """The one child of that name, which is understood from here on.

        Raises:
            InvalidXml: there are several.
        """
        found = parent.findall(tag)
        if len(found) > 1:
            raise xmlio.invalid(found[1], f"only one <{tag}> can be here")
        self._known.update(found)
        return found[0] if found else None

    def children(self, parent: Element, tag: str) -> Iterator[Element]:
        """The children of that name."""
        for found in parent.findall(tag):
            self._known.add(found)
            yield found

    def get(self, element: Element | None, name: str, *, among: tuple[str, ...] | None = None) -> str | None:
        """An attribute; None when it, or the element, is not there.

        Raises:
            InvalidXml: it is none of `among`.
        """
        if element is None:
            return None
        self._known.add((element, name))
        value = element.get(name)
        if value is not None and among is not None and value not in among:
            refuse(element, f"{name}={xmlio.shorten(value)!r} can't be carried out: write {', '.join(among)}")
        return value

    def need(self, element: Element, name: str, *, among: tuple[str, ...] | None = None) -> str:
        """An attribute that has to be there.

        Raises:
            InvalidXml: it is not, or is none of `among`.
        """
        value = self.get(element, name, among=among)
        if not value:
            refuse(element, f"it has no {name}")
        return value

    def number(self, element: Element | None, name: str, least: int = 0) -> int | None:
        """An attribute that is a number, decimal or hexadecimal with 0x.

        Raises:
            InvalidXml: it is none, or less than `least`.
        """
        value = self.get(element, name)
        if element is None or value is None:
            return None
        return _whole(element, value, f"{name}=", least)

    def flag(self, element: Element | None, name: str) -> bool | None:
        """An attribute that is yes, no, on or off."""
        value = self.get(element, name, among=tuple(_YES_NO))
        return None if value is None else _YES_NO[value]

    def path(self, element: Element | None, name: str) -> str | None:
        """An attribute that is an absolute path."""
        value = self.get(element, name)
        if element is not None and value is not None:
            require_path(element, value)
        return value

    def mark(self, element: Element) -> None:
        """Understand this one of several children."""
        self._known.add(element)

    def unmark(self, element: Element) -> None:
        """List this one after all: it was looked at, and is not carried out."""
        self._known.discard(element)

    def text(self, parent: Element, tag: str) -> str | None:
        """The text of the child `tag`; None when there is none."""
        child = self.child(parent, tag)
        return None if child is None else (child.text or "").strip() or None

    def text_path(self, parent: Element, tag: str) -> str | None:
        """The text of the child `tag` as an absolute path."""
        text = self.text(parent, tag)
        if text is not None:
            require_path(at(parent, tag), text)
        return text

    def whole(self, parent: Element, tag: str, least: int = 0) -> int | None:
        """The text of the child `tag` as a number."""
        text = self.text(parent, tag)
        return None if text is None else _whole(at(parent, tag), text, "", least)

    def harmless(self, parent: Element, *tags: str) -> None:
        """Children that say nothing of what the guest is made of, with all that is in them."""
        for tag in tags:
            for found in parent.findall(tag):
                self.keep(found)

    def keep(self, element: Element) -> None:
        """Understand this element with all that is in it."""
        for each in element.iter():
            self._known.add(each)
            self._known.update((each, str(name)) for name in each.attrib)

    def ignored(self) -> tuple[str, ...]:
        """The elements and attributes that nobody asked for, each as its path; not what is inside of one listed."""
        paths = {element: path.removeprefix("domain").lstrip("/") for element, path in xmlio.paths(self._root).items()}
        return tuple(self._ignored(self._root, paths))

    def _ignored(self, element: Element, paths: Mapping[Element, str]) -> Iterator[str]:
        for name in element.attrib:
            if (element, name) not in self._known:
                yield f"{paths[element]}/@{name!s}".lstrip("/")
        for child in element:
            if child in self._known:
                yield from self._ignored(child, paths)
            else:
                yield paths[child]


def at(parent: Element, tag: str) -> Element:
    """The child of that name, or the parent: where an error is."""
    child = parent.find(tag)
    return parent if child is None else child


def refuse(element: Element, reason: str) -> NoReturn:
    """Refuse the document for this element."""
    raise xmlio.invalid(element, reason)


def require_path(element: Element, path: str) -> None:
    """Refuse what can't be a path of ours."""
    flaw = path_flaw(path)
    if flaw:
        refuse(element, f"{xmlio.shorten(path)!r} {flaw}")


def _whole(element: Element, text: str, what: str, least: int) -> int:
    if not _NUMBER.fullmatch(text):
        refuse(element, f"{what}{xmlio.shorten(text)!r} is no whole number")
    number = int(text, 16) if text[:2] in ("0x", "0X") else int(text)
    if number < least:
        refuse(element, f"{what}{number} is less than {least}")
    if number > _NUMBER_MAX:
        refuse(element, f"{what}{number} is too large")
    return number
