"""One self-contained HTML page: no script, no outside request, its data behind every figure as links.

The page is made of sections of blocks; ``templates/page.html.j2`` lays them out for a desk, a phone and paper.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from amlora_dist.errors import UserError
from amlora_dist.files import write_bytes
from amlora_dist.reporting.diagnosis import Finding
from amlora_dist.reporting.figures import Chart, Table, Value

LIMIT_BYTES = 3_000_000
"""Largest page: what mail programs and phones take."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table to read; its numbers are also a CSV link."""

    name: str
    title: str
    table: Table
    caption: str = ""
    digits: int = 3
    shown: Table | None = None
    """What the page shows in place of ``table``, where that would be too much to read."""


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Text in the words of a program: configuration, commands."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, slots=True)
class DownloadsBlock:
    """Files inside the page, and where those are that would make it too large."""

    title: str
    files: Sequence[tuple[str, str]]
    """(file name, text)"""
    elsewhere: str = ""


Block = Chart | TableBlock | TextBlock | DownloadsBlock


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a sentence on what it is about, and blocks."""

    title: str
    text: str
    blocks: Sequence[Block]


@dataclass(slots=True)
class Page:
    """A whole report."""

    title: str
    summary: str
    """What was found, in sentences that need no figure."""
    tiles: Sequence[Tile]
    findings: Sequence[Finding] | None
    """None where nothing was diagnosed (a comparison)."""
    sections: Sequence[Section]
    facts: dict[str, str] = field(default_factory=dict)
    """The line below the title: method, seed, model."""
    links: Sequence[tuple[str, str]] = ()
    """(words, address) of pages elsewhere; an address that is not http or https is left out."""

    @property
    def charts(self) -> list[Chart]:
        """All charts, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]

    def html(self) -> str:
        """The page.

        Raises:
            UserError: it is larger than ``LIMIT_BYTES``.
        """
        text = _ENVIRONMENT.get_template("page.html.j2").render(page=self)
        text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"
        if (size := len(text.encode())) > LIMIT_BYTES:
            raise UserError(f"the report is {size:,} bytes, more than {LIMIT_BYTES:,}: report fewer runs or tasks at once")
        return text


def write_page(page: Page, file: Path) -> Path:
    """Write under a temporary name, sync, rename. Raises UserError where the place cannot be written."""
    text = page.html()
    try:
        write_bytes(file.resolve() if file.is_symlink() else file, text.encode())
    except (OSError, RuntimeError) as error:  # a full disk, links in a circle
        raise UserError(f"cannot write {file}: {error}; give another --output") from error
    return file


def number(value: Value, digits: int = 3) -> str:
    """A value as a table shows it; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.{digits}f}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else value


def fraction(value: float | None) -> str:
    """A score or share, 0 to 1, as every page, table and the terminal show it: three decimals, never per cent."""
    return number(value)


def signed(value: float) -> str:
    """A difference of scores with its sign; what rounds to nothing has none."""
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text[1:] == "0.000" else text


def is_link(text: Value) -> bool:
    """Whether a value is the address of a page."""
    return isinstance(text, str) and re.fullmatch(r"https?://\S+", text) is not None


def file_name(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "report"


def _data_uri(text: str, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(text.encode()).decode()}"


def _kind(block: Any) -> str:
    return {Chart: "chart", TableBlock: "table", TextBlock: "text", DownloadsBlock: "downloads"}[type(block)]


def _mime(name: str) -> str:
    return "application/json" if name.endswith(".json") else "text/csv;charset=utf-8"


def _size(svg: str) -> float:
    """Natural width of an SVG in CSS pixels; matplotlib gives it in points."""
    found = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)
    return float(found[1]) * 96 / 72 if found else 440.0


_ENVIRONMENT = Environment(
    loader=PackageLoader("amlora_dist.reporting", "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_ENVIRONMENT.filters |= {
    "number": number, "is_link": is_link, "data_uri": _data_uri, "kind": _kind, "mime": _mime, "svg_width": _size,
}  # fmt: skip
