"""Writes two tasks whose answers are free text: ``python -m amlora_dist.tasks.demo.free_text [FOLDER]``.

Both read mails to the same support desk as the labelled tasks. ``mail_gist`` asks for the sentence that matters among
those that do not (ROUGE-L); ``mail_facts`` for the product and the order that are spoken of (token F1).
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from amlora_dist.tasks.demo.generate import SLOT, Dice, Grammar, allowed, as_lines

TASKS = ("mail_gist", "mail_facts")
ROWS = {"train": 240, "dev": 60, "test": 180}
FACTS = (
    "It is about order {order}.",
    "The order number is {order}.",
    "You will find it under {order}.",
    "Order {order}, if that helps.",
    "My order was {order}.",
    "See {order}.",
)
SUBJECTS = (
    "This is about my {product}.",
    "I am writing about the {product}.",
    "It concerns our {product}.",
    "The {product} again.",
)

_HERE = Path(__file__).parent
log = logging.getLogger(__name__)


def rows(task: str) -> dict[str, list[dict[str, str]]]:
    """Rows by split; no text stands twice, in any split."""
    grammar, make = Grammar("email_route"), _gist if task == "mail_gist" else _facts
    found: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS}
    seen: set[str] = set()
    for split, kept in found.items():
        dice = Dice(f"{task}|{split}")
        while len(kept) < ROWS[split]:
            row = make(grammar, dice, split == "train")
            if row["text"].lower() not in seen:
                seen.add(row["text"].lower())
                kept.append(row)
    return found


def _gist(grammar: Grammar, dice: Dice, training: bool) -> dict[str, str]:
    bound = _bound(grammar, dice)
    label = dice.pick(grammar.labels)
    matter = _filled(dice.pick(allowed(grammar.rules["issue"][label], training)), bound)
    others = [_filled(one, bound) for one in dice.shuffled(allowed(grammar.rules["aside"], training))[:2]]
    parts = [others[0], matter, others[1]] if dice.chance(0.6) else [*others, matter]
    return {"text": _mail(parts, bound, dice), "answer": matter}


def _facts(grammar: Grammar, dice: Dice, training: bool) -> dict[str, str]:
    bound = _bound(grammar, dice)
    label = dice.pick(grammar.labels)
    matter = _filled(dice.pick(allowed(grammar.rules["issue"][label], training)), bound)
    parts = [_filled(dice.pick(SUBJECTS), bound), matter, _filled(dice.pick(FACTS), bound)]
    return {"text": _mail(dice.shuffled(parts), bound, dice), "answer": f"{bound['product']}, {bound['order']}"}


def _mail(sentences: list[str], bound: dict[str, str], dice: Dice) -> str:
    opening = dice.pick(["Hello,", "Dear Lumora team,", "Good morning,", "Hi there,"])
    closing = dice.pick(["{name} {surname}", "Thanks, {name}", "Best wishes, {name}", "What can you do about it?"])
    return f"{opening}\n{' '.join(sentences)}\n{_filled(closing, bound)}"


def _bound(grammar: Grammar, dice: Dice) -> dict[str, str]:
    bound = {name: str(dice.pick(values)) for name, values in grammar.bindings.items()}
    return bound | {"thing": bound["product"].split()[-1]}


def _filled(wording: str, bound: dict[str, str]) -> str:
    text = SLOT.sub(lambda match: bound[match[1]], wording)
    return re.sub(r"^[a-z]", lambda match: match[0].upper(), text)


def write(folder: Path) -> list[Path]:
    """Write the six files; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task in TASKS:
        for split, content in rows(task).items():
            path = folder / f"{task}.{split}.jsonl"
            part = path.with_suffix(".part")
            part.write_text(as_lines(content), encoding="utf-8", newline="\n")
            part.replace(path)
            paths.append(path)
    return paths


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else _HERE):
        log.info("%s", written)
