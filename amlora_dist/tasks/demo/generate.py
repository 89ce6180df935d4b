"""Writes the demo stream: ``python -m amlora_dist.tasks.demo.generate [FOLDER]``.

Four sources of text of one support desk, each with its task, from the grammars in ``grammar/*.yaml``. Two things keep
word counts from being enough, as in real life: all sources speak of the same products and the same trouble, and every
label's words are also in texts of other labels (settled matters, irony, side issues). Moreover each fifth phrase
is held out for the dev and test splits. ``tests/tasks/test_demo.py`` measures how far word counts get.

The output depends on nothing but the grammars and ``SEED``: the same on every machine and Python version.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from amlora_dist.files import write_bytes

SEED = 20240919
TASKS = ("email_route", "chat_mood", "call_urgency", "review_topic")
ROWS = {"train": 240, "dev": 60, "test": 180}
WORDS = (15, 60)
"""Fewest and most words of a text."""
HELD_OUT = 5
"""Each ``HELD_OUT``-th phrase of a long list is never used in training rows."""
LONG_LIST = 12

_HERE = Path(__file__).parent
SLOT = re.compile(r"\{(\w+)\}")
_SHORT = {"you": "u", "please": "pls", "thanks": "thx", "because": "cause", "tomorrow": "tmrw", "really": "rly"}
_NOTES = {"Caller": "Cust.", "with": "w/", "without": "w/o", "tomorrow": "tmrw", "minutes": "min", "euros": "EUR"}

_START = re.compile(r"(^|[.!?] |\n)([a-z])")
_CLAUSE = re.compile(r"((?:\b(?:But|Yet|yet|but|so|now)|[,:]) )([A-Z][\w']*)")
"""A clause that goes on after such a word or mark begins with a small letter, but for the words in ``_CAPITALS``."""

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Dice:
    """A seeded choice that uses only ``random()``, whose stream Python guarantees to stay as it is."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(f"{SEED}|{name}")

    def pick(self, items: Sequence[_T]) -> _T:
        return items[int(self._random.random() * len(items))]

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        keyed = [(self._random.random(), place) for place in range(len(items))]
        return [items[place] for _, place in sorted(keyed)]


class Grammar:
    """The rules of one task together with the common ones.

    A rule is a list of phrases, or a mapping from label to such a list. Slots ``{name}`` are filled by bindings
    (chosen once for a text) or rules. ``settled`` and ``minor`` are taken from a label other than the row's.
    """

    elsewhere = ("settled", "minor")

    def __init__(self, task: str) -> None:
        common, own = _read("common"), _read(task)
        self.labels: list[str] = own["labels"]
        self.style: str = own.get("style", "plain")
        self.forms: list[str] = own["forms"]
        self.bindings: dict[str, list[str]] = common["bindings"]
        matter = [issue for issues in _read("email_route")["rules"]["issue"].values() for issue in issues]
        self.rules: dict[str, Any] = {**common["rules"], "matter": matter, **own["rules"]}

    def bound(self, dice: Dice) -> dict[str, str]:
        """What the bindings stand for in one text."""
        bound = {name: str(dice.pick(values)) for name, values in self.bindings.items()}
        return bound | {"thing": bound["product"].split()[-1]}

    def text(self, label: str, dice: Dice, *, training: bool) -> str:
        """One text for a label."""
        bound = self.bound(dice)
        others = dice.shuffled([other for other in self.labels if other != label])
        used: set[str] = set()

        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name in bound:
                return bound[name]
            rule = self.rules[name]
            if isinstance(rule, dict):
                rule = rule[others.pop() if name in self.elsewhere else label]
            phrases = [one for one in allowed(rule, training) if not one or one not in used]
            phrase = dice.pick(phrases)
            used.add(phrase)
            return SLOT.sub(fill, phrase)

        return _finished(SLOT.sub(fill, dice.pick(self.forms)), self.style, dice)


@cache
def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_HERE / "grammar" / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


_COMMON = _read("common")["bindings"]
_CAPITALS = {"I", "I'd", "I've", "I'm", "Lumora", "Christmas"}.union(
    *(
        {word.split(" ")[0] for word in _COMMON[name]}
        for name in ("product", "name", "surname", "day", "month", "order")
    )
)


def allowed(phrases: list[str], training: bool) -> list[str]:
    """Phrases that a split may use: training rows do not get each ``HELD_OUT``-th of a long list."""
    if not training or len(phrases) < LONG_LIST:
        return phrases
    return [one for place, one in enumerate(phrases, start=1) if place % HELD_OUT]


def _finished(text: str, style: str, dice: Dice) -> str:
    text = re.sub(r"[ ]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text).strip()
    text = _CLAUSE.sub(lambda m: m[0] if m[2] in _CAPITALS else m[1] + m[2][0].lower() + m[2][1:], text)
    if style == "chat":
        return _typed_fast(text, dice)
    if style == "note":
        text = _jotted(text, dice)
    return _START.sub(lambda match: match[1] + match[2].upper(), text)


def _jotted(text: str, dice: Dice) -> str:
    """Telegraphic: most full stops become semicolons or dashes, some words short."""
    mark = dice.pick([". ", "; ", " - ", "; "])
    parts = text.rstrip(".").split(". ")
    if mark != ". ":
        parts = parts[:1] + [
            part if part.split(" ")[0] in _CAPITALS else part[0].lower() + part[1:] for part in parts[1:]
        ]
    text = mark.join(parts)
    if dice.chance(0.35):
        text = " ".join(_NOTES.get(word, word) for word in text.split(" "))
    return text


def _typed_fast(text: str, dice: Dice) -> str:
    """Small letters, now and then a short form, a lost apostrophe or two letters the wrong way round."""
    if dice.chance(0.15):
        return _START.sub(lambda match: match[1] + match[2].upper(), text)
    words = text.lower().split(" ")
    for place, word in enumerate(words):
        if dice.chance(0.3):
            words[place] = _SHORT.get(word, word)
        if "'" in word and dice.chance(0.5):
            words[place] = word.replace("'", "")
        elif len(word) > 5 and word.isalpha() and dice.chance(0.05):
            at = 1 + int(dice.pick(range(len(word) - 3)))
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def rows() -> dict[str, list[dict[str, str]]]:
    """All rows by file name. No text is there twice, in any case or task; labels are as even as the counts allow."""
    files: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for task in TASKS:
        grammar = Grammar(task)
        for split, count in ROWS.items():
            dice = Dice(f"{task}|{split}")
            labels = dice.shuffled([grammar.labels[place % len(grammar.labels)] for place in range(count)])
            files[f"{task}.{split}.jsonl"] = [
                {"text": _new_text(grammar, label, dice, seen, training=split == "train"), "label": label}
                for label in labels
            ]
    return files


def _new_text(grammar: Grammar, label: str, dice: Dice, seen: set[str], *, training: bool) -> str:
    for _ in range(1000):
        text = grammar.text(label, dice, training=training)
        if WORDS[0] <= len(text.split()) <= WORDS[1] and text.lower() not in seen:
            seen.add(text.lower())
            return text
    raise RuntimeError(f"the grammar of label {label!r} gives no new text of {WORDS[0]} to {WORDS[1]} words")


def write(folder: Path) -> list[Path]:
    """Write the twelve files."""
    return write_files(folder, rows())


def filled(phrase: str, bound: dict[str, str]) -> str:
    """A phrase with its slots filled, beginning with a capital letter."""
    text = SLOT.sub(lambda match: bound[match[1]], phrase)
    return re.sub(r"^[a-z]", lambda match: match[0].upper(), text)


def write_files(folder: Path, contents: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Write rows as JSON lines, by file name; each file appears whole or not at all."""
    for name, content in contents.items():
        write_bytes(folder / name, as_lines(content).encode())
    return [folder / name for name in contents]


def as_lines(content: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines, as they are shipped."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)


def main(write: Callable[[Path], list[Path]]) -> None:
    """Write to the folder that the command line names, or next to this file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else _HERE):
        log.info("%s", written)


if __name__ == "__main__":
    main(write)
