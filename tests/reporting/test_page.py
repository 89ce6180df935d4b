"""The page: one file, nothing from outside, hostile names harmless, the data behind every figure."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amlora_dist.errors import UserError
from amlora_dist.reporting.diagnosis import Finding
from amlora_dist.reporting.figures import Dot, Table, dot_plot, heat_map
from amlora_dist.reporting.page import (
    DownloadsBlock,
    Page,
    Section,
    TableBlock,
    TextBlock,
    Tile,
    file_name,
    fraction,
    number,
    signed,
    write_page,
)

HOSTILE = '<script>alert(1)</script>"\'& {{ 7 * 7 }}'


def page(name: str = "run", *, downloads: str = "a,b\n1,2\n") -> Page:
    return Page(
        title=name,
        summary=f"{name} learned",
        tiles=[Tile(name, "66.9", name)],
        findings=[Finding("alarm", "rule", name, name, name)],
        sections=[
            Section(name, name, [
                heat_map("matrix", name, name, [name], [name], [[0.5]]),
                dot_plot("dots", name, name, [Dot(name, 0.5, 0.4, 0.6)], x_name=name),
                TableBlock("numbers", name, Table(["a", name], [[name, 0.123456789], ["none", None]]), name),
                TextBlock(name, name, folded=True),
                DownloadsBlock(name, [("predictions.csv", downloads)], name),
            ]),
            Section("empty", "left out", []),
        ],
        facts={"method": name},
    )  # fmt: skip


class Tags(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_page_has_no_script_and_asks_for_nothing_outside() -> None:
    html = page().html()
    for tag, attributes in Tags(html).found:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base")
        for key in ("src", "href", "xlink:href", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (tag, key, value)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_names_from_outside_are_text_and_nothing_else() -> None:
    html = page(HOSTILE).html()
    assert "<script" not in html and "49" not in re.sub(r"base64,[^\"]*|[0-9.]{4,}", "", html.split("</style>")[1])
    assert "&lt;script&gt;" in html


def test_every_figure_and_table_links_the_numbers_behind_it() -> None:
    links = {a["download"]: a["href"] for tag, a in Tags(page().html()).found if tag == "a" and a.get("download")}
    assert set(links) == {"matrix.csv", "dots.csv", "numbers.csv", "predictions.csv"}
    text = base64.b64decode(str(links["numbers.csv"]).split(",", 1)[1]).decode()
    assert "0.123456789" in text, "in full, whatever the page shows"


def test_a_section_without_blocks_is_left_out() -> None:
    assert "left out" not in page().html()


def test_addresses_are_links_only_where_they_lead_to_a_page() -> None:
    linked = page()
    linked.links = [("the run", "https://mlflow.example/#/experiments/1/runs/a"), ("never", "javascript:alert(1)")]
    table = TableBlock("t", "t", Table(["a", "b"], [["x", "http://127.0.0.1:5000/#/x"], ["y", "javascript:alert(1)"]]))
    linked.sections = [Section("s", "", [table])]
    html = linked.html()
    found = [(a["href"], a.get("rel")) for tag, a in Tags(html).found if tag == "a" and "http" in str(a["href"])]
    assert found == [(linked.links[0][1], "noreferrer"), ("http://127.0.0.1:5000/#/x", "noreferrer")]
    assert 'href="javascript' not in html and "never" not in html


def test_the_table_of_contents_leads_to_every_heading() -> None:
    found = Tags(page().html()).found
    asked = [str(a["href"])[1:] for tag, a in found if tag == "a" and str(a.get("href")).startswith("#")]
    assert asked == [a["id"] for tag, a in found if tag == "h2"] == ["diagnosis", "section-1"]


def rules(html: str, condition: str) -> str:
    """What a style sheet says under a condition, up to its closing brace at the beginning of a line."""
    return html.split(f"@media {condition} {{")[1].split("\n}")[0]


def test_dark_mode_changes_every_colour_and_leaves_drawings_and_paper_light() -> None:
    html = page().html()
    light = set(re.findall(r"(--\w+):", html.split(":root {")[1].split("}")[0]))
    dark = rules(html, "screen and (prefers-color-scheme: dark)")
    assert light and set(re.findall(r"(--\w+):", dark)) == light
    assert ".drawing { background: #fff" in dark, "the ink of a chart is dark"
    outside = html.split("<style>")[1].split("</style>")[0].replace(dark, "")
    assert not re.search(r"background: #", outside), "a colour outside the variables would stay light"


def test_nothing_is_cut_on_a_phone_or_on_paper() -> None:
    html = page().html()
    printed = rules(html, "print")
    assert "white-space: normal; overflow-wrap: anywhere" in printed and "width: 100%" in printed, "tables wrap"
    assert ".drawing, .scroll, pre { overflow: visible; }" in printed and "min-width: 0 !important" in printed
    narrow = rules(html, "screen and (max-width: 40rem)")
    assert "max-width: 44vw" in narrow, "the column that stays leaves room for the others"
    assert "overflow-wrap: break-word" in narrow, "a name is wider than a letter"
    assert ".scroll { overflow-x: auto; }" in html and ".drawing { overflow-x: auto; }" in html


def test_a_page_that_would_be_too_large_is_refused() -> None:
    with pytest.raises(UserError, match=r"the report is [0-9,]+ bytes, more than 3,000,000"):
        page(downloads="x" * 3_000_000).html()


def test_a_page_without_findings_says_that_nothing_looks_wrong() -> None:
    healthy = page()
    healthy.findings = []
    assert "Nothing looks wrong" in healthy.html()


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = write_page(page(), tmp_path / "new" / "report.html")
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another --output"):
        write_page(page(), tmp_path / "file" / "report.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.500"), (-0.25, "−0.250"), (12345, "12,345"), (True, "yes"), ("x", "x"), (1234.5, "1,234.500")],
)
def test_numbers_as_tables_show_them(value: float | None, text: str) -> None:
    assert number(value) == text


def test_scores_are_fractions_and_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    assert [fraction(value) for value in (0.76666, -0.1, None)] == ["0.767", "−0.100", "–"]
    assert [signed(value) for value in (0.0123, -0.05, 0.0004, -0.0004)] == ["+0.012", "−0.050", "0.000", "0.000"]


def test_file_names_are_harmless() -> None:
    assert file_name("../../etc/pass wd") == "etc-pass-wd"
    assert file_name("///") == "report"
