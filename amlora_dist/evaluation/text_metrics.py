"""Scores of one output against one answer, 0 to 1: the same text, exact match, token F1, ROUGE-L, fields of JSON, code.

Every function takes ``(output, answer)`` and is pure; those that read the row's text too are in ``TEXT_METRICS``.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from amlora_dist.evaluation.sari import sari

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHOICE = re.compile(r"Answer: (.)", re.DOTALL)
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")


def normalise_label(text: str) -> str:
    """Case, Unicode composition and runs of white space do not count; everything else does.

    A label's punctuation and articles can be all that sets it apart, so they stay.
    """
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016, evaluate-v1.1): lower case, no ASCII punctuation, no English
    articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def label_match(output: str, answer: str) -> float:
    """1 if the output is the label's words and nothing else (`normalise_label`)."""
    return float(normalise_label(output) == normalise_label(answer))


def exact_match(output: str, answer: str) -> float:
    """1 if output and answer are equal after SQuAD's normalisation."""
    return float(normalise_answer(output) == normalise_answer(answer))


def token_f1(output: str, answer: str) -> float:
    """SQuAD's F1 over the multiset of normalised words: 2 P R / (P + R).

    If either side has no words, the score is 1 when both have none and 0 otherwise (SQuAD 2.0).
    """
    found, wanted = normalise_answer(output).split(), normalise_answer(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return _f_measure(shared, len(found), len(wanted))


def rouge_l(output: str, answer: str) -> float:
    """ROUGE-L (Lin 2004) as F-measure with beta 1: F of LCS/|output| and LCS/|answer| over lower-case words.

    Words are runs of letters and digits of any script, without stemming. No words on either side: as `token_f1`.
    """
    found, wanted = _WORD.findall(output.lower()), _WORD.findall(answer.lower())
    if not found or not wanted:
        return float(found == wanted)
    return _f_measure(longest_common_subsequence(found, wanted), len(found), len(wanted))


def json_fields(output: str, answer: str) -> float:
    """F-measure over the fields of two JSON objects: a field counts where name and value are equal.

    1 for the answer as it is, 0 where either is no JSON object.
    """
    if output.strip() == answer.strip():
        return 1.0
    found, wanted = _fields(output), _fields(answer)
    if found is None or wanted is None:
        return 0.0
    if not found or not wanted:
        return float(found == wanted)
    shared = sum(1 for name, value in wanted.items() if name in found and _same(found[name], value))
    return _f_measure(shared, len(found), len(wanted))


def answer_letter(output: str, answer: str) -> float:
    """1 if both choose the same letter, the character behind ``Answer: `` (TRACE's score of ScienceQA, Wang et al. 2023)."""
    found, wanted = _CHOICE.search(output), _CHOICE.search(answer)
    return float(found is not None and wanted is not None and found[1] == wanted[1])


def code_similarity(output: str, answer: str) -> float:
    """2 LCS / (|output| + |answer|) over characters, after Py150's placeholders are put back (``<NUM_LIT:2>`` is 2): the
    Indel ratio, as TRACE (Wang et al. 2023) scores lines of code. 1 where both are empty."""
    found, wanted = _literal(output), _literal(answer)
    if not found or not wanted:
        return float(found == wanted)
    return _f_measure(longest_common_subsequence(found, wanted), len(found), len(wanted))


def _literal(code: str) -> str:
    bare = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(lambda found: found[2], bare).strip()


def _fields(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _same(one: object, other: object) -> bool:
    """Equal as JSON: 1 and true, which Python takes for equal, are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, in O(|first| |second|) time and O(|second|) memory."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        above = row
    return above[-1]


def _f_measure(shared: int, found: int, wanted: int) -> float:
    """2 P R / (P + R) with P = shared / found, R = shared / wanted, which is 2 shared / (found + wanted)."""
    return 2 * shared / (found + wanted)


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "accuracy": label_match,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "json_fields": json_fields,
    "same_text": label_match,
    "answer_letter": answer_letter,
    "code_similarity": code_similarity,
}
"""Metrics of an output and an answer, by their names in a task specification. ``accuracy`` is for labelled tasks."""

TEXT_METRICS: Mapping[str, Callable[[str, Sequence[str], str], float]] = {"sari": sari}
"""Metrics of an output, all right answers, and the row's text."""

NAMES = (*METRICS, *TEXT_METRICS)
"""The metric names of a task specification."""

METRIC_NAMES: Mapping[str, str] = {
    "accuracy": "accuracy", "exact_match": "exact match", "token_f1": "token F1", "rouge_l": "ROUGE-L",
    "json_fields": "JSON fields", "same_text": "same text", "answer_letter": "answer letter",
    "code_similarity": "code similarity", "sari": "SARI",
}  # fmt: skip
"""What people call them: in lines, tables and pages."""


def common_name(metrics: Iterable[str]) -> str:
    """What scores of several tasks are called together: their metric's name if all have one, otherwise ``score``."""
    names = {METRIC_NAMES[metric] for metric in metrics}
    return names.pop() if len(names) == 1 else "score"


def score_of(metric: str, output: str, answers: Sequence[str], text: str) -> float:
    """The score of an output to a row's text.

    Of several right answers the best counts, as in SQuAD (Rajpurkar et al. 2016, 6.1); a metric that sees the text takes all
    of them.
    """
    if metric in TEXT_METRICS:
        return TEXT_METRICS[metric](output, answers, text)
    return max(METRICS[metric](output, answer) for answer in answers)
