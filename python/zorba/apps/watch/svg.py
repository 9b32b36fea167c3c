"""Pictures as SVG inside of a page: inert, and without names that meet those of other pictures."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from zorba.apps.watch.figures import Picture, plain_text
from zorba.apps.watch.state import RunState

_XLINK = "{http://www.w3.org/1999/xlink}href"


def draw_svg(
    picture: Picture, state: RunState, name: str, size: tuple[float, float]
) -> tuple[Markup, str]:
    """Returns a picture as an ``svg`` element, and its caption; both are empty without content.

    Args:
        picture: draws on axes, and returns a caption.
        state: to draw.
        name: of the picture, for readers who cannot see it; no two on a page are alike.
        size: width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Letters stay letters. The salt makes ids that no other picture has, the same in every run.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
    with plain_text(), rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        caption = picture(figure.add_subplot(), state)
        if not caption:
            return Markup(), ""
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, dpi=150)
    return _inline(file.getvalue(), name), caption


def _inline(svg: bytes, name: str) -> Markup:
    """Returns the element of an SVG file without prologue, metadata, style sheet and stray ids."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]  # in HTML, svg needs no namespace
        if (target := element.attrib.pop(_XLINK, None)) is not None:
            element.set("href", target)
        if element.tag == "g":
            # Groups are figure_1, axes_1 and so on in all pictures, and nothing refers to them.
            element.attrib.pop("id", None)
    for size in ("width", "height"):
        del root.attrib[size]
    root.set("role", "img")
    root.set("aria-label", name)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
