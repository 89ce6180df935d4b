"""Text metrics against values worked out by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from amlora_dist.evaluation.text_metrics import (
    METRIC_NAMES,
    METRICS,
    NAMES,
    exact_match,
    label_match,
    longest_common_subsequence,
    normalise_answer,
    normalise_label,
    rouge_l,
    score_of,
    token_f1,
)
from amlora_dist.tasks.task import Metric


@pytest.mark.parametrize(
    ("output", "answer", "score"),
    [
        (" very negative\n", "very negative", 1.0),
        ("Very  Negative", "very negative", 1.0),
        ("very negative.", "very negative", 0.0),
        ("negative", "very negative", 0.0),
        ("the very negative", "very negative", 0.0),
        ("C", "C++", 0.0),
        ("stra\u00dfe", "STRASSE", 1.0),
        ("cafe\u0301", "caf\u00e9", 1.0),
    ],
)
def test_the_answer_must_be_the_label_and_nothing_else(output: str, answer: str, score: float) -> None:
    assert label_match(output, answer) == score


def test_normalisation_is_squads() -> None:
    assert normalise_answer("The  Quick, (brown) fox's an apple!") == "quick brown foxs apple"
    assert normalise_label("The Quick,\tfox ") == "the quick, fox"


def test_exact_match_forgives_articles_and_punctuation() -> None:
    assert exact_match("The Eiffel Tower.", "eiffel tower") == 1.0
    assert exact_match("Eiffel", "eiffel tower") == 0.0
    assert exact_match("theatre", "atre") == 0.0


@pytest.mark.parametrize(
    ("output", "answer", "score"),
    [
        ("the cat sat", "a cat sat", 1.0),
        # shared: cat, sat; P = 2/3, R = 2/4
        ("cat sat here", "cat sat on mat", 4 / 7),
        # multiset: one of the two "no" counts; P = 1/2, R = 1/1
        ("no no", "no", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),
    ],
)
def test_token_f1(output: str, answer: str, score: float) -> None:
    assert token_f1(output, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "answer", "score"),
    [
        # Lin 2004, section 3.1: LCS 3 of 4 and 4 words; 2 of 4 and 4; order matters
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # LCS "restart the router" = 3; P = 3/5, R = 3/3
        ("please restart the router now", "Restart the router.", 6 / 8),
        ("a b c", "a b c", 1.0),
        ("a", "b", 0.0),
        ("", "b", 0.0),
        ("...", "!", 1.0),
        ("die Tür öffnen", "die tür schließen", 4 / 6),
    ],
)
def test_rouge_l(output: str, answer: str, score: float) -> None:
    assert rouge_l(output, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("ABCBDAB", "BDCABA", 4), ("AGGTAB", "GXTXAYB", 4), ("", "A", 0), ("AAAA", "AA", 2), ("ABC", "CBA", 1)],
)
def test_longest_common_subsequence(first: str, second: str, length: int) -> None:
    assert longest_common_subsequence(first, second) == length
    assert longest_common_subsequence(second, first) == length


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_a_perfect_answer_one_and_a_wrong_one_zero(name: str) -> None:
    right, wrong = ("Answer: B", "Answer: C") if name == "answer_letter" else ("reset password", "billing")
    assert METRICS[name](right, right) == 1.0
    assert METRICS[name](wrong, right) == 0.0


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ('{"city": "Bonn", "days": 3}', 1.0),
        ('{"days": 3, "city": "Bonn"}', 1.0),
        ('{"city": "Bonn"}', 2 / 3),
        ('{"city": "Bonn", "days": "3"}', 0.5),
        ('{"city": "Bonn", "days": true}', 0.5),
        ('{"city": "Bonn", "days": 3', 0.0),
        ("[1]", 0.0),
        ("{}", 0.0),
    ],
)
def test_fields_of_json_count_where_name_and_value_are_equal(output: str, score: float) -> None:
    assert METRICS["json_fields"](output, '{"city": "Bonn", "days": 3}') == pytest.approx(score)


def test_the_best_of_several_right_answers_counts() -> None:
    assert score_of("exact_match", "two", ["one", "Two."], "") == 1.0
    assert score_of("rouge_l", "a b c", ["a b", "x"], "") == rouge_l("a b c", "a b")
    assert score_of("token_f1", "y", ["x"], "") == 0.0


def test_every_metric_has_a_name_for_people() -> None:
    assert METRIC_NAMES.keys() == set(NAMES)


def test_a_task_may_name_every_metric() -> None:
    assert set(get_args(Metric)) == set(NAMES)
