"""The parser lets through elements and text, and nothing else."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockferry.errors import InvalidXml
from blockferry.formats import xmlio
from blockferry.formats.names import PATH_BYTES_MAX, path_flaw, valid_name

LAUGHS = (
    "<!DOCTYPE a [<!ENTITY l0 'ha'>"
    + "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 30))
    + "]><a b='&l29;'>&l29;</a>"
)

HOSTILE = {
    "billion laughs": LAUGHS,
    "external entity": "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>",
    "parameter entity": "<!DOCTYPE a [<!ENTITY % x SYSTEM 'http://127.0.0.1/x'> %x;]><a/>",
    "external DTD": "<!DOCTYPE a SYSTEM 'http://127.0.0.1/a.dtd'><a/>",
    "undefined entity": "<a>&x;</a>",
    "undefined entity in an attribute": "<a b='&x;'/>",
    "too large": f"<a>{' ' * (2 << 20)}</a>",
    "too large in bytes": "<a>" + "€" * 400_000 + "</a>",
    "nested too deeply": "<a>" * 10_000 + "</a>" * 10_000,
    "just nested too deeply": "<a>" * 257 + "</a>" * 257,
    "opened only": "<a>" * 100_000,
    "NUL": "<a>\0</a>",
    "NUL as a reference": "<a>&#0;</a>",
    "control character": "<a>\x01</a>",
    "surrogate": "<a>\udc80</a>",
    "empty": "",
    "blank": " \n",
    "text": "snapshot",
    "two roots": "<a/><a/>",
    "unclosed": "<a",
    "repeated attribute": "<a b='1' b='2'/>",
    "many bad entities": "<a>" + "&x;" * 200_000 + "</a>",
    "long bad entity": f"<a>&{'x' * 500_000};</a>",
    "other root": "<b/>",
    "root in a namespace": "<a xmlns='urn:x'/>",
    "unbound prefix": "<x:a/>",
}


@pytest.mark.parametrize("xml", HOSTILE.values(), ids=HOSTILE)
def test_hostile_documents_are_refused_within_a_moment(xml: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidXml) as caught:
        xmlio.parse(xml, "a")
    assert time.monotonic() - begun < 1
    assert len(str(caught.value)) < 500


@given(st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape")))
def test_any_text_parses_or_is_refused(data: str) -> None:
    for xml in (data, f"<a>{data}</a>", f"<a {data}/>", f"<a b='{data}'/>", f"<?xml {data}?><a/>"):
        with contextlib.suppress(InvalidXml):
            xmlio.parse(xml, "a")


def test_the_declared_encoding_does_not_matter() -> None:
    for encoding in ("UTF-8", "UTF-16", "UTF-7", "ISO-8859-1", "nonsense"):
        assert xmlio.parse(f"<?xml version='1.0' encoding='{encoding}'?><a>+ADw-€</a>", "a").text == "+ADw-€"


def test_comments_and_processing_instructions_are_gone() -> None:
    root = xmlio.parse("<!-- x --><?x y?><a>b<!-- x -->c<?x y?><![CDATA[<d>]]></a>", "a")
    assert root.text == "bc<d>"
    assert len(root) == 0


@given(st.text(), st.text())
def test_whatever_is_built_can_be_parsed(content: str, value: str) -> None:
    root = xmlio.document("a")
    xmlio.add(root, "b", content, c=value, d=None)
    parsed = xmlio.parse(xmlio.pretty(root), "a")
    assert list(parsed[0].attrib) == ["c"]
    if content.isprintable() and value.isprintable():
        assert (parsed[0].text or "", parsed[0].get("c")) == (content, value)


def test_text_is_only_text() -> None:
    assert xmlio.text(xmlio.parse("<a/>", "a"), "b") is None
    assert xmlio.text(xmlio.parse("<a><b/></a>", "a"), "b") is None
    assert xmlio.text(xmlio.parse("<a><b> c\n</b></a>", "a"), "b") == " c\n"
    for xml in ("<a><b c='d'>e</b></a>", "<a><b>c<d/></b></a>"):
        with pytest.raises(InvalidXml):
            xmlio.text(xmlio.parse(xml, "a"), "b")


def test_errors_name_the_element() -> None:
    root = xmlio.parse("<a><b/><b c='d'/></a>", "a")
    with pytest.raises(InvalidXml) as caught:
        xmlio.expect(root[1])
    assert caught.value.element == "a/b[2]"
    assert "'c'" in caught.value.reason


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("a", True),
        ("0", True),
        ("_a+b-c.d", True),
        ("+", True),
        ("a" * 60, True),
        ("a" * 61, False),
        ("", False),
        (".a", False),
        ("-a", False),
        ("a/b", False),
        ("a b", False),
        ("a\n", False),
        ("ä", False),
        ("\u0661", False),
        ("a\0", False),
    ],
)
def test_names(name: str, valid: bool) -> None:
    assert valid_name(name) is valid


@pytest.mark.parametrize(
    ("path", "flaw"),
    [
        ("/a", None),
        ("/a b/ä..b/...", None),
        ("/" + "a" * (PATH_BYTES_MAX - 1), None),
        ("/" + "a" * PATH_BYTES_MAX, "longer"),
        ("/" + "€" * 1400, "longer"),
        ("", "absolute"),
        ("a", "absolute"),
        ("../a", "absolute"),
        ("json:{}", "absolute"),
        ("nbd://host/", "absolute"),
        ("/a/../b", "'..'"),
        ("/..", "'..'"),
        ("/a/", "directory"),
        ("/", "directory"),
        ("/a\0b", "control"),
        ("/a\nb", "control"),
        ("/\udc80", "UTF-8"),
    ],
)
def test_paths(path: str, flaw: str | None) -> None:
    found = path_flaw(path)
    assert (found is None) if flaw is None else (found is not None and flaw in found)
