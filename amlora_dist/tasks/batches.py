"""Token ids of prompts and targets, the order of an epoch, and batches.

Shapes: B examples, T tokens of the longest example of a batch. Targets carry the end-of-sequence token; the loss is
taken on targets alone, and where a task says so on earlier turns of the assistant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amlora_dist.errors import UserError
from amlora_dist.tasks.chat import ChatPrompts, ChatTemplate, answer_ids
from amlora_dist.tasks.conversations import Turn
from amlora_dist.tasks.prompt_format import PromptFormat, TextPrompts, text_ids
from amlora_dist.tasks.prompts import PromptTemplate
from amlora_dist.tasks.sources import Row
from amlora_dist.tasks.special_tokens import plain_ids
from amlora_dist.tasks.task import TaskSpec

FIRST_FORMAT = PromptFormat(1)
IGNORED = -100
"""Label that PyTorch's cross-entropy leaves out."""
PROMPT_END = "Answer:"

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row in token ids. ``row`` is the row's number in its source, ``label`` its index in ``label_texts``."""

    row: int
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    """Answer tokens, the end-of-sequence token last."""
    label: int | None
    answer: str
    text: tuple[int, ...] = ()
    """The text's own ids, of which the router makes its features; empty in format 1, where it reads the whole prompt."""
    span: tuple[int, int] | None = None
    """Where the text is in the prompt; None: it cannot be found there."""
    earlier: tuple[int, ...] = ()
    """1 for each of the prompt's last tokens that is learned too: earlier turns of the assistant, from the first one on."""
    references: tuple[str, ...] = ()
    """Of free text: further right answers, for scoring."""
    source: str = ""
    """The row's text as it is in the data, for metrics that see it."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer, *self.references)

    @property
    def learned(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(self.earlier) + len(self.target)

    @property
    def labels(self) -> tuple[int, ...]:
        """Of prompt and target: the tokens that are learned, `IGNORED` elsewhere."""
        plain = len(self.prompt) - len(self.earlier)
        turns = zip(self.prompt[plain:], self.earlier, strict=True)
        return (IGNORED,) * plain + tuple(token if on else IGNORED for token, on in turns) + self.target

    @property
    def routing_mask(self) -> tuple[int, ...]:
        """1 on the prompt's tokens that gates are made of: the text's, or all of them."""
        start, end = self.span or (0, len(self.prompt))
        return (0,) * start + (1,) * (end - start) + (0,) * (len(self.prompt) - end)


def encode(
    rows: Sequence[Row],
    spec: TaskSpec,
    template: PromptTemplate,
    tokenizer: Any,
    *,
    max_length: int,
    encoder_decoder: bool,
    prompt_format: PromptFormat = FIRST_FORMAT,
) -> list[Example]:
    """Tokenise prompts and targets of rows.

    A prompt longer than ``max_length`` tokens loses tokens at the end of its *text*; the question and ``Answer:`` are
    never cut. In format 1 a causal model's prompt and target are together what tokenising ``prompt + " " + answer`` gives.

    Raises:
        UserError: the template alone is longer than ``max_length``, or the tokenizer has no end-of-sequence token.
    """
    eos = _eos(tokenizer)
    if spec.chat:
        return _chat_examples(rows, spec, template, tokenizer, max_length, prompt_format)
    index = {text: place for place, text in enumerate(spec.label_texts)}
    answers: dict[str, tuple[int, ...]] = {}
    if prompt_format.text_alone:
        texts = text_ids([row.text for row in rows], tokenizer, prompt_format.text_tokens)
        made = TextPrompts(template, tokenizer, encoder_decoder, spec.name)
        found = [
            made.prompt(ids, max_length, text=row.text, fields=row.fields) for row, ids in zip(rows, texts, strict=True)
        ]
        prompts, spans = [prompt.ids for prompt in found], [prompt.span for prompt in found]
    else:
        texts, spans = [()] * len(rows), [None] * len(rows)
        prompts = prompt_tokens(rows, template, tokenizer, max_length, encoder_decoder, spec.name)
    examples = []
    for row, prompt, text, span in zip(rows, prompts, texts, spans, strict=True):
        if row.target not in answers:
            answers[row.target] = answer_tokens(row.target, tokenizer, encoder_decoder, split=prompt_format.text_alone)
        target = answers[row.target]
        if spec.free_text:
            target = target[: spec.max_answer_tokens]
        label = index.get(row.target)
        examples.append(
            Example(
                row.number, prompt, (*target, eos), label, row.target, text, span, references=row.references, source=row.text
            )
        )
    return examples


def _chat_examples(
    rows: Sequence[Row],
    spec: TaskSpec,
    template: PromptTemplate,
    tokenizer: Any,
    max_length: int,
    prompt_format: PromptFormat,
) -> list[Example]:
    """Rows in the model's own chat template; a labelled row is the user's turn and the label."""
    chat = ChatTemplate(tokenizer)
    prompts = ChatPrompts(template, chat, spec.prompt.system, spec.name)
    index = {text: place for place, text in enumerate(spec.label_texts)}
    labels = {text: (*answer_ids(chat, text), chat.end_id) for text in index}
    examples = []
    for row, text in zip(rows, text_ids([row.text for row in rows], tokenizer, prompt_format.text_tokens), strict=True):
        try:
            found, asked = prompts.prompt(row.turns[:-1] or (Turn("user", row.text),), max_length, fields=row.fields)
            earlier: tuple[int, ...] = ()
            target = labels.get(row.target, ())
            if not target:
                answer = row.turns[-1] if row.turns else Turn("assistant", row.target)
                _, target, earlier = chat.split([*asked, answer], all_turns=spec.prompt.train_on == "all")
        except UserError as error:
            raise UserError(f"task {spec.name!r}, row {row.number}: {error}") from None
        if spec.free_text and len(target) > spec.max_answer_tokens + 1:
            target = target[: spec.max_answer_tokens]  # it does not end there, and must not learn to
        label = index.get(row.target)
        examples.append(
            Example(row.number, found.ids, target, label, row.target, text, found.span, earlier, row.references, row.text)
        )
    return examples


def label_tokens(
    spec: TaskSpec, tokenizer: Any, encoder_decoder: bool, *, split: bool = True
) -> list[tuple[int, ...]]:
    """Tokens of each label text, without end-of-sequence, in the order of ``spec.label_texts``; ``split`` as for answers."""
    chat = ChatTemplate(tokenizer) if spec.chat else None
    return [answer_tokens(text, tokenizer, encoder_decoder, chat=chat, split=split) for text in spec.label_texts]


def answer_tokens(
    text: str, tokenizer: Any, encoder_decoder: bool, *, chat: ChatTemplate | None = None, split: bool = True
) -> tuple[int, ...]:
    """Tokens of an answer as they follow a prompt (causal) or begin a decoder's output; ``chat``: as a turn.

    Special tokens in its text are plain text (``split``), but in prompt format 1, which took them for what they are.

    A causal answer is tokenised behind ``Answer:`` and the prompt's tokens are taken off, because tokenisers differ in
    where the space goes: byte-level BPE has it in the answer's first token, sentencepiece would add one of its own in
    front of a text by itself.
    """
    if chat is not None:
        return answer_ids(chat, text)
    if encoder_decoder:
        return _ids(tokenizer, text, special=False, split=split)
    before = _ids(tokenizer, PROMPT_END, special=False)
    both = _ids(tokenizer, f"{PROMPT_END} {text}", special=False, split=split)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    # The tokeniser merges over the boundary; a prompt that was tokenised alone cannot, so neither may the answer.
    return _ids(tokenizer, f" {text}", special=False, split=split)


def prompt_tokens(
    rows: Sequence[Row],
    template: PromptTemplate,
    tokenizer: Any,
    max_length: int,
    encoder_decoder: bool,
    task: str,
) -> list[tuple[int, ...]]:
    """Token ids of the rows' prompts, cut as ``encode`` says; ``task`` is named in errors."""
    if not rows:
        return []
    rendered = [template.render(row) for row in rows]
    out = []
    for row, ids in zip(rows, tokenizer(rendered, verbose=False)["input_ids"], strict=True):
        prompt = _open_ended(tuple(ids), tokenizer, encoder_decoder)
        if len(prompt) > max_length:
            prompt = _cut_prompt(row, template, tokenizer, max_length, encoder_decoder, len(prompt), task)
        out.append(prompt)
    return out


def _cut_prompt(
    row: Row,
    template: PromptTemplate,
    tokenizer: Any,
    max_length: int,
    encoder_decoder: bool,
    length: int,
    task: str,
) -> tuple[int, ...]:
    """Keep as many of the text's tokens as fit, then render and tokenise again: tokens at the seam may change."""
    ends = _token_ends(row.text, tokenizer)
    keep = len(ends)
    while keep > 0:
        keep = max(0, keep - (length - max_length))
        text = row.text[: ends[keep - 1]].rstrip() if keep else ""
        ids = _ids(tokenizer, template.render(row, text=text), special=True)
        prompt = _open_ended(ids, tokenizer, encoder_decoder)
        if len(prompt) <= max_length:
            return prompt
        length = len(prompt)
    raise UserError(
        f"task {task!r}: max_length {max_length} is too small: the prompt has {length} tokens without any text"
    )


def _token_ends(text: str, tokenizer: Any) -> list[int]:
    """Character offset at which each token of a text ends."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoded["offset_mapping"]]
    pieces = tokenizer.tokenize(text)
    # Without offsets: spread the characters evenly. The caller measures the result, so this only sets its first guess.
    return [len(text) * (place + 1) // len(pieces) for place in range(len(pieces))]


def _ids(tokenizer: Any, text: str, *, special: bool, split: bool = False) -> tuple[int, ...]:
    if split:
        return tuple(plain_ids(tokenizer, [text])[0])
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _open_ended(ids: tuple[int, ...], tokenizer: Any, encoder_decoder: bool) -> tuple[int, ...]:
    """A causal prompt must not end in end-of-sequence, which some tokenisers add; an encoder's keeps it."""
    if not encoder_decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1]
    return ids


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def epoch_order(count: int, *, seed: int, stage: str, epoch: int) -> list[int]:
    """Permutation of ``range(count)`` for one epoch of one stage.

    Places are sorted by a hash of (seed, stage, epoch, place): the same on every machine, Python and world size, and
    without a generator whose state a checkpoint would have to hold.
    """
    head = f"order|{seed}|{stage}|{epoch}|".encode()
    return sorted(range(count), key=lambda place: hashlib.sha256(head + str(place).encode()).digest())


def collate(examples: Sequence[Example], *, pad_id: int, side: Side) -> dict[str, Tensor]:
    """Batch for a causal model: ``input_ids``, ``attention_mask``, ``labels``, ``prompt_mask``, each (B, T) int64.

    ``labels`` is -100 outside targets; ``prompt_mask`` is 1 on the tokens that routing reads: the text's, or the
    whole prompt's in format 1.
    """
    whole = [one.prompt + one.target for one in examples]
    return {
        "input_ids": padded(whole, pad_id, side),
        "attention_mask": padded([(1,) * len(ids) for ids in whole], 0, side),
        "labels": padded([one.labels for one in examples], IGNORED, side),
        "prompt_mask": padded([one.routing_mask + (0,) * len(one.target) for one in examples], 0, side),
    }


def collate_seq2seq(examples: Sequence[Example], *, pad_id: int, side: Side) -> dict[str, Tensor]:
    """Batch for an encoder-decoder: prompts as ``input_ids`` (B, T), targets as ``labels`` (B, T of targets)."""
    return {
        **collate_prompts(examples, pad_id=pad_id, side=side),
        "labels": padded([one.target for one in examples], IGNORED, "right"),
    }


def collate_prompts(examples: Sequence[Example], *, pad_id: int, side: Side = "left") -> dict[str, Tensor]:
    """Prompts alone, for generation and features: ``input_ids``, ``attention_mask``, ``prompt_mask``, each (B, T)."""
    mask = padded([(1,) * len(one.prompt) for one in examples], 0, side)
    ids = padded([one.prompt for one in examples], pad_id, side)
    routing = padded([one.routing_mask for one in examples], 0, side)
    return {"input_ids": ids, "attention_mask": mask, "prompt_mask": routing}


def padded(sequences: Sequence[tuple[int, ...]], fill: int, side: Side) -> Tensor:
    """Rows of different lengths as one (B, T) int64 tensor."""
    width = max(len(ids) for ids in sequences)
    rows = []
    for ids in sequences:
        padding = (fill,) * (width - len(ids))
        rows.append(padding + ids if side == "left" else ids + padding)
    return torch.tensor(rows, dtype=torch.int64)
