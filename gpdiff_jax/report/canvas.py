"""In: sizes and drawn figures. Out: axes in the page's style, and inline SVG text that follows its light and dark.

The only file of the library that imports matplotlib beside `figures`, and both are imported when a page is drawn.
"""

import io
import math
import re
import warnings
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG

# Stand-ins that no palette holds: each becomes a CSS variable of the page in the finished SVG.
INK, MUTED, GRID, SHADE = "#010a01", "#010a02", "#010a03", "#010a04"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SHADE: "shade"}

ROLES = ("few-shot", "zero-shot", "baseline", "history", "other")
"""What a line stands for; its colour is the CSS variable --few-shot, --zero-shot and so on."""

ROLE_COLOURS = {role: f"#010b{number:02x}" for number, role in enumerate(ROLES, start=1)}
_VARIABLES |= {colour: role for role, colour in ROLE_COLOURS.items()}

# Okabe and Ito's palette, which readers with any colour vision tell apart; markers differ as well.
CATEGORIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7f00", "#8c8c8c")
MARKERS = "osv^DPX*"
BETTER_WORSE = matplotlib.colors.LinearSegmentedColormap.from_list(
    "better_worse", ["#01665e", "#5ab4ac", "#efefef", "#d8b365", "#8c510a"]
)
RASTER_POINTS = 4000
_CURVE_POINTS = 400

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
    "xtick.major.size": 3.0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    # Names come from files: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "axes.formatter.limits": (-4, 7),
    "axes.formatter.useoffset": False,
}


def new_figure(width: int, height: int, *, left: int, right: int, top: int, bottom: int):
    """Returns a figure with one axes inside margins; every length is one unit of the SVG's view box."""
    figure = matplotlib.figure.Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_alpha(0.0)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(box)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbours of a long curve, so that a page with many stays light."""
    if len(x) <= _CURVE_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _CURVE_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def shorten(text: str, length: int) -> str:
    """Returns the text, cut to at most so many letters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def as_svg(figure: matplotlib.figure.Figure, name: str, alt: str) -> str:
    """Returns the figure as an element of an HTML page: no namespaces, ids of its own, the page's font and colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # The browser's fonts draw the words: what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', text)
    assert view_box is not None
    body = text[text.index(">", view_box.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    width = math.ceil(float(view_box.group(1).split()[2]))
    label = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg viewBox="{view_box.group(1)}" data-width="{width}" role="img" aria-label="{label}">{body}'
