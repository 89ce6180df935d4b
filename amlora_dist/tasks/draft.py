"""A first draft of a task from rows that nobody has described: which columns count, how they split, what to ask.

What is guessed here is shown to the user and written to a file that can be edited; nothing is guessed when a run reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amlora_dist.config.schema import did_you_mean
from amlora_dist.errors import UserError
from amlora_dist.tasks.auto_labels import FEW_ROWS, MOST_LABELS
from amlora_dist.tasks.conversations import FORMS
from amlora_dist.tasks.task import plain_value
from amlora_dist.tasks.texts import NoTextError

TEXT_NAMES = (
    "text", "body", "sentence", "message", "query", "utterance", "content", "review", "comment", "tweet", "document",
    "article", "question", "input", "description", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "category", "class", "intent", "target", "topic", "sentiment", "department", "queue", "tag", "type",
)  # fmt: skip
ANSWER_NAMES = ("answer", "answers", "response", "reply", "output", "completion", "summary", "target", "reference")
QUESTIONS = {
    "intent": "What does the writer of this text want?",
    "sentiment": "What is the sentiment of this text?",
    "topic": "What is the topic of this text?",
    "summary": "What is a short summary of this text?",
}
LONGEST_LABEL = 60
"""Characters: a column whose values are longer on average holds texts and not labels."""
TEST_SHARE, DEV_SHARE = 0.2, 0.1
WHOLE = re.compile(r"-?[0-9]{1,18}")
"""A whole number, which ``int`` reads; ``str.isdigit`` finds digits in more."""
FEWEST_ROWS = 10


@dataclass(frozen=True, slots=True)
class Guess:
    """Which columns make a row: of a text and its label or answer, or of a conversation."""

    text: str | None = None
    label: str | None = None
    answer: str | None = None
    conversation: dict[str, str] = field(default_factory=dict)
    """Of conversations: the columns as ``columns:`` names them."""

    @property
    def columns(self) -> dict[str, str]:
        """The task's ``columns:``."""
        if self.conversation:
            return self.conversation
        found = {"text": self.text, "label": self.label, "answer": self.answer}
        return {key: name for key, name in found.items() if name is not None}


@dataclass(frozen=True, slots=True)
class _Profile:
    """What a column holds."""

    name: str
    filled: int
    distinct: int
    length: float
    """Mean number of characters."""
    words: bool
    """Its values are texts, and not only numbers."""

    @property
    def like_labels(self) -> bool:
        few = self.distinct <= MOST_LABELS and (self.filled < FEW_ROWS or self.distinct <= self.filled / 2)
        return 2 <= self.distinct < self.filled and few and self.length <= LONGEST_LABEL


def guess_columns(
    rows: Sequence[Mapping[str, Any]], where: str, *, text: str | None, label: str | None, answer: str | None
) -> Guess:
    """Which columns of rows are text and label (or answer); those that are given stay.

    Raises:
        UserError: a given column is not there; no column looks like a text, or none like a label or an answer.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    for name in (text, label, answer):
        if name is not None and name not in present:
            hint = did_you_mean(name, present)
            raise UserError(
                f"{where}: found no column {name!r}{f' ({hint})' if hint else ''}, it has {', '.join(map(str, present))};"
                " name one of them"
            )
    if text is None and label is None and answer is None and (conversation := _conversation(present)):
        return Guess(conversation=conversation)
    if answer is not None and label is not None:
        raise UserError(f"--answer: found {answer!r} next to --label {label!r}, expected one of them: a label or free text")
    if text is not None and text in (label, answer):
        option = "--label" if text == label else "--answer"
        raise UserError(f"--text: found {text!r}, which {option} names too, expected another column; name another")
    profiles = {name: _profile(name, rows) for name in present}
    free = [one for one in profiles.values() if one.name not in (text, label, answer) and one.filled]
    if label is None and answer is None:
        label = _named([one for one in free if one.like_labels], LABEL_NAMES) or _fewest(free, text)
    rest = [one for one in free if one.words and one.name != label]
    if label is None and answer is None:
        answer = _named([one for one in rest if one.name != text] + _listed(rows, present), ANSWER_NAMES)
        rest = [one for one in rest if one.name != answer]
    if text is None:
        text = _named(rest, TEXT_NAMES) or max(rest, key=lambda one: one.length, default=_NOTHING).name
    if not text or (label is None and answer is None):
        lacks = "a text" if not text else "a label or an answer"
        raise UserError(
            f"{where}: found the columns {', '.join(map(str, present))}, none of which looks like {lacks}; name them:"
            " --text COLUMN with --label COLUMN or --answer COLUMN"
        )
    return Guess(text=text, label=label, answer=answer)


_NOTHING = _Profile("", 0, 0, 0.0, False)


def _conversation(present: Sequence[str]) -> dict[str, str]:
    """The columns of the one form of conversation that is there; none where there is none, or more."""
    found = [(needed, more) for needed, more in FORMS.values() if all(name in present for name in needed)]
    return {name: name for names in found[0] for name in names if name in present} if len(found) == 1 else {}


def _profile(name: str, rows: Sequence[Mapping[str, Any]]) -> _Profile:
    values = [value for row in rows if (value := value_of(row.get(name)))]
    words = any(not value.replace(".", "", 1).lstrip("-").isdigit() for value in values)
    length = sum(map(len, values)) / len(values) if values else 0.0
    return _Profile(name, len(values), len(set(values)), length, words)


def value_of(value: object) -> str:
    """A cell as text; empty where it holds none."""
    try:
        return "" if value is None else plain_value(value)
    except NoTextError:
        return ""


def _named(profiles: Iterable[_Profile], names: Sequence[str]) -> str | None:
    by_name = {one.name.lower(): one.name for one in profiles}
    return next((by_name[name] for name in names if name in by_name), None)


def _listed(rows: Sequence[Mapping[str, Any]], present: Sequence[str]) -> list[_Profile]:
    """Columns whose cells are lists of texts: several right answers."""
    cells = {name: [row[name] for row in rows if row.get(name) is not None] for name in present}
    return [
        _Profile(name, len(values), len(values), 0.0, True)
        for name, values in cells.items()
        if values and all(isinstance(one, (list, tuple)) and all(isinstance(a, str) for a in one) for one in values)
    ]


def _fewest(profiles: Iterable[_Profile], text: str | None) -> str | None:
    """The column like labels with the fewest of them, if another one is left for the text."""
    fitting = sorted((one for one in profiles if one.like_labels and one.name != text), key=lambda one: one.distinct)
    longest = max(profiles, key=lambda one: one.length, default=_NOTHING).name
    return next((one.name for one in fitting if text is not None or one.name != longest), None)


# ---- splits ---------------------------------------------------------------------------------------------------


def split_by_content(
    rows: Sequence[tuple[str, str]], where: str, *, seed: int
) -> tuple[dict[str, list[int]], int]:
    """Divide rows into train, dev and test, each with its share of every label; a text is in one of them only.

    Args:
        rows: text and label of each (of free text an empty label).
        where: the file, for messages.
        seed: of the order, which depends on it and on the texts alone.

    Returns:
        Places of the rows by split, in the order of the rows; and how many were left out because their text came twice.

    Raises:
        UserError: too few rows.
    """
    first: dict[str, int] = {}
    for place, (text, _) in enumerate(rows):
        first.setdefault(text, place)
    if len(first) < FEWEST_ROWS:
        raise UserError(f"{where}: found {len(first)} different rows to use, expected at least {FEWEST_ROWS}; add some")
    by_label: dict[str, list[int]] = {}
    for place in sorted(first.values(), key=lambda place: _order(seed, rows[place][0])):
        by_label.setdefault(rows[place][1], []).append(place)
    made: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    for places in by_label.values():
        tests, devs = round(len(places) * TEST_SHARE), round(len(places) * DEV_SHARE)
        made["test"] += places[:tests]
        made["dev"] += places[tests : tests + devs]
        made["train"] += places[tests + devs :]
    for split in ("test", "dev"):  # of labels with few rows none was held out
        if not made[split]:
            made["train"].sort(key=lambda place: _order(seed, rows[place][0]))
            made[split].append(made["train"].pop())
    return {split: sorted(places) for split, places in made.items()}, len(rows) - len(first)


def _order(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()


# ---- what is written ------------------------------------------------------------------------------------------


def question_for(guess: Guess) -> str | None:
    """What to ask below a text; None where the text is a question itself."""
    asked = guess.label or guess.answer or ""
    if guess.conversation or (guess.label is None and (guess.text or "").lower() in ("question", "query", "input")):
        return None
    if asked.lower() in QUESTIONS:
        return QUESTIONS[asked.lower()]
    words = " ".join(asked.replace("_", " ").split()).lower()
    if guess.label is None:
        return f"What is the {words} to this text?" if words in ANSWER_NAMES else f"What is the {words} of this text?"
    if words in ("label", "labels", "class", "target", "tag", "type"):
        return "Which category does this text belong to?"
    return f"Which {words} does this text belong to?"


def labels_for(values: Iterable[str], names: Sequence[str] | None) -> Any:
    """``labels:`` of a draft: ``auto`` where the data have words, a list to edit where they have numbers.

    Args:
        values: of the label column, as they are.
        names: what a data set calls its numbers, if it does.
    """
    counts = Counter(value for value in values if value)
    if names is not None:
        return [{"value": str(n), "text": " ".join(name.replace("_", " ").split())} for n, name in enumerate(names)]
    if all(WHOLE.fullmatch(value) for value in counts):
        return [{"value": value, "text": value} for value in sorted(counts, key=int)]
    return "auto"


def free_text_settings(answers: Sequence[str]) -> dict[str, Any]:
    """Metric and longest answer of free text, by the answers that are there."""
    words = sum(len(answer.split()) for answer in answers) / max(1, len(answers))
    longest = max(map(len, answers), default=0)
    return {
        "metric": "exact_match" if words <= 3 else "rouge_l",
        "max_answer_tokens": min(512, max(8, -(-longest // 3))),
    }
