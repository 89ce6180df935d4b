"""How the labels of a task are laid out for ranking: a trie of their tokens.

Each distinct beginning of a label is one node, and a node goes through the model once, however many labels pass through
it. Nodes are in preorder, so that the descendants of node n are n+1 to ``end[n]`` - 1: one comparison tells whether one
token may see another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from amlora_dist.errors import UserError

PADDING_TOKENS = 3
"""Padding per prompt that is cheaper than one more pass (measured: an empty pass costs 2-3 tokens a prompt)."""


@dataclass(frozen=True, slots=True)
class Trie:
    """The tokens that have to go through the model, in preorder, and the steps that lead to each label.

    An edge is one step: from the prompt (node -1) or a node to a next token. Each label's log-likelihood is the sum of
    its edges' log-probabilities.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    """1 for a first token."""
    ends: tuple[int, ...]
    """One past the last descendant of each node."""
    edges: tuple[tuple[int, int], ...]
    """(node that it leaves, next token), sorted: those of one node are next to each other."""
    paths: tuple[tuple[int, ...], ...]
    """Of each label its edges, from the prompt on."""

    @property
    def size(self) -> int:
        """Nodes."""
        return len(self.tokens)

    def nodes(self, label: int) -> list[int]:
        """What has to go through the model for a label, in its order."""
        return [self.edges[edge][0] for edge in self.paths[label][1:]]


class LabelPlan:
    """How to read the log-likelihood of every label off a few passes.

    Args:
        candidates: token ids whose summed log-likelihood is each label's score; EOS is last where ``ends`` is true.
        ends: EOS counts for all labels, because the tokens of one label begin another's.
    """

    def __init__(self, candidates: Sequence[tuple[int, ...]], *, ends: bool) -> None:
        self.candidates = tuple(candidates)
        self.ends = ends
        self.trie = _trie(self.candidates)

    @property
    def longest(self) -> int:
        """Tokens of the longest label, without EOS."""
        return max(map(len, self.candidates)) - self.ends

    @cached_property
    def contexts(self) -> tuple[tuple[int, ...], ...]:
        """The distinct maximal token sequences in front of a label's last token, shortest first: what goes through models
        whose attention cannot be given a trie."""
        ordered = sorted({candidate[:-1] for candidate in self.candidates if len(candidate) > 1})
        maximal = [p for p, q in zip_longest(ordered, ordered[1:], fillvalue=()) if q[: len(p)] != p]
        return tuple(sorted(maximal, key=lambda context: (len(context), context)))

    @cached_property
    def padded_paths(self) -> Tensor:
        """(L, longest path) edges of each label, filled up with the number of edges."""
        width = max(map(len, self.trie.paths))
        fill = len(self.trie.edges)
        return torch.tensor([[*path, *[fill] * (width - len(path))] for path in self.trie.paths])

    def passes(self, limit: int) -> list[range]:
        """Contexts of each pass, as indices: at most ``limit``, and of such lengths that little is padding."""
        out: list[range] = []
        for index, context in enumerate(self.contexts):
            padding = sum(len(context) - len(self.contexts[i]) for i in out[-1]) if out else 0
            if out and len(out[-1]) < limit and padding <= PADDING_TOKENS:
                out[-1] = range(out[-1].start, index + 1)
            else:
                out.append(range(index, index + 1))
        return out


def plan_labels(labels: Sequence[Sequence[int]], eos_id: int) -> LabelPlan:
    """Prepare ``labels`` (token ids without EOS) for ranking.

    Raises:
        UserError: a label has no tokens, or two labels have the same ones.
    """
    bare = [tuple(label) for label in labels]
    if not all(bare):
        raise UserError(f"label {bare.index(())} has no tokens: give it a text that the tokenizer can write")
    if len(set(bare)) < len(bare):
        first: dict[tuple[int, ...], int] = {}
        twice = next(i for i, label in enumerate(bare) if first.setdefault(label, i) != i)
        raise UserError(f"labels {first[bare[twice]]} and {twice} have the same tokens: give them different texts")
    # In lexicographic order what begins with a sequence follows it at once: a thousand labels need no million comparisons.
    ends = any(b[: len(a)] == a for a, b in pairwise(sorted(bare)))
    return LabelPlan([(*label, eos_id) for label in bare] if ends else bare, ends=ends)


def _trie(candidates: Sequence[tuple[int, ...]]) -> Trie:
    prefixes = sorted({candidate[:cut] for candidate in candidates for cut in range(1, len(candidate))})
    place = {prefix: node for node, prefix in enumerate(prefixes)} | {(): -1}
    ends = list(range(1, len(prefixes) + 1))
    for node in reversed(range(len(prefixes))):  # children come behind their parents: their ends are known
        parent = place[prefixes[node][:-1]]
        if parent >= 0:
            ends[parent] = max(ends[parent], ends[node])
    steps = [[(place[one[:cut]], one[cut]) for cut in range(len(one))] for one in candidates]
    edges = sorted({step for path in steps for step in path})
    number = {edge: at for at, edge in enumerate(edges)}
    return Trie(
        tuple(prefix[-1] for prefix in prefixes),
        tuple(map(len, prefixes)),
        tuple(ends),
        tuple(edges),
        tuple(tuple(number[step] for step in path) for path in steps),
    )
