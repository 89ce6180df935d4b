"""SARI, the score of a simpler text against its source and right answers, 0 to 1 (Xu et al. 2016, "Optimizing Statistical
Machine Translation for Text Simplification", TACL 4, section 4).

``SARI = (F_keep + F_add + P_delete) / 3``, each the mean over n-grams of 1 to 4 words. What is kept, added and deleted is
counted against the source: a good answer keeps, adds and deletes what the right answers do. Deletions count by precision
alone, so that deleting too much is not rewarded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)

_Grams = Counter[tuple[str, ...]]
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_APART = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),  # signs, but for the apostrophe, comma, full stop and hyphen
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def sari(output: str, answers: Sequence[str], source: str) -> float:
    """SARI of one output, as ``evaluate``'s metric of this name computes it.

    Precision and recall of nothing are 1, as an output that has nothing to add and adds nothing is right. Precisions are
    means over different n-grams, as in the authors' program.

    Args:
        output: the text that was written.
        answers: the right ones, at least one.
        source: the text that was to be simplified.
    """
    was, now, wanted = words(source), words(output), [words(answer) for answer in answers]
    scores = [_of_order(grams(was, n), grams(now, n), [grams(one, n) for one in wanted]) for n in ORDERS]
    return sum(map(sum, scores)) / (3 * len(ORDERS))


def words(text: str) -> list[str]:
    """Lower-case words and signs: mteval-v13a's rules, the tokens of BLEU."""
    line = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES:
        line = line.replace(entity, sign)
    line = f" {line} "
    for pattern, spaced in _APART:
        line = pattern.sub(spaced, line)
    return line.split()


def grams(found: Sequence[str], n: int) -> _Grams:
    """How often each run of n words is in a text."""
    return Counter(tuple(found[place : place + n]) for place in range(len(found) - n + 1))


def _of_order(source: _Grams, output: _Grams, answers: Sequence[_Grams]) -> tuple[float, float, float]:
    """F of what is kept and of what is added, and the precision of what is deleted, of n-grams of one length."""
    wanted: _Grams = sum(answers, Counter())
    was = _times(source, len(answers))  # every right answer counts by its share
    now = _times(output, len(answers))
    kept, keepable, left = was & now, was & wanted, was - now
    right = kept & wanted
    keep = _f(_mean_share(right, kept), _share(right.total(), keepable.total()))
    added, addable = output.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(added & addable)
    add = _f(_share(hits, len(added)), _share(hits, len(addable)))
    return keep, add, _mean_share(left - wanted, left)


def _times(counts: _Grams, number: int) -> _Grams:
    return Counter({gram: count * number for gram, count in counts.items()})


def _mean_share(part: _Grams, whole: _Grams) -> float:
    """The mean over the n-grams of ``whole`` of the share that ``part`` has of each; 1 of nothing."""
    return sum(part[gram] / count for gram, count in whole.items()) / len(whole) if whole else 1.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
