"""Conversations as data files hold them: messages, prompt and completion, instruction and output, ShareGPT's turns.

One row is one conversation whose last turn is the assistant's, which is what is learned. Nothing here imports a tokenizer;
``chat`` makes token ids of turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from amlora_dist.errors import UserError
from amlora_dist.tasks.texts import NoTextError, kind_of, text_of

if TYPE_CHECKING:
    from amlora_dist.tasks.task import Columns

Role = Literal["system", "user", "assistant", "tool"]
TurnForm = Literal["messages", "conversations", "prompt", "instruction"]

_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
_SPEAKERS: dict[str, Role] = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's words for who speaks."""
FORMS: dict[TurnForm, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "conversations": (("conversations",), ()),
    "prompt": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input",)),
}
"""Columns that a form has, and those that it may have."""

FIRST_COLUMNS = tuple(needed[0] for needed, _ in FORMS.values())
"""The column that each form begins with: what a row that waits for its answer has."""

NO_ANSWER = "no assistant turn at its end"
NO_USER = "no user turn before its answer"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str


class BadTurnsError(ValueError):
    """A row that is no conversation to learn from; the message is the reason."""


def known_columns() -> list[str]:
    """Every column that ``columns: auto`` looks for."""
    return [name for needed, optional in FORMS.values() for name in (*needed, *optional)]


def recognised(present: Iterable[str], where: str) -> dict[str, str]:
    """The columns of the one form of conversation that rows with these columns have, as ``columns:`` would name them.

    Raises:
        UserError: none, or more than one; names what is there.
    """
    there = list(present)
    found = [form for form, (needed, _) in FORMS.items() if all(name in there for name in needed)]
    if len(found) == 1:
        needed, optional = FORMS[found[0]]
        return {name: name for name in (*needed, *(one for one in optional if one in there))}
    expected = "; ".join(", ".join(needed) for needed, _ in FORMS.values())
    what = f"columns of {len(found)} forms ({', '.join(found)})" if found else "no form that is known"
    names = ", ".join(map(str, there)) or "columns of other names"
    raise UserError(
        f"{where}: columns: auto: found {what} among {names}, expected one of: {expected}; name the columns of the task"
    )


def turns_of(values: Mapping[str, Any], columns: Columns) -> tuple[Turn, ...]:
    """The turns of a row; the last one is the assistant's, with a user's before it.

    Raises:
        BadTurnsError: why the row cannot be learned from.
    """
    if columns.messages is not None:
        turns = _listed(values.get(columns.messages), columns.messages)
    elif columns.conversations is not None:
        turns = _listed(values.get(columns.conversations), columns.conversations)
    elif columns.prompt is not None and columns.completion is not None:
        turns = _side(values.get(columns.prompt), columns.prompt, "user")
        turns += _side(values.get(columns.completion), columns.completion, "assistant")
    else:
        asked, more, output = columns.instruction or "", columns.input, columns.output or ""
        turns = _instruction(values, asked, more) + _side(values.get(output), output, "assistant")
    if not turns or turns[-1].role != "assistant":
        raise BadTurnsError(NO_ANSWER)
    if not any(turn.role == "user" for turn in turns[:-1]):
        raise BadTurnsError(NO_USER)
    return tuple(turns)


def waiting_turns(values: Mapping[str, Any], column: str | None = None) -> tuple[tuple[Turn, ...], str | None]:
    """The turns of a row that a bank is to answer, and the right answer where the row has one.

    A last turn of the assistant's (or ``completion``, or ``output``) is the right answer, and is not among the turns.

    Args:
        values: of the row.
        column: holds the list of turns; None: the form whose first column the row has.

    Raises:
        BadTurnsError: it is of no form, or no conversation that waits for an answer.
    """
    name = column or next((one for one in FIRST_COLUMNS if values.get(one) is not None), None)
    answer = None
    if name == "prompt" and column is None:
        turns, answer = _side(values["prompt"], "prompt", "user"), "completion"
    elif name == "instruction" and column is None:
        turns, answer = _instruction(values, "instruction", "input"), "output"
    elif name is not None:
        turns = _listed(values.get(name), name)
    else:
        raise BadTurnsError(f"none of the columns {', '.join(FIRST_COLUMNS)}")
    if answer is not None and values.get(answer) is not None:
        turns = [*turns, *_side(values[answer], answer, "assistant")]
    answer = turns[-1].text if turns and turns[-1].role == "assistant" else None
    before = turns if answer is None else turns[:-1]
    if not any(turn.role == "user" for turn in before):
        raise BadTurnsError(NO_USER)
    if before[-1].role not in ("user", "tool"):
        raise BadTurnsError(f"a last turn of role {before[-1].role}, expected the user's")
    return tuple(before), answer


def is_conversation(value: object) -> bool:
    """Whether a value is a list of turns, well-formed or not."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, (Mapping, Turn)) for one in value)


def messages_of(messages: Iterable[object]) -> tuple[Turn, ...]:
    """The turns of a conversation that waits for its answer, as callers give it: ``{"role": ..., "content": ...}`` each.

    Raises:
        UserError: what is no turn, and where; a conversation without a user's turn, or that ends in the assistant's.
    """
    try:
        turns = [
            one if isinstance(one, Turn) else _turn(one, f"turn {place} of messages")
            for place, one in enumerate(messages, start=1)
        ]
    except BadTurnsError as error:
        raise UserError(f"messages: found {error}") from None
    check_open(turns)
    return tuple(turns)


def check_open(turns: Sequence[Turn]) -> None:
    """Raises UserError where a conversation is not one that waits for an answer."""
    if not any(turn.role == "user" for turn in turns):
        raise UserError("messages: found no words of role user, expected a text to answer")
    if turns[-1].role not in ("user", "tool"):
        raise UserError(f"messages: found a last turn of role {turns[-1].role}, expected the user's")


def last_user(turns: Sequence[Turn]) -> int:
    """The place of the user's last turn. Raises ValueError where there is none."""
    return max(place for place, turn in enumerate(turns) if turn.role == "user")


def joined(turns: Sequence[Turn]) -> str:
    """Turns below each other, for prompts without roles."""
    return "\n".join(turn.text for turn in turns)


def content_of(content: object, where: str) -> str:
    """The text of a turn: itself, or its text parts one behind the other.

    Raises:
        BadTurnsError: another kind of part, or no text.
    """
    if isinstance(content, (list, tuple)):
        return "".join(_part(part, where) for part in content)
    try:
        return text_of("" if content is None else content)
    except NoTextError as error:
        raise BadTurnsError(f"{error} in {where}") from None


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        return content_of(part, where) if isinstance(part, str) else _refuse(f"{kind_of(part)} as a part of {where}")
    kind = part.get("type", "text")
    if kind != "text":
        return _refuse(f"a part of type {str(kind)[:40]!r} in {where}, only text is taken")
    return content_of(part.get("text"), where)


def _refuse(reason: str) -> str:
    raise BadTurnsError(reason)


def _listed(value: object, column: str) -> list[Turn]:
    if not isinstance(value, (list, tuple)):
        raise BadTurnsError(f"{kind_of(value)} in column {column!r}, expected a list of turns")
    return [_turn(one, f"turn {place} of {column!r}") for place, one in enumerate(value, start=1)]


def _turn(value: object, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise BadTurnsError(f"{kind_of(value)} as {where}, expected a role and a content")
    shared = value.get("from") is not None
    speaker, content = (value["from"], value.get("value")) if shared else (value.get("role"), value.get("content"))
    if speaker == "function_call" or any(value.get(key) for key in ("tool_calls", "function_call")):
        raise BadTurnsError(f"tool calls in {where}, only text is taken")
    role = (_SPEAKERS if shared else _ROLES).get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadTurnsError(f"an unknown role ({str(speaker)[:40]!r}) in {where}")
    text = content_of(content, where)
    if not text.strip():
        raise BadTurnsError(f"an empty content in {where}")
    return Turn(role, text)


def _side(value: object, column: str, role: Role) -> list[Turn]:
    """Prompt or completion: messages, or a text of this role."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise BadTurnsError(f"an empty list in column {column!r}")
        return _listed(value, column)
    text = content_of(value, f"column {column!r}")
    if not text.strip():
        raise BadTurnsError(f"an empty content in column {column!r}")
    return [Turn(role, text)]


def _instruction(values: Mapping[str, Any], instruction: str, more: str | None) -> list[Turn]:
    """What was asked, with the input below it."""
    asked = _side(values.get(instruction), instruction, "user")
    words = content_of(values.get(more), f"column {more!r}") if more is not None else ""
    return [*asked[:-1], Turn("user", f"{asked[-1].text}\n\n{words}")] if words.strip() else asked
