"""Writes two tasks whose answers are free text: ``python -m amlora_dist.tasks.demo.free_text [FOLDER]``.

Both read mails to the same support desk as the labelled tasks. ``mail_gist`` asks for the sentence that matters among
those that do not (ROUGE-L); ``mail_facts`` for the product and the order that are spoken of (token F1).
"""

from __future__ import annotations

from pathlib import Path

from amlora_dist.tasks.demo.generate import Dice, Grammar, allowed, filled, main, write_files

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



def rows(task: str) -> dict[str, list[dict[str, str]]]:
    """Rows by split; no text is there twice, in any split."""
    grammar, make = Grammar("email_route"), _gist if task == "mail_gist" else _facts
    found: dict[str, list[dict[str, str]]] = {split: [] for split in ROWS}
    seen: set[str] = set()
    for split, made in found.items():
        dice = Dice(f"{task}|{split}")
        while len(made) < ROWS[split]:
            row = make(grammar, dice, split == "train")
            if row["text"].lower() not in seen:
                seen.add(row["text"].lower())
                made.append(row)
    return found


def _gist(grammar: Grammar, dice: Dice, training: bool) -> dict[str, str]:
    bound = grammar.bound(dice)
    label = dice.pick(grammar.labels)
    matter = filled(dice.pick(allowed(grammar.rules["issue"][label], training)), bound)
    others = [filled(one, bound) for one in dice.shuffled(allowed(grammar.rules["aside"], training))[:2]]
    parts = [others[0], matter, others[1]] if dice.chance(0.6) else [*others, matter]
    return {"text": _mail(parts, bound, dice), "answer": matter}


def _facts(grammar: Grammar, dice: Dice, training: bool) -> dict[str, str]:
    bound = grammar.bound(dice)
    label = dice.pick(grammar.labels)
    matter = filled(dice.pick(allowed(grammar.rules["issue"][label], training)), bound)
    parts = [filled(dice.pick(SUBJECTS), bound), matter, filled(dice.pick(FACTS), bound)]
    return {"text": _mail(dice.shuffled(parts), bound, dice), "answer": f"{bound['product']}, {bound['order']}"}


def _mail(sentences: list[str], bound: dict[str, str], dice: Dice) -> str:
    opening = dice.pick(["Hello,", "Dear Lumora team,", "Good morning,", "Hi there,"])
    closing = dice.pick(["{name} {surname}", "Thanks, {name}", "Best wishes, {name}", "What can you do about it?"])
    return f"{opening}\n{' '.join(sentences)}\n{filled(closing, bound)}"


def write(folder: Path) -> list[Path]:
    """Write the six files."""
    return write_files(
        folder, {f"{task}.{split}.jsonl": content for task in TASKS for split, content in rows(task).items()}
    )


if __name__ == "__main__":
    main(write)
