"""The report of one search: from the result that ``amlora tune --json`` prints to a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from amlora_dist.config.search_space import brief, described
from amlora_dist.reporting.figures import Chart, Dot, Number, Series, Table, Value, bar_chart, dot_plot, heat_map, line_chart
from amlora_dist.reporting.page import Block, DownloadsBlock, Page, Section, TableBlock, TextBlock, Tile, fraction

TOP = 5
DRAWN = 24
"""Trials in a chart with a line each; the table behind the page has all."""
L1 = "training.l1"
BINS = 4
"""Of a range, for importance and heat maps."""

SearchResult = Mapping[str, Any]
TrialResult = Mapping[str, Any]
_SPLITS = (
    "Trials are compared on the dev rows, which are not test rows; the best of many trials looks better there than it"
    " is. The winner alone was scored on the test rows, after the search."
)


def search_page(result: SearchResult) -> Page:
    """The report of a search."""
    finished = [_by_number(result)[number] for number in result["ranking"]]
    sections = [
        Section("Which values are best", _SPLITS, _best(result, finished)),
        Section(
            "Which values matter",
            "Share of the variance of average performance between trials that one parameter explains by itself (its main"
            " effect, a range in quarters): what is left is interaction and noise.",
            [*_matter(result, finished), *_reach_of_l1(result)],
        ),
        Section("Stage by stage", "What the scheduler saw.", _curves(result)),
        Section("What it cost", "", _cost(result)),
        Section("Raw data", "Every number above follows from these.", _raw(result)),
        Section("The space", "", [TextBlock("search.space", yaml.safe_dump(dict(result["space"]), sort_keys=False))]),
    ]
    winner = result["winner"]
    return Page(
        title=f"Search {result['search_id']}",
        summary=_summary(result),
        tiles=[
            Tile("winner, dev", fraction(winner["metrics"]["average_performance"]), described(winner["values"])),
            Tile("winner, test", fraction(_test(winner)), "scored once, after the search"),
            Tile("stages trained", str(result["cost"]["stages_trained"]), f"of {result['cost']['stages_total']}"),
            Tile("trials", str(len(result["trials"])), f"{len(finished)} finished"),
        ],
        findings=None,
        sections=sections,
        facts={
            **{key: str(result[key]) for key in ("method", "algorithm", "scheduler", "seed")},
            "objective": ", ".join(f"{way} {name}" for name, way in result["objectives"].items()),
        },
    )


def importance(finished: Sequence[TrialResult], space: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, float | None]:
    """Main effect of each parameter: Var(E[y | x]) / Var(y), y the average performance of the finished trials.

    The first-order index of Sobol 1993 over the trials that there are. None with fewer than two values or no variance.
    """
    known = [t for t in finished if t["metrics"].get("average_performance") is not None]
    scores = [float(t["metrics"]["average_performance"]) for t in known]
    whole = _variance(scores)
    found: dict[str, float | None] = {}
    for path, drawn in space.items():
        groups: dict[str, list[float]] = {}
        for trial, score in zip(known, scores, strict=True):
            groups.setdefault(_group(trial["values"][path], drawn), []).append(score)
        if whole <= 0 or len(groups) < 2:
            found[path] = None
            continue
        means = [math.fsum(own) / len(own) for own in groups.values() for _ in own]
        found[path] = _variance(means) / whole
    return found


def _variance(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    middle = math.fsum(values) / len(values)
    return math.fsum((value - middle) ** 2 for value in values) / len(values)


def _group(value: Any, drawn: Mapping[str, Sequence[Any]]) -> str:
    """The value as text, or the quarter of its range."""
    ((kind, ends),) = drawn.items()
    if kind in ("choice", "grid"):
        return brief(value)
    scale = math.log if kind == "loguniform" else float
    low, high = scale(ends[0]), scale(ends[1])
    place = min(BINS - 1, int(BINS * (scale(value) - low) / (high - low)))
    back = math.exp if kind == "loguniform" else float
    edges = [back(low + (high - low) * n / BINS) for n in (place, place + 1)]
    return f"{brief(edges[0])} to {brief(edges[1])}"


def _best(result: SearchResult, finished: Sequence[TrialResult]) -> list[Block]:
    dots = []
    for trial in finished[:TOP]:
        low, high = trial.get("interval") or (None, None)
        value = trial["metrics"]["average_performance"]
        dots.append(Dot(f"{trial['number']}: {described(trial['values'])}", value, low, high, trial is finished[0]))
    top = dot_plot(
        "top-five",
        "The best trials",
        "Average performance on the dev rows with its 95% bootstrap interval: intervals that overlap much say that the"
        " order among these trials may be chance.",
        dots,
        x_name="average performance (dev)",
    )
    return [*_heat_maps(result, finished), *_parallel(result, finished), top]


def _heat_maps(result: SearchResult, finished: Sequence[TrialResult]) -> list[Chart]:
    """Average performance and forgetting over the first two parameters; means where others vary too."""
    space = result["space"]
    if len(space) < 2:
        return []
    across, down = list(space)[:2]
    names = [path.rpartition(".")[2] for path in (across, down)]
    columns, rows = (_axis(result, finished, path) for path in (across, down))
    charts = []
    for metric, title in (
        ("average_performance", "Average performance"),
        ("forgetting", "Forgetting"),
    ):
        cells: dict[tuple[str, str], list[float]] = {}
        for trial in finished:
            if (value := trial["metrics"].get(metric)) is not None:
                place = (_group(trial["values"][down], space[down]), _group(trial["values"][across], space[across]))
                cells.setdefault(place, []).append(value)
        if not cells:
            continue
        grid = [[_mean(cells.get((row, column))) for column in columns] for row in rows]
        more = " Each cell is the mean over the other parameters." if len(space) > 2 else ""
        missing = " A dot: no trial finished there." if any(v is None for line in grid for v in line) else ""
        charts.append(
            heat_map(
                f"map-{metric.replace('_', '-')}",
                f"{title}, {names[0]} by {names[1]}",
                f"After the last stage, on the dev rows.{more}{missing}",
                rows,
                columns,
                grid,
                digits=3,
                row_name=names[1],
                column_name=names[0],
                diverging=metric == "forgetting",
            )
        )
    return charts


def _axis(result: SearchResult, finished: Sequence[TrialResult], path: str) -> list[str]:
    """Values of a parameter in order, as text: of a list all, of a range the quarters that were met."""
    drawn = result["space"][path]
    ((kind, values),) = drawn.items()
    if kind in ("choice", "grid"):
        return [brief(value) for value in values]
    met = sorted(trial["values"][path] for trial in finished)
    return list(dict.fromkeys(_group(value, drawn) for value in met))


def _parallel(result: SearchResult, finished: Sequence[TrialResult]) -> list[Chart]:
    """One line a trial through its values and its score, each axis from its lowest to its highest."""
    space = result["space"]
    drawn = finished[:DRAWN]
    if len(drawn) < 2:
        return []
    columns = [[_place(t["values"][path], space[path]) for t in drawn] for path in space]
    scores = [float(t["metrics"]["average_performance"]) for t in drawn]
    low, high = min(scores), max(scores)
    columns.append([(score - low) / (high - low) if high > low else 0.5 for score in scores])
    places = list(range(1, len(columns) + 1))
    series = [
        Series(f"{t['number']}: {described(t['values'])}", places, [column[n] for column in columns], muted=n >= TOP)
        for n, t in enumerate(drawn)
    ]
    fewer = f" The best {DRAWN} of {len(finished)}." if len(finished) > DRAWN else ""
    chart = line_chart(
        "parallel",
        "Each trial through its values",
        "Every axis runs from its lowest (bottom) to its highest value; the last, the result, is average performance, from"
        f" {low:.3f} to {high:.3f}. Lines of the best five are coloured.{fewer}",
        series,
        x_name="parameter",
        y_name="place between lowest and highest",
        y_range=(-0.04, 1.04),
        x_ticks=[*(path.rpartition(".")[2] for path in space), "result"],
    )
    return [chart]


def _place(value: Any, drawn: Mapping[str, Sequence[Any]]) -> float:
    """Where a value is between the ends of its axis, 0 to 1."""
    ((kind, values),) = drawn.items()
    if kind in ("choice", "grid"):
        return list(values).index(value) / max(1, len(values) - 1)
    scale = math.log if kind == "loguniform" else float
    low, high = scale(values[0]), scale(values[1])
    return (scale(value) - low) / (high - low)


def _matter(result: SearchResult, finished: Sequence[TrialResult]) -> list[Block]:
    found = importance(finished, result["space"])
    known = {path: share for path, share in found.items() if share is not None}
    if not known:
        return []
    order = sorted(known, key=lambda path: -known[path])
    chart = bar_chart(
        "importance",
        "Importance of each parameter",
        f"Over {len(finished)} finished trials; with few of them a share of some percent means nothing.",
        order,
        [("share of the variance", [known[path] for path in order])],
        x_name="share of the variance explained",
        digits=2,
    )
    return [chart]


def _reach_of_l1(result: SearchResult) -> list[Block]:
    """In how many stages L1 reached anything, where it was varied and stages noted it."""
    known = [trial for trial in result["trials"] if trial.get("l1")]
    if L1 not in result["space"] or not known:
        return []
    rows: list[list[Value]] = []
    for group in _axis(result, known, L1):
        own = [trial["l1"] for trial in known if _group(trial["values"][L1], result["space"][L1]) == group]
        rows.append([group, *(sum(one[key] for one in own) for key in ("recipes", "reached"))])
    columns = [L1, "stages with a recipe", "of these, stages where L1 set weights to 0"]
    caption = (
        "Where L1 reaches nothing its values cannot differ but by chance. Over all trials; a stage that several share counts"
        " in each. Of a learned recipe L1 makes exact zeros; the shrinking of weights that stay is not counted."
    )
    return [TableBlock("l1-reach", "What L1 reached", Table(columns, rows), caption)]


def _curves(result: SearchResult) -> list[Block]:
    ranked = [_by_number(result)[n] for n in result["ranking"]]
    others = [t for t in result["trials"] if t["number"] not in result["ranking"] and t["curve"]]
    series = []
    for place, trial in enumerate([*ranked, *others][:DRAWN]):
        values: list[Number] = [point.get("average_performance") for point in trial["curve"]]
        ended = "" if trial["outcome"] == "finished" else f" ({trial['outcome']})"
        name = f"{trial['number']}: {described(trial['values'])}{ended}"
        series.append(Series(name, list(range(1, len(values) + 1)), values, muted=place >= TOP))
    chart = line_chart(
        "learning-curves",
        "Average performance over the stages",
        "On the tasks seen so far, dev rows. A line that ends early was stopped or failed there.",
        series,
        x_name="after stage",
        y_name="average performance",
        x_ticks=[str(stage) for stage in range(1, result["stages"] + 1)],
    )
    return [chart]


def _cost(result: SearchResult) -> list[Block]:
    trials = sorted(result["trials"], key=lambda t: t["number"])[:DRAWN]
    names = [f"{t['number']}: {described(t['values'])}" for t in trials]
    trained = [sum(stage["reused_from"] is None for stage in t["stages"]) for t in trials]
    reused = [len(t["stages"]) - own for t, own in zip(trials, trained, strict=True)]
    pruned = [result["stages"] - len(t["stages"]) if t["outcome"] == "pruned" else 0 for t in trials]
    chart = bar_chart(
        "stages",
        "What became of each trial's stages",
        "Trained by the trial itself, taken over from another, or never reached because the scheduler stopped it.",
        names,
        [("trained", trained), ("reused", reused), ("pruned", pruned)],
        x_name="stages",
        digits=0,
    )
    entries = {key: value for key, value in result["cost"].items() if key != "began_at"}
    rows: list[list[Value]] = [[key.replace("_", " "), value] for key, value in entries.items()]
    return [chart, TableBlock("cost", "In all", Table(["", "value"], rows), "Seconds are summed over trials.", digits=1)]


def _raw(result: SearchResult) -> list[Block]:
    columns = ["trial", *result["space"], "outcome", "average performance", "low", "high", "forgetting", "error"]
    rows: list[list[Value]] = []
    for trial in sorted(result["trials"], key=lambda t: t["number"]):
        metrics = trial["metrics"]
        rows.append(
            [trial["number"], *(_cell(value) for value in trial["values"].values()), trial["outcome"],
             metrics.get("average_performance"), *(trial.get("interval") or (None, None)), metrics.get("forgetting"),
             trial["error"]]
        )  # fmt: skip
    return [
        TableBlock("trials", "All trials", Table(columns, rows), "On the dev rows."),
        DownloadsBlock("The result as JSON", [("search.json", json.dumps(result, indent=1))]),
    ]


def _summary(result: SearchResult) -> str:
    winner, runner_up = result["winner"], result["runner_up"]
    text = (
        f"{len(result['ranking'])} of {len(result['trials'])} trials finished. The best has {described(winner['values'])}:"
        f" {fraction(winner['metrics']['average_performance'])} on average on the dev rows,"
        f" {fraction(_test(winner))} on the test rows."
    )
    if runner_up:
        value = fraction(runner_up["metrics"]["average_performance"])
        text += f" The runner-up ({described(runner_up['values'])}) has {value} on the dev rows."
    cost = result["cost"]
    saved = cost["stages_reused"] + cost["stages_pruned"] - cost.get("stages_surplus", 0)  # of the former scheduler asha
    return text + f" {cost['stages_trained']} stages were trained; {saved} were shared or never needed."


def _test(winner: Mapping[str, Any]) -> float | None:
    return winner["test"]["metrics"]["average_performance"] if "test" in winner else None


def _by_number(result: SearchResult) -> dict[int, TrialResult]:
    return {trial["number"]: trial for trial in result["trials"]}


def _mean(values: Sequence[float] | None) -> Number:
    return math.fsum(values) / len(values) if values else None


def _cell(value: Any) -> Value:
    return value if isinstance(value, (int, float, str, bool, type(None))) else json.dumps(value)
