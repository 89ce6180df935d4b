"""What is wrong with a run, from its numbers alone: pure rules, each a function of ``RunFigures``.

An **alarm** says that the result should not be believed or used before its cause is known. A **note** is worth knowing
and may be as it should be. Thresholds were chosen so that healthy runs of the shipped configurations raise no alarm and
each planted fault raises its own (``tests/reporting/test_diagnosis.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from amlora_dist.reporting.figures import Number

MIXED_ROWS = 0.15
"""Share of a stage's rows that look like another task's, from which on the boundary counts as mixed."""
NOT_LEARNED = 0.02
"""Score above what needs no learning, up to which a task counts as not learned."""
LARGE_L1 = 1.0
"""Coefficient from which on the loss was measured to pay for it (docs/method.md)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule says."""

    level: Literal["alarm", "note"]
    rule: str
    title: str
    detail: str
    """The numbers that say so."""
    fix: str
    """What to look at or to change."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a stage took over from earlier adapters."""

    task: str
    started_from: str | None
    """Task whose row beat the base model before training; None where none did."""
    weights: dict[str, float]
    """Mean absolute weight over layers, by earlier task."""
    zeros: float
    """Share of weights that are exactly 0."""


NAMED = "prompt_style: named"
"""As ``TaskSpec.leaks`` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """The numbers of one run. Lists are in the order of ``tasks``; what is not known is None or empty."""

    tasks: list[str]
    routed: bool
    """Whether a router chooses per input; rules about routing do not apply to others."""
    matrix: Sequence[Sequence[Number]]
    """Accuracy after each stage; row 0 untrained."""
    oracle: Sequence[Number] | None = None
    chance: Sequence[Number] = ()
    majority: Sequence[Number] = ()
    """What each task scores without learning (`reporting.baselines`); None for free text."""
    rows: Sequence[int] = ()
    """Test rows of each task."""
    adapters: list[str] = field(default_factory=list)
    """Tasks of the last bank, in its order."""
    mass: Sequence[Sequence[float] | None] = ()
    """Task x adapter: mean gate on the task's test rows under the last bank."""
    zero_mass: Sequence[Number] = ()
    chosen: Sequence[Sequence[float] | None] = ()
    """Task x adapter: share of the task's test rows whose largest gate is that adapter's."""
    effective: Number = None
    """Effective number of adapters, mean over test rows."""
    recipes: Sequence[Recipe] = ()
    l1: float = 0.0
    mixed: Sequence[tuple[str, str, float]] = ()
    """(stage's task, other task, share of the stage's training rows that look like the other's)."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Training loss of every step, by task."""
    leaks: dict[str, list[str]] = field(default_factory=dict)
    """Settings that give tasks away, by task."""
    text_alone: bool = True
    """Whether rows were scored with a router that read nothing but their texts."""
    bad_rows: dict[str, int] = field(default_factory=dict)

    def routing_accuracy(self, task: str) -> Number:
        """Share of the task's rows whose largest gate is its own adapter's."""
        line = self._chosen(task)
        return None if line is None or task not in self.adapters else line[self.adapters.index(task)]

    def goes_to(self, task: str) -> tuple[str, float] | None:
        """The adapter that most of the task's rows choose, and their share."""
        line = self._chosen(task)
        if not line:
            return None
        best = max(range(len(line)), key=line.__getitem__)
        return self.adapters[best], line[best]

    def _chosen(self, task: str) -> Sequence[float] | None:
        place = self.tasks.index(task)
        return self.chosen[place] if place < len(self.chosen) else None


def diagnose(evidence: RunFigures) -> list[Finding]:
    """All findings, alarms first."""
    found = [finding for rule in RULES for finding in rule(evidence)]
    return sorted(found, key=lambda finding: finding.level != "alarm")


# -- routing ----------------------------------------------------------------------------------------------------


def collapsed(e: RunFigures) -> Iterator[Finding]:
    """One adapter is chosen for most inputs of most other tasks."""
    for j, adapter in enumerate(e.adapters if e.routed and len(e.adapters) > 1 else []):
        others = [e._chosen(task) for task in e.tasks if task in e.adapters and task != adapter]
        shares = [line[j] for line in others if line is not None]
        if shares and _mean(shares) >= 0.5 and not _swaps(e):
            yield Finding(
                "alarm",
                "router_collapsed",
                f"The router has collapsed on {adapter}",
                f"{_share(_mean(shares))} of the other tasks' inputs (1 is all of them) choose its adapter.",
                "Look at the features: router.layer (too shallow?), router.shrinkage, router.gate.temperature; and whether"
                " prompts of different tasks differ at all.",
            )


def blind(e: RunFigures) -> Iterator[Finding]:
    """Attention is spread over all adapters and hardly depends on the input."""
    count = len(e.adapters)
    lines = [line for task, line in zip(e.tasks, e.mass, strict=False) if line is not None and task in e.adapters]
    if not e.routed or count < 2 or len(lines) < 2 or e.effective is None or e.effective < 0.8 * count:
        return
    apart = max(0.5 * math.fsum(abs(a - b) for a, b in zip(x, y, strict=True)) for x in lines for y in lines)
    if apart < 0.1:
        yield Finding(
            "alarm",
            "router_blind",
            "The router does not look at its input",
            f"{e.effective:.1f} of {count} adapters weigh in on average, and two tasks' mean gates differ by at most"
            f" {apart:.2f} (total variation).",
            "As wanted for router.kind uniform; else look at router.layer and router.gate.temperature.",
        )


def exchanged(e: RunFigures) -> Iterator[Finding]:
    """Tasks whose inputs go to each other's adapters, all around a circle."""
    for circle in _swaps(e):
        shares = [share for task in circle if (to := e.goes_to(task)) for share in (to[1],)]
        yield Finding(
            "alarm",
            "statistics_exchanged",
            f"Inputs of {' → '.join([*circle, circle[0]])} choose each other's adapters",
            f"{_share(min(shares))} or more of each task's inputs go to the next one's adapter.",
            "Their router statistics (or their training data) are exchanged: compare the data folders and the tasks' files.",
        )


def misrouted(e: RunFigures) -> Iterator[Finding]:
    """A task that loses inputs to another adapter; an alarm if it costs much."""
    if not e.routed or len(e.adapters) < 2 or any(True for _ in collapsed(e)) or any(True for _ in blind(e)):
        return
    inside = {task for circle in _swaps(e) for task in circle}
    for i, task in enumerate(e.tasks):
        right = e.routing_accuracy(task)
        if right is None or task in inside or right >= 0.85:
            continue
        line = e._chosen(task) or []
        wrong = max(((share, name) for name, share in zip(e.adapters, line, strict=True) if name != task), default=(0.0, ""))
        last, oracle = e.matrix[-1][i], e.oracle[i] if e.oracle is not None else None
        cost = None if last is None or oracle is None else oracle - last
        severe = right < 0.6 and (cost is None or cost >= 0.05)
        severe = severe or (cost is not None and cost >= 0.1 and _beyond_chance(oracle, last, e.rows, i))
        loss = "" if cost is None else f" Against being told the task this costs {cost:.3f}."
        yield Finding(
            "alarm" if severe else "note",
            "misrouted",
            f"{task} is misrouted",
            f"{_share(right)} of its inputs choose its own adapter, {_share(wrong[0])} choose {wrong[1]}'s.{loss}",
            "If the tasks are alike, give them distinct questions or join them; more training rows sharpen the statistics.",
        )


def look_alikes(e: RunFigures) -> Iterator[Finding]:
    """Two tasks that lose inputs to each other."""
    if not e.routed or any(True for _ in collapsed(e)) or any(True for _ in blind(e)):
        return
    inside = {task for circle in _swaps(e) for task in circle}
    learned = [task for task in e.tasks if task in e.adapters and task not in inside]
    for n, first in enumerate(learned):
        for second in learned[n + 1 :]:
            there, back = e._chosen(first), e._chosen(second)
            if there is None or back is None:
                continue
            out, home = there[e.adapters.index(second)], back[e.adapters.index(first)]
            if min(out, home) >= 0.2:
                yield Finding(
                    "note",
                    "look_alikes",
                    f"{first} and {second} look alike to the router",
                    f"{_share(out)} of {first} goes to {second}, {_share(home)} the other way.",
                    "Harmless if both answer with the same words; else distinct questions help.",
                )


def zero_adapter(e: RunFigures) -> Iterator[Finding]:
    """Most of the attention goes to the adapter that adds nothing."""
    known = [
        share for task, share in zip(e.tasks, e.zero_mass, strict=False) if share is not None and task in e.adapters
    ]
    if e.routed and known and _mean(known) >= 0.4:
        yield Finding(
            "alarm",
            "over_regularised_gate",
            "The gate is over-regularised",
            f"{_share(_mean(known))} of the attention on learned tasks goes to the zero adapter: the base model answers.",
            "Lower router.gate.threshold, take router.gate.form relative, or turn router.gate.abstention off.",
        )


# -- what was learned ---------------------------------------------------------------------------------------------


def erased_recipes(e: RunFigures) -> Iterator[Finding]:
    """The L1 coefficient is so large that no stage kept a weight, though earlier adapters would have helped."""
    helped = [recipe for recipe in e.recipes if recipe.started_from is not None]
    if not helped or any(recipe.zeros < 1.0 for recipe in helped):
        return
    large = e.l1 >= LARGE_L1
    yield Finding(
        "alarm" if large else "note",
        "over_regularised_recipe",
        "The L1 penalty erased every recipe" if large else "No stage kept a weight on an earlier adapter",
        f"training.l1 is {e.l1:g}; {len(helped)} stages found an earlier task's adapter better than none"
        f" ({', '.join(f'{r.task} from {r.started_from}' for r in helped[:4])}), and all their weights are exactly 0.",
        "Measured: 0.1 to 0.3 costs nothing, 1 costs 0.015 to 0.02, 3 destroys transfer. Lower training.l1.",
    )


def mixed_boundaries(e: RunFigures) -> Iterator[Finding]:
    """A stage's training rows hold rows of another task."""
    for task, other, share in e.mixed:
        if share >= MIXED_ROWS:
            yield Finding(
                "alarm",
                "mixed_boundary",
                f"The stage of {task} looks mixed with {other}",
                f"About {_share(share)} of its training rows look like {other}'s (spread of its features along the line"
                " between the two tasks).",
                "Check where one task's data end and the next one's begin; the adapter and the router have learned both.",
            )


def forgotten(e: RunFigures) -> Iterator[Finding]:
    """A task that lost much of what its own stage had reached."""
    last = len(e.matrix) - 1
    lost = []
    for i, task in enumerate(e.tasks[: last - 1] if last > 1 else []):
        own, now = e.matrix[i + 1][i], e.matrix[last][i]
        if own is not None and now is not None and own - now >= 0.1 and _beyond_chance(own, now, e.rows, i):
            lost.append((own - now, task, own, now))
    if lost:
        lost.sort(reverse=True)
        some = "; ".join(f"{task} {own:.3f} → {now:.3f}" for _, task, own, now in lost[:4])
        yield Finding(
            "alarm",
            "forgotten",
            f"{len(lost)} of {last} tasks were forgotten" if len(lost) > 1 else f"{lost[0][1]} was forgotten",
            f"Score after their own stage and now: {some}.",
            "A method that trains one adapter on forgets; with am_lora look at the routing of these tasks.",
        )


def not_learned(e: RunFigures) -> Iterator[Finding]:
    """A stage that did not lift its own task above what it scores without learning.

    That is the highest of the untrained model, the most frequent label, and a label drawn evenly.
    """
    for i, task in enumerate(e.tasks[: max(len(e.matrix) - 1, 0)]):
        oracle = e.oracle[i] if e.oracle is not None else None
        best = max((v for v in (e.matrix[i + 1][i], oracle) if v is not None), default=None)
        compared = {
            "untrained": e.matrix[0][i],
            "with its most frequent label always": e.majority[i] if i < len(e.majority) else None,
            "by chance": e.chance[i] if i < len(e.chance) else None,
        }
        known = {name: value for name, value in compared.items() if value is not None}
        if best is not None and known and best - max(known.values()) <= NOT_LEARNED:
            yield Finding(
                "alarm",
                "not_learned",
                f"{task} was not learned",
                f"{best:.3f} after its own stage (or told the task, if that is more); "
                + ", ".join(f"{value:.3f} {name}" for name, value in known.items())
                + ".",
                "Look at its loss curve: training.learning_rate, training.epochs, more rows, and its labels.",
            )


def diverged(e: RunFigures) -> Iterator[Finding]:
    """A stage whose loss ended where it began, or higher.

    One that began from an earlier task's row may have begun where there was nothing left to gain: as long as its loss
    did not rise by more than twice the standard error of the difference, that is a note.
    """
    began_from = {recipe.task: recipe.started_from for recipe in e.recipes}
    for task, losses in e.losses.items():
        part = max(1, len(losses) // 5)
        first, last = losses[:part], losses[-part:]
        if len(losses) < 8 or _mean(last) < _mean(first):
            continue
        numbers = f"{_mean(first):.2f} at the beginning, {_mean(last):.2f} at the end (nats per token)."
        source = began_from.get(task)
        if source is not None and _mean(last) - _mean(first) <= 2 * (_error(first) ** 2 + _error(last) ** 2) ** 0.5:
            yield Finding(
                "note",
                "loss_not_falling",
                f"{task} stayed where {source} had left it",
                f"Its training began from {source}'s row, and its loss did not fall from there: {numbers}",
                "Right for tasks that are alike; otherwise look at its accuracy, and give it more rows or steps.",
            )
        else:
            yield Finding(
                "alarm",
                "loss_not_falling",
                f"The loss of {task} did not fall",
                numbers,
                "Lower training.learning_rate, or raise it if the loss hardly moved.",
            )


def task_in_prompts(e: RunFigures) -> Iterator[Finding]:
    """Prompts that name the task, and texts that keep what tells tasks apart."""
    kinds = sorted({leak for leaks in e.leaks.values() for leak in leaks})
    seen = [kind for kind in kinds if kind != NAMED or not e.text_alone]
    if not kinds:
        return
    said = []
    if NAMED in kinds and e.text_alone:
        said.append("The router reads the text alone and sees no names: they tell the adapters the task, not the router.")
    if seen:
        said.append(f"Routing is easier than for a user's text, by {' and '.join(seen)}.")
    yield Finding(
        "note",
        "prompts_tell_the_task",
        "Prompts or texts give the task away" if seen else "The prompts name the task",
        f"{', '.join(kinds)} in {len(e.leaks)} tasks. {' '.join(said)}",
        "Report the same run with prompt_style options or bare and field_markers strip next to it.",
    )


def skipped_rows(e: RunFigures) -> Iterator[Finding]:
    """Rows that could not be used."""
    if e.bad_rows:
        counts = ", ".join(f"{task} {count}" for task, count in e.bad_rows.items())
        detail = f"on_bad_row is skip: {counts}."
        yield Finding("note", "rows_skipped", "Bad rows were skipped", detail, "Fix the data files.")


Rule = Callable[[RunFigures], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    collapsed, blind, exchanged, misrouted, look_alikes, zero_adapter, erased_recipes, mixed_boundaries, forgotten,
    not_learned, diverged, task_in_prompts, skipped_rows,
)  # fmt: skip


def _swaps(e: RunFigures) -> list[list[str]]:
    """Circles of two or more tasks in which most inputs of each choose the next one's adapter."""
    if not e.routed:
        return []
    follows = {}
    for task in e.tasks:
        to = e.goes_to(task)
        if to is not None and task in e.adapters and to[0] != task and to[1] > 0.5:
            follows[task] = to[0]
    circles, seen = [], set()
    for start in follows:
        path, here = [], start
        while here in follows and here not in path and here not in seen:
            path.append(here)
            here = follows[here]
        if here in path:
            circles.append(path[path.index(here) :])
        seen |= set(path)
    return circles


def _beyond_chance(high: Number, low: Number, rows: Sequence[int], place: int) -> bool:
    """Whether two scores of the same rows differ by more than twice the larger standard error."""
    count = rows[place] if place < len(rows) else 0
    if high is None or low is None or not count:
        return high is not None and low is not None
    p = min(max((high + low) / 2, 1 / count), 1 - 1 / count)
    return high - low > 2 * math.sqrt(2 * p * (1 - p) / count)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _share(share: float) -> str:
    return f"{share:.2f}"
