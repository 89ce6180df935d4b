"""SARI against published values and values worked out by hand."""

from __future__ import annotations

import pytest

from amlora_dist.evaluation.sari import sari, words
from amlora_dist.evaluation.text_metrics import score_of

SOURCE = "About 95 species are currently accepted ."
ANSWERS = ["About 95 species are currently known .", "About 95 species are now accepted .", "95 species are now accepted ."]


def test_the_published_example_has_its_published_score() -> None:
    """The example of `evaluate`'s card of the metric, which EASSE's README has too."""
    assert 100 * sari("About 95 you now get in .", ANSWERS, SOURCE) == pytest.approx(26.953601953601954)
    unspaced = [text.replace(" .", ".") for text in (SOURCE, *ANSWERS)]
    assert 100 * sari("About 95 you now get in.", unspaced[1:], unspaced[0]) == pytest.approx(26.953601953601954)


def test_the_papers_three_sentences_are_in_their_order() -> None:
    """Xu et al. 2016 and their program: nonsense, then a right deletion without a new word, then the best one."""
    found = [
        sari(f"About 95 {words}", ANSWERS, SOURCE)
        for words in ("you now get in .", "species are currently agreed .", "species are now agreed .")
    ]
    # their program says 0.268, 0.507 and 0.589: nothing of nothing is 0 there, and a recall is a mean over n-grams
    assert found == pytest.approx([0.269536, 0.508868, 0.617097], abs=1e-6)


@pytest.mark.parametrize(
    ("source", "output", "answers", "score"),
    [
        ("a b c", "a d", ["a d"], 1.0),
        ("", "", [""], 1.0),
        # words: keep 1, add 0 of {d}, delete 1; pairs: keep 1, add 0, delete 1; of three and four words there are none
        ("a b", "a c", ["a d"], (1 + 2 / 4 + 1) / 3),
        # a copy keeps too much: F of words 2/3, of pairs 1/2, of three and four words 0; it adds and deletes as nothing does
        ("a b c d", "a b c d", ["a b"], ((2 / 3 + 1 / 2) / 4 + 1 + 1) / 3),
        # two answers: each right n-gram counts half; words keep F 1/2 and delete 1/2, all longer runs 1
        ("a b", "a", ["a", "b"], (3.5 / 4 + 1 + 3.5 / 4) / 3),
        # all deleted where all was to be kept: words keep 0 (nothing kept: precision 1, recall 0) and delete 0
        ("a", "", ["a"], (3 / 4 + 1 + 3 / 4) / 3),
    ],
)
def test_sari(source: str, output: str, answers: list[str], score: float) -> None:
    assert sari(output, answers, source) == pytest.approx(score)


def test_words_are_mteval_v13as() -> None:
    text = "Es kostet 3,50 CHF (ca. 4 $), &quot;so-so&quot;: 10-mal\nmehr!"
    assert words(text) == [
        "es", "kostet", "3,50", "chf", "(", "ca", ".", "4", "$", ")", ",", '"', "so-so", '"', ":", "10", "-", "mal", "mehr",
        "!",
    ]  # fmt: skip


def test_a_metric_may_see_the_rows_text() -> None:
    score = score_of("sari", "About 95 you now get in .", ANSWERS, SOURCE)
    assert score == pytest.approx(0.26953601953601954) != score_of("sari", "About 95 you now get in .", ANSWERS, "")
