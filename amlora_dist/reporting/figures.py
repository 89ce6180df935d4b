"""Figures: pure functions from plain data to a chart, which is a drawing with the table of numbers behind it.

Every chart can be had as SVG (inline in a page: small, sharp, its text is text) and as PNG (for MLflow). Colours are
those of Okabe and Ito (2008) and the map cividis, which readers with any colour vision tell apart; series differ in
marker and dash as well, and cells of a heat map carry their number.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Value = float | int | str | bool | None
Number = float | None

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's, the darkest first; their yellow, too pale for a line on white, is darkened."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK, GREY, PALE = "#1f2430", "#6b7280", "#e5e7eb"
WIDTH = 4.7
"""Inches of a plain chart: legible without scrolling on a phone, two next to each other on a desk."""
MANY = 8
"""Lines or places on the x axis from which on a line chart is as wide as the page."""
WIDE = 9.6
"""Inches of such a chart; a screen that is narrower scrolls it, paper shrinks it."""
LONGEST_NAME = 32
"""Letters of a name next to a chart of that width."""

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers with the names of their columns; None is what is undefined or was not measured."""

    columns: list[str]
    rows: list[list[Value]]

    def csv(self) -> str:
        """RFC 4180 text with a heading; an empty field is None."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(self.columns)
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return out.getvalue()


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart; None breaks it."""

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    """Lower and upper ends of an interval around each point."""
    high: Sequence[Number] | None = None
    muted: bool = False
    """A reference, drawn thin and grey: the first dotted, the second dashed."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; ``low`` and ``high`` may be None."""

    name: str
    value: Number
    low: Number = None
    high: Number = None
    emphasised: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing, what it shows, and the numbers behind it."""

    name: str
    """File name without suffix: lower case, digits and hyphens; unique in a page."""
    title: str
    caption: str
    """How to read it, in a sentence or two."""
    figure: Figure
    data: Table

    def svg(self) -> str:
        """An ``<svg>`` element to put into HTML: no prolog, no metadata, no ids but those it refers to itself."""
        out = io.StringIO()
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = out.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
        return re.sub(r"\s+\n", "\n", text)

    def png(self) -> bytes:
        """The same as a PNG of twice the size."""
        out = io.BytesIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(out, format="png", dpi=160)
        return out.getvalue()


def heat_map(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[Number]],
    *,
    low: float | None = None,
    digits: int = 2,
    row_name: str = "",
    column_name: str = "",
    diverging: bool = False,
    marked: Sequence[tuple[int, int]] = (),
) -> Chart:
    """A matrix as coloured cells with their numbers; what is None stays blank with a dot.

    Args:
        values: one line for each of ``rows``, one number for each of ``columns``.
        low: end of the colour map; None takes it from the values, as the other one, so that close numbers look different.
        diverging: colours run from orange through white at 0 to blue; both ends become symmetric.
        marked: (row, column) of cells with a frame, such as the diagonal.
    """
    known = [v for line in values for v in line if v is not None]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0)
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    names = list(columns)
    longest = max((len(one) for one in names), default=0)
    labels = 0.075 * max((len(row) for row in rows), default=0) + 0.25
    side = max((WIDTH - labels - 0.2) / max(len(names), 1), 0.42)  # few columns are wide: the page's width is used
    slanted = 0.085 * longest > side
    reach = 0.06 * longest if slanted else 0.0  # of the last name, to the right of its column's middle
    if slanted:
        side = max((WIDTH - labels - 0.1 - reach) / (len(names) - 0.5), 0.42)
    above = 0.3 + (0.042 * longest if slanted else 0.0)
    width = labels + side * len(names) + max(reach - side / 2, 0.0) + 0.1
    height = above + 0.34 * len(rows) + 0.25
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(width, height)
        axes.set_position((labels / width, 0.12 / height, side * len(names) / width, 0.34 * len(rows) / height))
        colours = mpl.colormaps["PuOr" if diverging else "cividis"]
        scale = mpl.colors.Normalize(low, high if high > low else low + 1.0)
        for r, line in enumerate(values):
            for c, value in enumerate(line):
                if value is None:
                    axes.text(c + 0.5, r + 0.5, "·", ha="center", va="center", color=GREY)
                    continue
                shade = colours(scale(value))
                axes.add_patch(mpl.patches.Rectangle((c, r), 1, 1, facecolor=shade, edgecolor="white", linewidth=1.2))
                dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.55
                axes.text(
                    c + 0.5, r + 0.52, short_number(value, digits), ha="center", va="center",
                    color="white" if dark else INK, fontsize=8 if len(names) <= 10 else 7,
                )  # fmt: skip
        for r, c in marked:
            axes.add_patch(mpl.patches.Rectangle((c + 0.05, r + 0.06), 0.9, 0.88, fill=False, edgecolor=INK, linewidth=1.0))
        axes.set(xlim=(0, len(names)), ylim=(len(rows), 0))
        axes.xaxis.tick_top()
        axes.set_xticks([c + 0.5 for c in range(len(names))], names, rotation=35 if slanted else 0)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(ha="left", rotation_mode="anchor")
        axes.set_yticks([r + 0.5 for r in range(len(rows))], list(rows))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    heading = row_name if not column_name else f"{row_name} \\ {column_name}"
    data = Table([heading, *names], [[row, *line] for row, line in zip(rows, values, strict=True)])
    return Chart(name, title, caption, figure, data)


def line_chart(
    name: str,
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    y_range: tuple[float | None, float | None] = (None, None),
    x_ticks: Sequence[str] | None = None,
    markers: bool = True,
) -> Chart:
    """Lines over one axis, with bands for intervals.

    Args:
        x_ticks: names of the places 1, 2, ... on the x axis, instead of numbers.
    """
    with mpl.rc_context(_STYLE):
        width = WIDE if len([one for one in series if not one.muted]) > MANY or len(x_ticks or []) > MANY else WIDTH
        per_row = max(1, int((width - 0.1) / (0.07 * max((len(one.name) for one in series), default=0) + 0.6)))
        below = 0.19 * math.ceil(len(series) / per_row) + 0.08
        slanted = x_ticks is not None and sum(len(tick) for tick in x_ticks) > 34 * width / WIDTH
        foot = 0.5 + below + (0.045 * max(map(len, x_ticks)) if slanted and x_ticks else 0.0)
        figure, axes = _figure(width, 2.0 + below + foot)
        total = float(figure.get_figheight())
        axes.set_position((0.61 / width, foot / total, 1 - 0.75 / width, (total - foot - 0.12) / total))
        number = muted = 0
        for one in series:
            if one.muted:
                colour, marker, dash, wide = GREY, "", (":", "--")[muted % 2], 1.2
                muted += 1
            else:
                colour, marker, dash, wide = _look(number)
                number += 1
            y = [math.nan if v is None else v for v in one.y]
            axes.plot(one.x, y, color=colour, linestyle=dash, linewidth=wide, label=one.name,
                      marker=marker if markers else "", markersize=4.5)  # fmt: skip
            if one.low is not None and one.high is not None:
                ends = [[math.nan if v is None else v for v in end] for end in (one.low, one.high)]
                axes.fill_between(one.x, ends[0], ends[1], color=colour, alpha=0.13, linewidth=0)
        axes.set(xlabel=x_name, ylabel=y_name, ylim=y_range)
        axes.grid(axis="y", color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
        if x_ticks is not None:
            axes.set_xticks(range(1, len(x_ticks) + 1), list(x_ticks), rotation=30 if slanted else 0)
            if slanted:
                for label in axes.get_xticklabels():
                    label.set(ha="right", rotation_mode="anchor")
        if series:
            figure.legend(loc="lower center", ncols=min(per_row, len(series)), handlelength=2.4, columnspacing=1.2)
    rows: list[list[Value]] = []
    for one in series:
        for index, (x, y_value) in enumerate(zip(one.x, one.y, strict=True)):
            ends_here = [end[index] if end is not None else None for end in (one.low, one.high)]
            rows.append([one.name, x, y_value, *ends_here])
    return Chart(name, title, caption, figure, Table(["series", x_name, y_name, "low", "high"], rows))


def bar_chart(
    name: str,
    title: str,
    caption: str,
    bars: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Number]]],
    *,
    x_name: str,
    digits: int = 1,
) -> Chart:
    """Horizontal bars, each of parts one after another; the total is at its end."""
    with mpl.rc_context(_STYLE):
        height = 0.27 * len(bars) + 0.95
        figure, axes = _figure(WIDTH, height)
        labels = 0.075 * max((len(bar) for bar in bars), default=0) + 0.2
        axes.set_position((labels / WIDTH, 0.68 / height, 1 - (labels + 0.55) / WIDTH, 0.27 * len(bars) / height))
        ends = [0.0] * len(bars)
        for number, (part, lengths) in enumerate(parts):
            known = [length or 0.0 for length in lengths]
            axes.barh(range(len(bars)), known, left=ends, height=0.66, label=part, color=COLOURS[number % len(COLOURS)],
                      hatch=("", "///", "...", "xx")[number % 4], edgecolor="white", linewidth=0.4)  # fmt: skip
            ends = [end + length for end, length in zip(ends, known, strict=True)]
        for place, end in enumerate(ends):
            if any(lengths[place] is not None for _, lengths in parts):
                text = short_number(end, digits)
                axes.annotate(text, (end, place), (3, 0), textcoords="offset points", va="center", size=8)
        axes.set(ylim=(len(bars) - 0.5, -0.5), xlabel=x_name)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", length=0)
        if len(parts) > 1:
            figure.legend(loc="lower center", ncols=min(4, len(parts)))
    rows: list[list[Value]] = [[bar, *(lengths[n] for _, lengths in parts)] for n, bar in enumerate(bars)]
    return Chart(name, title, caption, figure, Table(["", *(part for part, _ in parts)], rows))


def dot_plot(
    name: str,
    title: str,
    caption: str,
    dots: Sequence[Dot],
    *,
    x_name: str,
    zero: bool = False,
) -> Chart:
    """One value a line with its interval; ``zero`` draws a line at 0, for differences."""
    with mpl.rc_context(_STYLE):
        height = 0.27 * len(dots) + 0.6
        figure, axes = _figure(WIDTH, height)
        names = [_cut(dot.name) for dot in dots]
        labels = 0.075 * max(map(len, names), default=0) + 0.2
        axes.set_position((labels / WIDTH, 0.48 / height, 1 - (labels + 0.65) / WIDTH, 0.27 * len(dots) / height))
        if zero:
            axes.axvline(0.0, color=GREY, linewidth=0.8)
        for place, dot in enumerate(dots):
            if dot.value is None:
                continue
            colour = COLOURS[1] if dot.emphasised else COLOURS[0]
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot([dot.value], [place], marker="D" if dot.emphasised else "o", color=colour, markersize=5)
            axes.annotate(f"{dot.value:.3f}", (1, place), (4, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", va="center", size=8)  # fmt: skip
        axes.set(ylim=(len(dots) - 0.5, -0.5), xlabel=x_name)
        axes.set_yticks(range(len(dots)), names)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
    rows: list[list[Value]] = [[dot.name, dot.value, dot.low, dot.high] for dot in dots]
    return Chart(name, title, caption, figure, Table(["", x_name, "low", "high"], rows))


def _cut(name: str) -> str:
    """A name that leaves the drawing room; the numbers behind it have the whole."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def short_number(value: float, digits: int) -> str:
    """``.83`` for 0.83, ``1.0`` for 1: what fits into a cell."""
    text = f"{value:.{digits}f}"
    if abs(value) < 1 and not text.lstrip("-").startswith("1"):
        return text.replace("0.", ".", 1) if digits else text
    return f"{value:.{max(digits - 1, 0)}f}" if abs(value) < 10 else f"{value:.0f}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, outside matplotlib's global state, so that threads may draw."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    return figure, axes


def _look(number: int) -> tuple[str, str, str, float]:
    colour = COLOURS[number % len(COLOURS)]
    return colour, MARKERS[number % len(MARKERS)], DASHES[number // len(COLOURS) % len(DASHES)], 1.6
