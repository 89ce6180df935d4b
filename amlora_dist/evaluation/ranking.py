"""Ranking labels behind a prompt: how likely each is, or which one is the best.

Scoring, classifying and serving all rank by these two functions:

``scoring`` gives the log-likelihood of every label. All their tokens go through the model side by side, behind one copy of
the prompt's cache, in an attention mask that shows each token the prompt and its own label's beginning.

``choosing`` gives the best label alone, exactly, by branch and bound: log-probabilities only add up to less, so a label
whose known beginning is already worse than some whole label cannot win. The first tokens' probabilities came with the
prompt, and what else counts (the keys' evidence) is known beforehand; of 150 labels a pass or two over a few tokens decide.

Encoder-decoders, sliding windows, and caches or attention of other kinds continue copies of the cache instead, one for each
of ``LabelPlan.contexts``.

Shape suffixes: B prompts, S prompt tokens, C cached tokens behind them, K tokens of one pass, V vocabulary, L labels,
E edges of the trie.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from amlora_dist.evaluation.decoding import Decoder, Prefilled, repeated
from amlora_dist.evaluation.label_plan import LabelPlan

T = TypeVar("T")

CACHE_TOKENS = 8192
"""Positions that the repeated caches of one ranking pass may hold (rows x prompt tokens): bounds its memory."""
PASS_LOGITS = 2**26
"""Scores over the vocabulary that one pass over a trie may make (256 MiB in fp32): bounds its memory."""
FIRST_NODES = 16
"""Tokens of a prompt's first pass of branch and bound; each further pass may have twice as many as the one before, so
that a model which cannot tell its labels apart needs few passes too."""


@dataclass(frozen=True, slots=True)
class Room:
    """The nominal batch, which decides how much goes through in one pass: the same for every batch and every rank."""

    prompt_tokens: int
    """Of the longest prompt."""
    rows: int

    def contexts(self, plan: LabelPlan) -> int:
        """Contexts to continue in one pass so that the repeated caches hold at most `CACHE_TOKENS` positions; at least 1."""
        longest = self.prompt_tokens + max((len(context) for context in plan.contexts), default=0)
        return max(1, CACHE_TOKENS // (longest * self.rows))

    def nodes(self, vocabulary: int) -> int:
        """Tokens a prompt that may go through in one pass over a trie; at least 1."""
        return max(1, PASS_LOGITS // (vocabulary * self.rows))


def label_scores(decoder: Decoder, state: Prefilled, plan: LabelPlan, room: Room) -> Tensor:
    """Summed log-likelihood of every label after every prompt: (B, L), fp32, nats. Leaves ``state`` as it is."""
    return finished(scoring(decoder, state, plan, room))


def scoring(decoder: Decoder, state: Prefilled, plan: LabelPlan, room: Room) -> Generator[int, None, Tensor]:
    """``label_scores`` with a stop after each pass, which yields the tokens that went through: others may run there."""
    if not takes_tries(decoder, state):
        return (yield from continued(decoder, state, plan, room))
    search = _TrieSearch(decoder, state, plan)
    limit, size = room.nodes(state.logits.shape[-1]), plan.trie.size
    try:
        for start in range(0, size, limit):
            nodes = list(range(start, min(start + limit, size)))
            yield search.feed([nodes] * len(state.logits))
    finally:
        search.close()
    return search.bounds_BL()


def count_passes(decoder: Decoder, state: Prefilled, plan: LabelPlan, room: Room) -> int:
    """Passes that ``scoring`` makes, whatever the batch."""
    if takes_tries(decoder, state):
        return -(-plan.trie.size // room.nodes(state.logits.shape[-1]))
    return len(plan.passes(room.contexts(plan)))


def choosing(
    decoder: Decoder, state: Prefilled, plan: LabelPlan, room: Room, more_BL: Tensor | None = None
) -> Generator[int, None, list[int]]:
    """The label of the highest log-likelihood plus ``more_BL``, of equals the first, for each prompt; leaves ``state`` as it
    is. With a stop after each pass, which yields the tokens that went through; how many passes depends on the prompts.

    Args:
        more_BL: what counts for each label in addition to its likelihood, nats; None: nothing.
    """
    more = 0.0 if more_BL is None else more_BL.to(state.logits.device, torch.float32)
    if not takes_tries(decoder, state):
        scores_BL = yield from continued(decoder, state, plan, room)
        chosen: list[int] = (scores_BL + more).argmax(dim=-1).tolist()
        return chosen
    search = _TrieSearch(decoder, state, plan)
    budget, most = FIRST_NODES, room.nodes(state.logits.shape[-1])
    try:
        while True:
            bounds_BL = search.bounds_BL() + more
            whole_BL = search.whole_BL()
            best_B1 = bounds_BL.masked_fill(~whole_BL, -torch.inf).amax(dim=-1, keepdim=True)
            # "not worse" rather than "better": of equals the first wins, wherever it is. Nothing is better than nan.
            open_BL = ~whole_BL & (bounds_BL >= best_B1)
            if not bool(open_BL.any()):
                break
            yield search.feed(search.promising(bounds_BL, open_BL, min(budget, most)))
            budget *= 2
    finally:
        search.close()
    chosen = bounds_BL.masked_fill(~whole_BL, -torch.inf).argmax(dim=-1).tolist()
    return chosen


def finished(work: Generator[Any, None, T]) -> T:
    """What a generator returns, run to its end without a stop."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def takes_tries(decoder: Decoder, state: Prefilled) -> bool:
    """Whether tokens of several labels can go through side by side: the mask of attention is ours to give, positions are
    too, and the cache keeps every token."""
    config = decoder.config
    module = sys.modules[decoder.architecture.__module__]
    return (
        decoder.takes_positions
        and hasattr(module, "create_causal_mask")  # which takes a mask with a row for each token as it is
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and not getattr(config, "alibi", False)
        and isinstance(state.cache, DynamicCache)
        and all(type(layer) is DynamicLayer for layer in state.cache.layers)
    )


class _TrieSearch:
    """What is known of the labels of a batch of prompts, as tokens of their trie go through the model."""

    def __init__(self, decoder: Decoder, state: Prefilled, plan: LabelPlan) -> None:
        self._decoder, self._state, self._plan = decoder, state, plan
        trie, device = plan.trie, state.logits.device
        self._size, batch = trie.size, len(state.logits)
        # Place `size` is padding: its own only descendant, seen by no token of a label.
        self._tokens = torch.tensor([*trie.tokens, decoder.pad_id], device=device)
        self._depths = torch.tensor([*trie.depths, 1], device=device)
        self._ends = torch.tensor([*trie.ends, trie.size + 1], device=device)
        self._paths = plan.padded_paths.to(device)
        self._edges = {node: list(group) for node, group in groupby(range(len(trie.edges)), lambda e: trie.edges[e][0])}
        count = len(trie.edges)
        self._values_BE = torch.zeros(batch, count + 1, device=device)
        self._known_BE = torch.zeros(batch, count + 1, dtype=torch.bool, device=device)
        self._known_BE[:, count] = True
        self._seen: list[set[int]] = [set() for _ in range(batch)]
        self._columns_BC = torch.empty(batch, 0, dtype=torch.long, device=device)
        root = torch.full((batch, 1), -1)
        self._note(root.tolist(), state.logits[:, None])

    def bounds_BL(self) -> Tensor:  # noqa: N802  (the shape, as in the names of tensors)
        """Log-likelihood of what is known of each label: no label can have more."""
        return self._values_BE[:, self._paths].sum(dim=-1)

    def whole_BL(self) -> Tensor:  # noqa: N802
        """Labels of which everything is known."""
        return self._known_BE[:, self._paths].all(dim=-1)

    def promising(self, bounds_BL: Tensor, open_BL: Tensor, budget: int) -> list[list[int]]:
        """Nodes of each prompt that tell most, about ``budget``: all that is missing of the best open label, which may well
        be the winner, and then the next one of every other in turn, best first; what lies deeper may never be needed."""
        order = bounds_BL.masked_fill(~open_BL, -torch.inf).argsort(dim=-1, descending=True, stable=True).tolist()
        counts = open_BL.sum(dim=-1).tolist()
        found: list[list[int]] = []
        for seen, labels, count in zip(self._seen, order, counts, strict=True):
            missing = [[n for n in self._plan.trie.nodes(label) if n not in seen] for label in labels[:count]]
            nodes = dict.fromkeys(missing[0] if missing else [])
            for column in zip_longest(*missing[1:]):  # the parents of a column's nodes are in the one before
                for node in column:
                    if node is not None and len(nodes) < budget:
                        nodes[node] = None
            found.append(list(nodes))
        return found

    def feed(self, nodes: Sequence[Sequence[int]]) -> int:
        """Let nodes of each prompt go through the model; their parents went before, or are before them. Returns the
        number of tokens."""
        width = max(map(len, nodes))
        rows = [[*row, *[self._size] * (width - len(row))] for row in nodes]
        new_BK = torch.tensor(rows, device=self._tokens.device)
        self._columns_BC = torch.cat([self._columns_BC, new_BK], dim=1)
        above_BKC = (self._columns_BC[:, None] <= new_BK[..., None]) & (
            new_BK[..., None] < self._ends[self._columns_BC][:, None]
        )
        prompt_BKS = self._state.mask.bool()[:, None].expand(-1, width, -1)
        logits_BKV = self._decoder.branch(
            self._state,
            self._tokens[new_BK],
            self._state.position + self._depths[new_BK] - 1,
            torch.cat([prompt_BKS, above_BKC], dim=-1),
        )
        self._note(rows, logits_BKV)
        for seen, row in zip(self._seen, nodes, strict=True):
            seen.update(row)
        return new_BK.numel()

    def close(self) -> None:
        """Take the labels' tokens out of the prompts' cache."""
        count = self._columns_BC.shape[1]
        if count:
            self._state.cache.crop(-count)
        self._columns_BC = self._columns_BC[:, :0]

    def _note(self, rows: list[list[int]], logits_BKV: Tensor) -> None:
        """Read the edges that leave nodes off their logits."""
        edges = self._plan.trie.edges
        found = [
            (row, at, edge)
            for row, nodes in enumerate(rows)
            for at, node in enumerate(nodes)
            for edge in self._edges.get(node, ())
        ]
        if not found:
            return
        row_M, at_M, edge_M = torch.tensor(found, device=logits_BKV.device).T
        token_M = torch.tensor([edges[edge][1] for _, _, edge in found], device=logits_BKV.device)
        logits_BKV = logits_BKV.float()
        total_BK = logits_BKV.logsumexp(dim=-1)
        # Rounding may lift a probability of 1 above 1; sums must not rise.
        self._values_BE[row_M, edge_M] = (logits_BKV[row_M, at_M, token_M] - total_BK[row_M, at_M]).clamp(max=0.0)
        self._known_BE[row_M, edge_M] = True


def continued(decoder: Decoder, state: Prefilled, plan: LabelPlan, room: Room) -> Generator[int, None, Tensor]:
    """``scoring`` by continuing copies of the prompts' cache."""
    trie, device, batch = plan.trie, state.logits.device, state.logits.shape[0]
    values_BE = torch.zeros(batch, len(trie.edges) + 1, device=device)
    prefixes: dict[tuple[int, ...], list[int]] = {}
    for candidate, path in zip(plan.candidates, trie.paths, strict=True):
        for cut, edge in enumerate(path):
            known = prefixes.setdefault(candidate[:cut], [])
            if edge not in known:
                known.append(edge)

    def note(prefix: tuple[int, ...], logits_BV: Tensor) -> None:
        chosen = prefixes.pop(prefix, None)
        if chosen:
            tokens = torch.tensor([trie.edges[edge][1] for edge in chosen], device=device)
            logits_BV = logits_BV.float()
            own_BE = logits_BV[:, tokens] - logits_BV.logsumexp(dim=-1, keepdim=True)
            values_BE[:, torch.tensor(chosen, device=device)] = own_BE.clamp(max=0.0)

    note((), state.logits)
    for chosen in plan.passes(room.contexts(plan)):
        chunk = [plan.contexts[i] for i in chosen]
        width = len(chunk[-1])
        padded = [[*context, *[decoder.pad_id] * (width - len(context))] for context in chunk]
        tokens_CK = torch.tensor(padded, device=device)
        logits = decoder.advance(repeated(state, len(chunk)), tokens_CK.repeat(batch, 1))
        logits_BCKV = logits.view(batch, len(chunk), width, -1)
        for place, context in enumerate(chunk):
            for cut in range(1, len(context) + 1):
                note(context[:cut], logits_BCKV[:, place, cut - 1])
        del logits, logits_BCKV  # not held while others run
        yield batch * len(chunk) * width
    return values_BE[:, plan.padded_paths.to(device)].sum(dim=-1)
