"""Writes three tasks of conversations: ``python -m amlora_dist.tasks.demo.conversations [FOLDER]``.

What a support desk has a model do all day: answer a question from the desk's own policy (``policy_answer``, a third of it
with a second question), say a curt draft politely (``polite_reply``), and note a mail's product, order and wish as JSON
(``order_note``). Rows are ``messages``; what is to be done is in the tasks' system turn, not in the user's words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amlora_dist.tasks.demo.free_text import FACTS, SUBJECTS
from amlora_dist.tasks.demo.generate import Dice, Grammar, allowed, filled, main, write_files

TASKS = ("policy_answer", "polite_reply", "order_note")
ROWS = {"train": 192, "dev": 30, "test": 120}

POLICIES: list[tuple[str, str, tuple[str, ...]]] = [
    ("Returns are taken within {days} days of delivery, unused and in the box.",
     "You can return it within {days} days of delivery, unused and in its box.",
     ("How long can I return something?", "Until when may I send it back?", "Can I still give the {thing} back?")),
    ("Refunds are paid within {few} working days, to the card that was used.",
     "The refund is paid within {few} working days, to the card you used.",
     ("When do I get my money back?", "How long does a refund take?", "Where does my refund go?")),
    ("The {product} has a warranty of {years} years.",
     "Your {product} has a warranty of {years} years.",
     ("How long is the warranty of my {thing}?", "Is the {product} still covered?", "What warranty do I have?")),
    ("Express delivery costs {euros} euros and takes {hours} hours.",
     "Express delivery costs {euros} euros and takes {hours} hours.",
     ("What does express delivery cost?", "How fast can you deliver?", "Is there a quicker delivery?")),
    ("Repairs take {weeks} weeks; a spare is lent for {euros} euros.",
     "A repair takes {weeks} weeks, and we lend you a spare for {euros} euros.",
     ("How long does a repair take?", "Can I have a spare while you repair it?", "When is my {thing} repaired?")),
    ("Orders can be cancelled until {clock} on the day they are placed.",
     "You can cancel the order until {clock} on the day you placed it.",
     ("Can I cancel my order?", "Until when can I call off the order?", "I changed my mind, is it too late?")),
    ("An address can be changed until {clock} on the day before delivery.",
     "You can change the address until {clock} on the day before delivery.",
     ("Can you deliver to another address?", "I moved, can I change the address?", "Until when can I change it?")),
    ("Gift cards are valid for {years} years and are not paid out.",
     "Your gift card is valid for {years} years, and we cannot pay it out.",
     ("How long is my gift card valid?", "Can I have the gift card in cash?", "Does a gift card run out?")),
]  # fmt: skip
"""A line of the policy, the answer it gives, and questions for it."""
NUMBERS: dict[str, tuple[str, ...]] = {
    "days": ("14", "21", "28", "30", "45", "60"), "few": ("3", "4", "5", "7", "10"), "years": ("2", "3", "4", "5"),
    "euros": ("5", "8", "9", "12", "15"), "hours": ("12", "24", "36", "48"), "weeks": ("2", "3", "4", "6"),
    "clock": ("noon", "2 pm", "4 pm", "6 pm"),
}  # fmt: skip
BLAME = [
    ("You used the wrong {thing}.", "It seems that another {thing} was used."),
    ("Your {thing} is not broken.", "We are glad to say that your {thing} works as it should."),
    ("You gave us a wrong number.", "It seems that the number has a small mistake."),
    ("You waited too long.", "Unfortunately the time for this has passed."),
    ("We told you that already.", "As we mentioned before, we are happy to explain it again."),
    ("That is not our fault.", "We are sorry that this happened to you."),
    ("You did not pay.", "We have not seen your payment yet."),
    ("Nobody was at home on {day}.", "We are sorry that we missed you on {day}."),
    ("The {product} is sold out.", "Unfortunately the {product} is not available at the moment."),
    ("You broke the {thing} yourself.", "The {thing} seems to have been damaged by accident."),
    ("We cannot read your mail.", "We had some trouble reading your mail."),
    ("Order {order} does not exist.", "We could not find order {order}."),
    ("Your parcel is late.", "We are sorry that your parcel is late."),
    ("You forgot the receipt.", "The receipt seems to be missing."),
]
DEMAND = [
    ("Send it back.", "Could you please send it back to us?"),
    ("Read the manual.", "Could you please have a look at the manual?"),
    ("Pay now.", "Could you please pay in the next days?"),
    ("Wait.", "Could you please give us a little more time?"),
    ("Call again on {day}.", "Could you please call us again on {day}?"),
    ("Send a photo.", "Could you please send us a photo?"),
    ("Check the number.", "Could you please check the number once more?"),
    ("Take another one.", "May we offer you another one?"),
    ("Tell us your address.", "Could you please tell us your address?"),
    ("Fill in the form.", "Could you please fill in the form?"),
    ("Stop writing to us.", "We will come back to you as soon as we can."),
    ("Ask the shop.", "Could you please ask the shop where you bought it?"),
]
OPENINGS = ("Dear {name}, ", "Hello {name}, ", "")
WISHES: dict[str, tuple[str, ...]] = {
    "refund": ("I want my money back.", "Please refund me.", "I would like to be paid back.", "Return what I paid."),
    "replacement": ("Please send me a new one.", "I need another one.", "Could you exchange it?", "I want it replaced."),
    "repair": ("Can you repair it?", "Please fix it.", "I would like to have it mended.", "It should be put right."),
    "call": ("Please call me.", "Ring me when you know more.", "I would rather talk about it.", "Phone me, please."),
}


Turns = list[dict[str, str]]


def rows(task: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by split; no conversation is there twice, in any split."""
    make = {"policy_answer": _policy, "polite_reply": _polite, "order_note": _note}[task]
    grammar = Grammar("email_route")
    found: dict[str, list[dict[str, Any]]] = {split: [] for split in ROWS}
    seen: set[str] = set()
    for split, made in found.items():
        dice = Dice(f"{task}|{split}")
        while len(made) < ROWS[split]:
            turns = make(grammar, dice, split == "train")
            text = turns[-2]["content"] + turns[0]["content"]
            if text not in seen:
                seen.add(text)
                made.append({"messages": turns})
    return found


def _policy(grammar: Grammar, dice: Dice, training: bool) -> Turns:
    """Two thirds one question behind the policy, a third a second one after the answer."""
    bound = grammar.bound(dice) | {name: dice.pick(values) for name, values in NUMBERS.items()}
    chosen = dice.shuffled(POLICIES)[:3]
    policy = "\n".join(f"- {filled(line, bound)}" for line, _, _ in chosen)
    turns: Turns = []
    for place, (_, answer, questions) in enumerate(dice.shuffled(chosen)[: 2 if dice.chance(1 / 3) else 1]):
        question = filled(dice.pick(questions[: 2 if training else 3]), bound)
        turns.append(_turn("user", f"{policy}\n{question}" if place == 0 else question))
        turns.append(_turn("assistant", filled(answer, bound)))
    return turns


def _polite(grammar: Grammar, dice: Dice, _training: bool) -> Turns:
    bound = grammar.bound(dice)
    opening = filled(dice.pick(OPENINGS), bound)
    pairs = [dice.pick(BLAME), dice.pick(DEMAND)]
    if dice.chance(0.3):
        pairs.insert(1, dice.pick([pair for pair in BLAME if pair is not pairs[0]]))
    curt, kind = (" ".join(filled(pair[side], bound) for pair in pairs) for side in (0, 1))
    return [_turn("user", f"{opening}{curt}"), _turn("assistant", f"{opening}{kind} Thank you very much.")]


def _note(grammar: Grammar, dice: Dice, training: bool) -> Turns:
    bound = grammar.bound(dice)
    wish = dice.pick(sorted(WISHES))
    label = dice.pick(grammar.labels)
    parts = [
        filled(dice.pick(SUBJECTS), bound), filled(dice.pick(allowed(grammar.rules["issue"][label], training)), bound),
        filled(dice.pick(FACTS), bound), dice.pick(WISHES[wish][: 3 if training else 4]),
    ]  # fmt: skip
    mail = f"{dice.pick(['Hello,', 'Good morning,', 'Hi there,'])}\n{' '.join(dice.shuffled(parts))}\n{bound['name']}"
    note = json.dumps({"product": bound["product"], "order": bound["order"], "wish": wish})
    return [_turn("user", mail), _turn("assistant", note)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(folder: Path) -> list[Path]:
    """Write the nine files."""
    return write_files(
        folder, {f"{task}.{split}.jsonl": content for task in TASKS for split, content in rows(task).items()}
    )


if __name__ == "__main__":
    main(write)
