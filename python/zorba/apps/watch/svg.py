"""SVG for a page: elements that escape what they are given, and a plot with axes.

Colours are classes that the page's style sheet knows, so that a picture follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from markupsafe import Markup

Point = tuple[float, float | None]


class Svg:
    """A picture that scales with its frame.

    Args:
        width: in user units, near to pixels.
        height: likewise.
        label: what it shows, for those who cannot see it.
        fixed: keeps letters readable on a narrow page, which then scrolls it.
    """

    def __init__(self, width: float, height: float, label: str, fixed: bool = False) -> None:
        self.width, self.height = width, height
        self.root = ElementTree.Element(
            "svg",
            {
                "viewBox": f"0 0 {_figure(width)} {_figure(height)}",
                "role": "img",
                "aria-label": label,
                "style": f"min-width:{_figure(0.75 * width)}px" if fixed else "",
            },
        )

    def add(
        self,
        tag: str,
        parent: ElementTree.Element | None = None,
        text: str | None = None,
        hint: str | None = None,
        **attributes: str | float,
    ) -> ElementTree.Element:
        """Adds an element and returns it.

        Args:
            tag: of the element.
            parent: None for the picture itself.
            text: in it.
            hint: shown when the pointer rests on it.
            attributes: ``class_`` for class, ``_`` for ``-``; floats are rounded.
        """
        values = {
            name.rstrip("_").replace("_", "-"): v if isinstance(v, str) else _figure(v)
            for name, v in attributes.items()
        }
        element = ElementTree.SubElement(self.root if parent is None else parent, tag, values)
        element.text = text
        if hint is not None:
            ElementTree.SubElement(element, "title").text = hint
        return element

    def text(self, x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> None:
        """Adds a line of text whose baseline is at y."""
        self.add("text", text=text, x=x, y=y, class_=class_, text_anchor=anchor)

    def cells(
        self, runs: Iterable[tuple[float, float]], y: float, height: float, class_: str
    ) -> None:
        """Adds a row of boxes, one for each (left, right), as one element."""
        path = "".join(
            f"M{_figure(a)} {_figure(y)}H{_figure(b)}v{_figure(height)}H{_figure(a)}z"
            for a, b in runs
        )
        if path:
            self.add("path", d=path, class_=class_)

    def markup(self) -> Markup:
        """Returns the element, all of whose texts are escaped."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


class Plot(Svg):
    """Curves over rounds.

    Args:
        label: what it shows.
        xs: all rounds that are plotted; at least one.
        ys: all values, without None; at least one.
        y_title: of the y axis.
        zero: whether the y axis starts at 0.
    """

    def __init__(
        self, label: str, xs: Sequence[float], ys: Sequence[float], y_title: str, zero: bool = False
    ) -> None:
        super().__init__(350, 220, label)
        self._left, self._right, self._top, self._bottom = 40.0, 304.0, 24.0, 180.0
        self._x = _widen(min(xs), max(xs), 0.0)
        low, high = _widen(min(ys), max(ys), 0.06)
        self._y = (0.0, high) if zero else (low, high)
        for value in ticks(*self._y, 5):
            y = self.y(value)
            self.add("line", x1=self._left, x2=self._right, y1=y, y2=y, class_="grid")
            self.text(self._left - 6, y + 4, f"{value:g}", "tick", "end")
        for value in ticks(*self._x, 5):
            if value == int(value):
                self.text(self.x(value), self._bottom + 16, f"{value:,.0f}", "tick", "middle")
        self.text((self._left + self._right) / 2, self._bottom + 34, "round", "tick", "middle")
        self.text(4, 13, y_title, "tick")

    def x(self, value: float) -> float:
        """Returns where a round is."""
        low, high = self._x
        return self._left + (self._right - self._left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Returns where a value is."""
        low, high = self._y
        return self._bottom - (self._bottom - self._top) * (value - low) / (high - low)

    def curve(self, points: Iterable[Point], class_: str) -> None:
        """Adds a line; it is broken where a value is None."""
        path, pen = "", "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            path += f"{pen}{_figure(self.x(x))} {_figure(self.y(y))}"
            path += "h0" if pen == "M" else ""  # a point that stands alone is a dot
            pen = "L"
        self.add("path", d=path, class_=f"curve {class_}")

    def band(self, edges: Sequence[tuple[float, float, float]], class_: str) -> None:
        """Adds the area between the values of each (x, low, high)."""
        there = [f"{_figure(self.x(x))} {_figure(self.y(low))}" for x, low, _ in edges]
        back = [f"{_figure(self.x(x))} {_figure(self.y(high))}" for x, _, high in reversed(edges)]
        self.add("path", d=f"M{'L'.join(there + back)}z", class_=class_)

    def dots(self, points: Iterable[tuple[float, float]], class_: str, name: str) -> None:
        """Adds a dot for each point, with its figures as a hint."""
        for x, y in points:
            hint = f"{name} {y:.4g} after round {x:.0f}"
            self.add("circle", cx=self.x(x), cy=self.y(y), r=3.2, class_=class_, hint=hint)

    def label(self, values: Sequence[tuple[float, str, str]]) -> None:
        """Writes at the right edge: (value that it belongs to, text, class); none on another."""
        free = self._top - 13.0
        for value, text, class_ in sorted(values, reverse=True):
            free = max(self.y(value) + 4, free + 13)
            self.text(self._right + 6, free, text, f"value {class_}")

    def mark(self, x: float, hint: str) -> None:
        """Adds a vertical line at a round."""
        if self._x[0] <= x <= self._x[1]:
            at = self.x(x)
            self.add("line", x1=at, x2=at, y1=self._top, y2=self._bottom, class_="mark", hint=hint)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about ``count`` round numbers between two numbers, of which high is the larger."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.7 * rough)
    first = math.ceil(low / step - 1e-9)
    # Through text: 3 * 0.1 would be 0.30000000000000004.
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def stretches(count: int, most: int) -> list[tuple[int, int]]:
    """Splits ``count`` things into at most ``most`` stretches: [begin, end) of each."""
    parts = min(count, most)
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def short(text: str, length: int = 18) -> str:
    """Returns text that fits beside a picture."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    """Returns a range that is not empty, wider by a share on both sides."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.05 or 0.5
        return low - room, high + room
    return low - share * (high - low), high + share * (high - low)


def _figure(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
