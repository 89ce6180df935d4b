"""Figures: the numbers behind them, self-contained SVG, the same bytes each time."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest

from amlora_dist.reporting.figures import (
    GREY,
    WIDE,
    WIDTH,
    Chart,
    Dot,
    Series,
    Table,
    bar_chart,
    dot_plot,
    heat_map,
    line_chart,
    short_number,
)

pytestmark = pytest.mark.integration  # draws every kind of picture


def charts() -> dict[str, Chart]:
    return {
        "heat": heat_map(
            "heat", "t", "c", ["untrained", "after 1"], ["dbpedia", "amazon"], [[0.0, None], [0.951, 0.25]], marked=[(1, 0)]
        ),
        "difference": heat_map("difference", "t", "c", ["a"], ["b"], [[-0.3]], diverging=True),
        "line": line_chart(
            "line", "t", "c", [Series("one", [1, 2, 3], [0.5, None, 0.7], [0.4, None, 0.6], [0.6, None, 0.8])],
            x_name="stage", y_name="accuracy", x_ticks=["1", "2", "3"],
        ),
        "bar": bar_chart("bar", "t", "c", ["x", "y"], [("train", [1.0, 2.0]), ("score", [0.5, None])], x_name="s"),
        "dot": dot_plot("dot", "t", "c", [Dot("am_lora", 0.7, 0.6, 0.8, True), Dot("base", None)], x_name="AP", zero=True),
        "empty": line_chart("empty", "t", "c", [], x_name="x", y_name="y"),
        "long": heat_map("long", "t", "c", [f"task {n}" for n in range(16)], [f"a long name {n}" for n in range(15)],
                         [[0.01 * n * m for n in range(15)] for m in range(16)]),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["heat", "difference", "line", "bar", "dot", "empty", "long"])
def chart(request: pytest.FixtureRequest) -> Chart:
    return charts()[request.param]


def test_svg_is_one_well_formed_element_without_outside_references(chart: Chart) -> None:
    svg = chart.svg()
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    ElementTree.fromstring(svg)
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)
    assert "http" not in bare and "<script" not in bare and "<metadata" not in bare


def test_every_id_of_an_svg_is_referred_to_in_it(chart: Chart) -> None:
    svg = chart.svg()
    assert set(re.findall(r' id="([^"]+)"', svg)) == set(re.findall(r'(?:href="|url\()#([^")]+)', svg))


def test_ids_of_two_charts_do_not_collide() -> None:
    first, second = charts()["line"], charts()["dot"]
    ids = [set(re.findall(r' id="([^"]+)"', chart.svg())) for chart in (first, second)]
    assert not ids[0] & ids[1]


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert charts()["line"].svg() == charts()["line"].svg()


def test_png_is_a_png(chart: Chart) -> None:
    assert chart.png().startswith(b"\x89PNG")


def test_a_chart_is_light() -> None:
    assert all(len(chart.svg()) < 150_000 for chart in charts().values())


def test_csv_gives_the_numbers_in_full_and_what_is_undefined_as_nothing() -> None:
    rows = list(csv.reader(io.StringIO(charts()["heat"].data.csv())))
    assert rows == [["", "dbpedia", "amazon"], ["untrained", "0.0", ""], ["after 1", "0.951", "0.25"]]
    lines = list(csv.reader(io.StringIO(charts()["line"].data.csv())))
    assert lines[1:] == [["one", "1", "0.5", "0.4", "0.6"], ["one", "2", "", "", ""], ["one", "3", "0.7", "0.6", "0.8"]]


def test_csv_quotes_what_a_task_name_may_hold() -> None:
    assert list(csv.reader(io.StringIO(Table(["a"], [['x,"y"\nz']]).csv())))[1] == ['x,"y"\nz']


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.834, 2, ".83"), (1.0, 2, "1.0"), (0.999, 2, "1.0"), (-0.5, 2, "-.50"), (0.0, 2, ".00"), (12.3, 1, "12")],
)
def test_short_numbers(value: float, digits: int, text: str) -> None:
    assert short_number(value, digits) == text


def test_long_names_leave_a_dot_plot_its_room_and_are_whole_in_the_data() -> None:
    name = "am_lora-threshold-0.3-temperature-1-form-absolute-layers-last"
    chart = dot_plot("long", "", "", [Dot(name, 0.5, 0.4, 0.6)], x_name="accuracy")
    (axes,) = chart.figure.axes
    assert axes.get_position().width > 0.2
    assert name not in chart.svg() and name in chart.data.csv()


def test_colours_of_a_heat_map_reach_from_the_lowest_to_the_highest_number() -> None:
    near = heat_map("near", "", "", ["a"], ["b", "c", "d"], [[0.70, 0.72, None]])
    shades = [patch.get_facecolor() for patch in near.figure.axes[0].patches]
    assert shades == [mpl.colormaps["cividis"](0.0), mpl.colormaps["cividis"](1.0)]


@pytest.mark.parametrize("count", [1, 2, 15])
def test_a_heat_map_uses_the_width_of_its_place_with_few_tasks_and_of_the_page_with_many(count: int) -> None:
    names = [f"task {n}" for n in range(count)]
    chart = heat_map("m", "", "", [f"after {n}" for n in range(16)], names, [[0.5] * count] * 16)
    width, axes = chart.figure.get_figwidth(), chart.figure.axes[0].get_position()
    assert WIDTH - 0.3 <= width <= WIDE and axes.width > 0.7 and axes.x1 <= 1.0
    assert bool(width > 1.4 * WIDTH) is (count == 15)


@pytest.mark.parametrize("count", [2, 15])
def test_a_line_chart_of_many_tasks_is_as_wide_as_the_page(count: int) -> None:
    series = [Series(f"task {n}", range(1, count + 1), [0.5] * count) for n in range(count)]
    series += [Series(name, range(1, count + 1), [0.3] * count, muted=True) for name in ("chance", "majority")]
    chart = line_chart("m", "", "", series, x_name="x", y_name="y", x_ticks=[str(n) for n in range(1, count + 1)])
    axes = chart.figure.axes[0]
    assert chart.figure.get_figwidth() == (WIDE if count == 15 else WIDTH)
    assert axes.get_position().width > 0.8 and axes.get_position().x1 <= 1.0
    muted = [line for line in axes.lines if line.get_color() == GREY]
    assert [line.get_linestyle() for line in muted] == [":", "--"], "two references look different"
