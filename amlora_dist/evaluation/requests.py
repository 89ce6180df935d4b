"""Texts on their way through a bank: requests, their prompts and batches, and what comes back.

Shapes: B prompts, T tasks, N adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from amlora_dist.adapters.adapted_layers import NO_PREFIX, Prefix
from amlora_dist.adapters.adapter import rows
from amlora_dist.errors import UserError
from amlora_dist.evaluation.field_texts import check_words, fields_for, joined_text, refuse_missing
from amlora_dist.evaluation.label_plan import LabelPlan, plan_labels
from amlora_dist.evaluation.locked_tokenizer import LockedTokenizer
from amlora_dist.tasks.batches import Example, answer_tokens, collate_prompts, prompt_tokens
from amlora_dist.tasks.chat import ChatPrompts, ChatTemplate, answer_ids
from amlora_dist.tasks.conversations import Turn, check_open, is_conversation, joined, messages_of
from amlora_dist.tasks.prompt_format import PromptFormat, TextPrompts, special_ends, text_ids
from amlora_dist.tasks.prompts import BANK_CHAT_TEMPLATE, PromptTemplate
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.special_tokens import special_tokens
from amlora_dist.tasks.task_entry import TaskEntry
from amlora_dist.tasks.texts import is_blank

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_ANSWER_TOKENS = 32
MAX_PROMPT_TOKENS = 10_000_000
"""What the manifest's format allows; a model with a limit of its own has less."""
PLANS = 32
"""Sets of labels that stay planned."""
RAW_TEMPLATE = "{{ text }}"


@dataclass(frozen=True, slots=True)
class Route:
    """How a text was weighed."""

    tasks: dict[str, float]
    """Weight of each task's row, in the bank's order; exact zeros stay in."""
    adapters: dict[str, float]
    """Weight of the adapter that each task trained, mean over the adapted layers: a row uses earlier adapters too."""
    abstention: float
    """What the tasks lack to 1: the share of the zero adapter, which adds nothing."""

    @property
    def task(self) -> str | None:
        """The strongest task; None where none has any weight."""
        best = max(self.tasks, key=self.tasks.__getitem__, default=None)
        return best if best is not None and self.tasks[best] > 0 else None

    def to_mapping(self) -> dict[str, Any]:
        """JSON values, the strongest task first among them."""
        return {"task": self.task, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote."""

    text: str
    ended: bool
    """Whether it came to its end within the limit of new tokens."""
    route: Route


@dataclass(frozen=True, slots=True)
class Classification:
    """Which label a text has."""

    label: str | None
    """None where there are no labels to choose from: the text belongs to no task, or to one with free-text answers."""
    task: str | None
    """Whose labels and prompt were used; None where the caller gave labels and no task, and where a bank without keys chose
    among the labels of all tasks."""
    scores: dict[str, float]
    """Share of each label: softmax over what the evidence says of each."""
    route: Route
    foreign: float | None = None
    """How much more the text looks like the background than like the bank's tasks, log odds; None without a background."""


@dataclass(slots=True)
class Request:
    """One text on its way through the model."""

    place: int
    text: str
    question: str | None = None
    task: str | None = None
    """Named by the caller, or chosen by the router; its prompt is used."""
    labels: tuple[str, ...] | None = None
    gate: Tensor | None = None
    """(T,) fp32; None: the router weighs it in the same pass."""
    raw: bool = False
    """The text is the prompt: no template is put around it, and it is never cut."""
    free: bool = False
    """Write freely, whatever task it is."""
    new_tokens: int | None = None
    """Of an answer that is written, at most, by its caller's word; None: what the answers of its task need."""
    tokens: tuple[int, ...] = ()
    """Of the prompt."""
    top: int | None = None
    """How many of the likeliest tokens are named next to each of the answer's; None: nobody asks for log probabilities."""
    echo: bool = False
    """Of a raw prompt: its own tokens are scored too."""
    text_ids: tuple[int, ...] = ()
    """Prompt format 2: of the text alone, behind the tokenizer's special tokens."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation: all of it up to the answer; ``text`` is what the user said last."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """By name, those that ``text`` was put together of, for templates that read them; empty: nobody named any."""
    unasked: bool | None = None
    """Of a row that is scored and was told no task (else None): whether the prompt of the task that it was routed to cannot
    be made of it. Servers refuse such a text; its passes are made behind the bank's own prompt, and it counts as wrong."""
    reused: int | None = None
    """How many of ``text_ids`` the prompt begins with, whose pass is not made again; None: it does not begin with them."""
    span: tuple[int, int] | None = None
    """Prompt format 2: where the text is in ``tokens``, which is what a router of whole prompts reads; None: all of them."""


TextOrTurns = str | Mapping[str, str] | Sequence[Mapping[str, Any] | Turn]
"""A plain text, its fields by name, or a conversation that waits for its answer: ``{"role": ..., "content": ...}`` each."""
RouteBy = Literal["turn", "conversation"]
"""What routes a turn of a conversation: what the user said last, or what they said first, which keeps its route."""


@dataclass(frozen=True, slots=True)
class Query:
    """A text, its fields or a conversation as a bank is asked it."""

    text: str
    """What the router reads."""
    question: str | None = None
    turns: tuple[Turn, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


class Prompter:
    """Texts to token ids, by the bank's template or a task's own. Safe for several threads.

    A tokenizer of the ``tokenizers`` library may change its own settings in a call, and fails when two threads do so
    at once: hence the lock.
    """

    def __init__(
        self,
        entries: Mapping[str, TaskEntry | None],
        bank_template: str,
        tokenizer: Any,
        *,
        encoder_decoder: bool,
        positions: int | None,
        prompt_format: PromptFormat,
        prefix: Prefix = NO_PREFIX,
        learned: Mapping[str, TaskEntry | None] | None = None,
    ) -> None:
        self.entries = dict(entries)
        of_all = self.entries if learned is None else learned  # one adapter may have learned several tasks
        self.learned = {name: entry for name, entry in of_all.items() if entry is not None}
        """What is known of the tasks whose rows the bank has learned."""
        self.bank_template = bank_template
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.format = prompt_format
        self.prefix = prefix
        self.ends = special_ends(tokenizer, encoder_decoder)
        self._positions = None if encoder_decoder else positions
        self.chat_bank = bool(self.learned) and all(entry.chat for entry in self.learned.values())
        """Whether texts of no task are asked in the base model's chat template too: as those of every task are."""
        self._made: dict[str | None, TextPrompts | ChatPrompts] = {}
        self._limits: dict[str | None, int] = {}
        self._lock = threading.Lock()
        self._one_at_a_time = LockedTokenizer(tokenizer, self._lock)
        self._chat: ChatTemplate | None = None
        self._plan: Callable[[tuple[str, ...], bool], LabelPlan] = lru_cache(PLANS)(self._planned)

    def is_chat(self, task: str | None) -> bool:
        """Whether texts of a task (None: of no task) are asked in the base model's chat template."""
        entry = None if task is None else self.entries.get(task)
        return self.chat_bank if entry is None else entry.chat

    @property
    def converses(self) -> bool:
        """Whether any of its tasks is asked in turns."""
        return any(entry.chat for entry in self.learned.values())

    def all_labels(self, tasks: Collection[str] | None = None) -> tuple[str, ...]:
        """Labels of all of these tasks that have some (None: of all that the bank has learned), equal words once."""
        entries = [entry for name, entry in self.learned.items() if tasks is None or name in tasks]
        return tuple(dict.fromkeys(label for entry in entries for label in entry.labels or ()))

    def plan(self, labels: tuple[str, ...], task: str | None = None) -> LabelPlan:
        """How labels are ranked behind the prompt of a task, worked out once for those that were asked for lately.

        Raises:
            UserError: two of them are the same to the tokenizer, or one is nothing.
        """
        return self._plan(labels, self.is_chat(task))

    def entry(self, task: str) -> TaskEntry:
        """What the bank knows of a task.

        Raises:
            UserError: no such task, or the bank does not describe it.
        """
        if task not in self.entries:
            raise UserError(f"task: found {task!r}, the bank's tasks are {', '.join(self.entries)}")
        entry = self.entries[task]
        if entry is None:
            raise UserError(f"the bank does not describe task {task!r}; give labels (and a question) with the call")
        return entry

    def labels_of(self, task: str) -> list[str]:
        """Labels of a task that has some.

        Raises:
            UserError: its answers are free text.
        """
        found = self.entry(task).labels
        if found is None:
            raise UserError(f"task {task!r} has free-text answers, no labels: give labels, or use answer()")
        return found

    def asked(self, turns: Sequence[Turn], route_by: RouteBy = "turn") -> Query:
        """A conversation as this bank is asked it: in turns where any of its tasks is; where none is, what user and
        assistant said is the text, each below the other, and what the system said is the question.

        Raises:
            UserError: nobody says anything, or a conversation in turns does not end in the user's.
        """
        if route_by not in get_args(RouteBy):
            raise UserError(f"route_by: found {route_by!r}, expected one of {', '.join(get_args(RouteBy))}")
        spoken = [turn for turn in turns if turn.text.strip()]
        if self.converses:
            check_open(spoken)
            users = [turn.text for turn in spoken if turn.role == "user"]
            return Query(users[-1] if route_by == "turn" else users[0], None, tuple(spoken))
        words = [turn for turn in spoken if turn.role != "system"]
        if all(turn.role == "tool" for turn in words):
            raise UserError("messages: found no words of role user, expected a text to answer")
        return Query(joined(words), joined([turn for turn in spoken if turn.role == "system"]) or None)

    def query(self, given: TextOrTurns, route_by: RouteBy = "turn", task: str | None = None) -> Query:
        """A plain text, named fields (of ``task``, if its caller names one) or a conversation, as this bank is asked it.
        Raises UserError as ``asked``, ``messages_of`` and ``field_texts.joined_text``."""
        if isinstance(given, Mapping):
            text, fields = joined_text(given, self.learned, task)
            return Query(text, fields=fields)
        if isinstance(given, str) or not is_conversation(given):
            return Query(given)  # type: ignore[arg-type]  # what is no text is refused where it is read
        return self.asked(messages_of(given), route_by)

    def template(self, task: str | None, question: str | None) -> PromptTemplate:
        """The prompt of a task, or of the bank when no task is named (or it is not described)."""
        if task is not None and self.entries.get(task) is not None:
            return self.entry(task).prompt(task, question)
        return PromptTemplate(BANK_CHAT_TEMPLATE if self.chat_bank else self.bank_template, question=question)

    def read(self, requests: Sequence[Request]) -> None:
        """Set ``text_ids`` of each request: what is read of its text before anybody knows its task.

        Raises:
            UserError: an empty text, or what is no text.
        """
        self._check(requests)
        found = text_ids([request.text for request in requests], self._one_at_a_time, self.format.text_tokens)
        for request, ids in zip(requests, found, strict=True):
            request.text_ids = (*self.ends.before, *ids, *self.ends.after)

    def ask(self, request: Request, *, new_tokens: int, max_length: int | None = None) -> None:
        """Set ``tokens`` and ``reused`` of a request that was read: the prompt of its task around its text.

        Raises:
            UserError: no room for the question and an answer; a template that reads fields which the text has not.
        """
        room = MAX_PROMPT_TOKENS if self._positions is None else self._positions - new_tokens
        if room < 1:
            raise UserError(f"found {new_tokens} new tokens asked for, the model has room for {self._positions} in all")
        limit = min(max_length or self._prompt_limit(request.task), room)
        first = len(self.ends.before)
        prompts = self._prompts(request.task, request.question)
        words = [turn for turn in request.turns if turn.role != "system"]
        text = joined(words) if words and isinstance(prompts, TextPrompts) else request.text
        fields = fields_for(request.task, self.entries, text, request.fields)
        if isinstance(prompts, ChatPrompts):
            turns = request.turns or (Turn("user", request.text),)
            prompt = prompts.prompt(turns, limit, fields=fields)[0]
            request.tokens, request.reused, request.span = prompt.ids, None, prompt.span
            return
        if request.turns:  # a task without turns is asked of all that was said
            asked = joined([turn for turn in request.turns if turn.role == "system"])
            prompts = self._prompts(request.task, request.question or asked or None)
            assert isinstance(prompts, TextPrompts)
            (ids,) = text_ids([text], self._one_at_a_time, self.format.text_tokens)
            prompt = prompts.prompt(ids, limit, text=text, fields=fields)
            request.tokens, request.reused, request.span = prompt.ids, None, prompt.span
            return
        own = request.text_ids[first : len(request.text_ids) - len(self.ends.after)]
        prompt = prompts.prompt(own, limit, text=request.text, fields=fields)
        request.tokens, request.span = prompt.ids, prompt.span
        begins = prompt.span is not None and prompt.span[0] == first and prompt.ids[:first] == self.ends.before
        request.reused = prompt.span[1] if begins and prompt.span is not None else None

    def _prompts(self, task: str | None, question: str | None) -> TextPrompts | ChatPrompts:
        if question is None and task in self._made:
            return self._made[task]
        # The template is rendered outside of the lock: a bank's own may take its time, and decoding needs the lock.
        chat, where = self.is_chat(task), task or "the bank"
        # A question of the task's own is its author's; another one is a user's text. A turn is guarded as a whole.
        guarded = question if question is None or chat else special_tokens(self._one_at_a_time).guarded(question)
        template = self.template(task, guarded)
        made: TextPrompts | ChatPrompts
        if chat:
            entry = None if task is None else self.entries.get(task)
            made = ChatPrompts(template, self._template_of_chat(), None if entry is None else entry.system, where)
        else:
            made = TextPrompts(template, self._one_at_a_time, self.encoder_decoder, where)
        if question is None:
            self._made[task] = made
        return made

    def _template_of_chat(self) -> ChatTemplate:
        if self._chat is None:
            self._chat = ChatTemplate(self._one_at_a_time)
        return self._chat

    @staticmethod
    def _check(requests: Sequence[Request]) -> None:
        for request in requests:
            for name, words in (("text", request.text), ("question", request.question)):
                if words is not None or name == "text":
                    check_words(words, name, request.place, len(requests))
            if is_blank(request.text):
                raise UserError(f"text {request.place + 1} of {len(requests)} is empty; leave it out or give it words")

    def fill(self, requests: Sequence[Request], *, new_tokens: int, max_length: int | None = None) -> None:
        """Set ``tokens`` of each request; texts too long for the model or for ``max_length`` tokens are cut.

        Raises:
            UserError: an empty text or what is no text, no room for question and answer, a raw prompt too long for the
                model; RefusedTextsError: prompts that read fields which their texts have not.
        """
        groups: dict[tuple[str | None, str | None, bool], list[Request]] = {}
        self._check(requests)
        refuse_missing([request for request in requests if not request.raw], self.entries)
        if self.format.text_alone:
            plain = [request for request in requests if not request.raw]
            self.read(plain)
            for request in plain:
                self.ask(request, new_tokens=new_tokens + self.prefix.tokens, max_length=max_length)
                if self.prefix.tokens:
                    request.tokens, request.span = self.prefix.before(request.tokens), None
            requests = [request for request in requests if request.raw]
        for request in requests:
            groups.setdefault((request.task, request.question, request.raw), []).append(request)
        room = MAX_PROMPT_TOKENS if self._positions is None else self._positions - new_tokens - self.prefix.tokens
        for (task, question, raw), group in groups.items():
            limit = MAX_PROMPT_TOKENS if raw else min(max_length or self._prompt_limit(task), room)
            named = None if raw else task
            fields = [dict(fields_for(named, self.entries, one.text, one.fields) or {}) for one in group]
            given = [Row(n, own, one.text, None, "") for n, (one, own) in enumerate(zip(group, fields, strict=True), 1)]
            template = PromptTemplate(RAW_TEMPLATE) if raw else self.template(task, question)
            # The template is rendered outside of the lock: a bank's own may take its time, and decoding needs the lock.
            found = prompt_tokens(
                given, template, self._one_at_a_time, limit, self.encoder_decoder, task or "(none named)"
            )
            for request, tokens in zip(group, found, strict=True):
                self._check_room(len(tokens), new_tokens)
                request.tokens = self.prefix.before(tokens)

    def take(self, request: Request, tokens: Sequence[int], *, new_tokens: int) -> None:
        """Set ``tokens`` of a raw request to those that its caller brings.

        Raises:
            UserError: a token that the tokenizer does not have, or more than the model has room for.
        """
        most = len(self.tokenizer)
        if odd := [token for token in tokens if not 0 <= token < most]:
            raise UserError(f"prompt: found token {odd[0]}, expected 0 to {most - 1}, as the model's tokenizer has them")
        self._check_room(len(tokens), new_tokens)
        request.tokens = self.prefix.before(tuple(tokens))

    def _check_room(self, length: int, new_tokens: int) -> None:
        room = MAX_PROMPT_TOKENS if self._positions is None else self._positions - new_tokens - self.prefix.tokens
        if length > room:
            raise UserError(
                f"the prompt has {length} tokens; with {new_tokens} new ones the model has room for {room}"
            )

    def labels(self, texts: Sequence[str], *, chat: bool = False) -> list[tuple[int, ...]]:
        """Token ids of labels, without end-of-sequence; ``chat``: as turns of the assistant. Raises UserError for a label
        that is no text, or has no words."""
        for place, text in enumerate(texts):
            check_words(text, "label", place, len(texts))
            if is_blank(text):
                raise UserError(f"label {place + 1} of {len(texts)} is empty; leave it out or give it words")
        if chat:
            return [answer_ids(self._template_of_chat(), text) for text in texts]
        with self._lock:
            split = self.format.text_alone
            return [answer_tokens(text, self.tokenizer, self.encoder_decoder, split=split) for text in texts]

    def _planned(self, labels: tuple[str, ...], chat: bool) -> LabelPlan:
        return plan_labels(self.labels(labels, chat=chat), int(self.tokenizer.eos_token_id))

    def decode(self, tokens: Sequence[int]) -> str:
        """An answer's text."""
        with self._lock:
            text: str = self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text.strip()

    def words_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens as they are, special ones too."""
        with self._lock:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def answer_limit(self, task: str | None) -> int:
        """New tokens that an answer may need: the task's, or the most that any task of the bank needs."""
        if task not in self._limits:
            self._limits[task] = self._needed(task)
        return self._limits[task]

    def limit_of(self, request: Request) -> int:
        """New tokens that an answer may have which is written for a request that was routed: those that its caller allows,
        else those that its task needs."""
        return request.new_tokens or self.answer_limit(request.task)

    def _needed(self, task: str | None) -> int:
        asked = [self.entries.get(task)] if task is not None else list(self.learned.values())
        limits = [
            1 + max(map(len, self.labels(entry.labels, chat=entry.chat))) if entry.labels else entry.max_answer_tokens
            for entry in asked
            if entry is not None
        ]
        return max(limits, default=DEFAULT_ANSWER_TOKENS)

    def _prompt_limit(self, task: str | None) -> int:
        asked = [self.entries.get(task)] if task is not None else list(self.learned.values())
        return max((entry.max_length for entry in asked if entry is not None), default=DEFAULT_PROMPT_TOKENS)


def check_counts(batch_size: object, new_tokens: object = None) -> None:
    """Raises UserError where texts of a pass, or new tokens of an answer (None: as many as it needs), are no count."""
    for name, value, least in (("batch_size", batch_size, 1), ("max_new_tokens", new_tokens or 0, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}: found {value!r}, expected a whole number of at least 1")


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Batches of requests that can share a pass: all with a gate or none; the longest first."""
    check_counts(size)
    groups: dict[bool, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.gate is None, []).append(request)
    for group in groups.values():
        ordered = sorted(group, key=lambda request: (-len(request.tokens), request.place))
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def tensors(batch: Sequence[Request], *, pad_id: int, encoder_decoder: bool, device: torch.device) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``prompt_mask`` of a batch, each (B, tokens)."""
    examples = [Example(request.place, request.tokens, (), None, "", span=request.span) for request in batch]
    made = collate_prompts(examples, pad_id=pad_id, side="right" if encoder_decoder else "left")
    return {name: tensor.to(device) for name, tensor in made.items()}


def mean_rows(adapters: list[Adapter]) -> Tensor:
    """(T, N): how much each task uses each adapter, mean over the adapted modules."""
    return torch.stack([rows(adapters, module) for module in adapters[0].a]).mean(dim=0)


def routes(gate_BT: Tensor, tasks: Sequence[str], rows_TN: Tensor) -> list[Route]:
    """Gates as people read them."""
    gate_BT = gate_BT.detach().float().cpu()
    adapters_BN = gate_BT @ rows_TN
    return [
        Route(
            dict(zip(tasks, gates.tolist(), strict=True)),
            dict(zip(tasks, weights.tolist(), strict=True)),
            max(0.0, 1.0 - float(gates.sum())),
        )
        for gates, weights in zip(gate_BT, adapters_BN, strict=True)
    ]
