"""The block graph as a picture: SVG without scripts or anything from elsewhere, devices on the left, bases on the right."""

from __future__ import annotations

from blockferry.interfaces.cli.placing import LINE, MARGIN, Arrow, Box, Panel, place
from blockferry.interfaces.cli.sketch import counts, sketch
from blockferry.interfaces.cli.text import BAD, BUSY, GOOD, visible
from blockferry.interfaces.cli.wire import Json

SVG = "http://www.w3.org/2000/svg"
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SANS = "system-ui, 'DejaVu Sans', 'Segoe UI', Helvetica, Arial, sans-serif"
# style -> (background, border, text). A box's style may have a second word, a job's state, which gives the border.
BOXES = {
    "device": ("#1f3a5f", "#1f3a5f", "#ffffff"),
    "user": ("#5b6472", "#5b6472", "#ffffff"),
    "filter": ("#f1e9fb", "#9a7bc8", "#3b2a57"),
    "format": ("#ffffff", "#4a78b0", "#16263b"),
    "image": ("#ffffff", "#4a78b0", "#16263b"),
    "protocol": ("#ffffff", "#b6bfca", "#3d4753"),
    "ghost": ("#ffffff", "#b6bfca", "#3d4753"),
}
GREEN, RED, AMBER, GREY = "#1a8245", "#c22f2f", "#b26a00", "#5b6472"
RADIUS = 8


def graph(view: Json) -> str:
    """Draw a view of kind `graph`."""
    drawn = sketch(view)
    placed = place(drawn)
    name, about = visible(view["domain"]), f"{view['state']}  ·  {counts(view)}"
    words = [_jobs_words(view)] if view["jobs"] else []
    width, height = max(placed.width, 420), placed.height
    sizes = f'width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="{SVG}" {sizes} viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{_escape(SANS)}">',
        f"<title>{_escape(f'Block graph of {name}')}</title>",
        f"<desc>{_escape(about)}</desc>",
        _markers(),
        f'<rect {sizes} fill="#ffffff"/>',
        _text(MARGIN, 36, name, "#16263b", 20, bold=True),
        _text(MARGIN, 58, "  ·  ".join([about, *words]), GREY, 13),
        *(_panel(each, width) for each in placed.panels),
        *(_arrow(each) for each in placed.arrows),
        *(_box(each) for each in placed.boxes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _jobs_words(view: Json) -> str:
    states = [job["state"] for job in view["jobs"]]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def _panel(panel: Panel, width: float) -> str:
    style = 'fill="#f5f7fa"' if not panel.title else 'fill="#fcfcfd" stroke="#c9d0d9" stroke-dasharray="5 4"'
    inner = width - 2 * MARGIN
    shape = f'<rect x="{MARGIN}" y="{panel.y:.1f}" width="{inner:.1f}" height="{panel.height:.1f}" rx="10" {style}/>'
    return shape + (_text(MARGIN + 20, panel.y + 24, panel.title, GREY, 13, bold=True) if panel.title else "")


def _box(box: Box) -> str:
    words = box.text.style.split()
    side = words[0] == "side"
    background, border, ink = BOXES[words[-1 if side else 0]]
    state = words[1] if len(words) > 1 and not side else ""
    border = _colour(state) if state else border
    dashes = ' stroke-dasharray="5 4"' if words[0] == "ghost" else ""
    radius = box.text.height / 2 if words[0] == "filter" else 6
    thick = 2 if state else 1.3
    lines = [
        _text(
            box.x + 12,
            box.y + 21 + LINE * number,
            line,
            ink if number == 0 else _lighter(ink),
            12 if number == 0 else 10.5,
            bold=number == 0 and not side,
            mono=True,
        )
        for number, line in enumerate(box.text.lines)
    ]
    shape = (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.text.width:.1f}" height="{box.text.height:.1f}" '
        f'rx="{radius:.1f}" fill="{background}" stroke="{border}" stroke-width="{thick}"{dashes}/>'
    )
    return f"<g><title>{_escape(box.text.tip)}</title>{shape}{''.join(lines)}{_badge(box)}</g>"


def _lighter(ink: str) -> str:
    return "#d6e0ee" if ink == "#ffffff" else GREY


def _badge(box: Box) -> str:
    """A few words on the box's upper edge."""
    if box.text.badge is None:
        return ""
    words, state = box.text.badge
    wide = 6.3 * len(words) + 14
    x = box.right - wide - 8
    shape = f'<rect x="{x:.1f}" y="{box.y - 9:.1f}" width="{wide:.1f}" height="17" rx="8.5" fill="{_colour(state)}"/>'
    return shape + _text(x + 7, box.y + 3, words, "#ffffff", 10.5, mono=True)


def _arrow(arrow: Arrow) -> str:
    job = arrow.style.split()[1:]
    colour = _colour(job[0]) if job else "#6b7788"
    head = _marker(colour)
    wide = 2.4 if job else 1.5
    tip = f"<title>{_escape(arrow.tip)}</title>" if arrow.tip else ""
    look = f'stroke="{colour}" stroke-width="{wide}"' + (' stroke-dasharray="5 4"' if arrow.style == "later" else "")
    line = f'<path d="{_path(arrow.points)}" fill="none" {look} marker-end="url(#{head})"/>'
    x, y = arrow.at
    label = _text(x, y, visible(arrow.label), colour, 12 if job else 11, bold=bool(job))
    below = _text(x, y + 21, visible(arrow.below), GREY, 10.5) if arrow.below else ""
    return f"<g>{tip}{line}{label}{below}</g>"


def _path(points: tuple[tuple[float, float], ...]) -> str:
    """Lines along the points, with round corners."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        parts.append(f"L{_towards(corner, before)}Q{corner[0]:.1f} {corner[1]:.1f} {_towards(corner, after)}")
    parts.append(f"L{points[-1][0]:.1f} {points[-1][1]:.1f}")
    return "".join(parts)


def _towards(corner: tuple[float, float], other: tuple[float, float]) -> str:
    """A point near a corner, in the direction of another."""
    (x, y), (to_x, to_y) = corner, other
    far = max(abs(to_x - x), abs(to_y - y))
    share = min(RADIUS, far / 2) / far if far else 0
    return f"{x + (to_x - x) * share:.1f} {y + (to_y - y) * share:.1f}"


def _colour(state: str) -> str:
    if state == "shared":
        return "#4a78b0"
    return (
        GREEN
        if state in GOOD - {"running"}
        else RED
        if state in BAD
        else AMBER
        if state in BUSY | {"running"}
        else GREY
    )


def _marker(colour: str) -> str:
    return f"to-{colour[1:]}"


def _markers() -> str:
    """Arrow heads, one a colour: what a marker's colour follows differs between viewers."""
    heads = [
        f'<marker id="{_marker(colour)}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for colour in ("#6b7788", GREEN, RED, AMBER, GREY)
    ]
    return f"<defs>{''.join(heads)}</defs>"


def _text(x: float, y: float, words: str, colour: str, points: float, *, bold: bool = False, mono: bool = False) -> str:
    more = (' font-weight="600"' if bold else "") + (f' font-family="{_escape(MONO)}"' if mono else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{points}" fill="{colour}"{more} xml:space="preserve">{_escape(words)}</text>'


def _escape(text: str) -> str:
    """Text for XML: nothing in it is markup."""
    for plain, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, written)
    return text
