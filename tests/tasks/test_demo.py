"""The demo stream: what is shipped is what the generator writes, and word counts do not give it away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from amlora_dist.tasks.demo import conversations, free_text, generate
from amlora_dist.tasks.sources import Row, load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task

NAMES = [f"helpdesk/{name}" for name in generate.TASKS]


@pytest.fixture(scope="module")
def stream() -> dict[str, dict[str, list[Row]]]:
    specs = [resolve_task(name, base_dir=Path(), defaults=TaskDefaults()) for name in NAMES]
    return {spec.name: load_task(spec).rows for spec in specs}


def test_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    written = generate.write(tmp_path)
    assert len(written) == 12
    for path in written:
        assert path.read_bytes() == (Path(generate.__file__).parent / path.name).read_bytes()


def test_shipped_free_text_is_what_its_generator_writes(tmp_path: Path) -> None:
    for path in free_text.write(tmp_path):
        assert path.read_bytes() == (Path(free_text.__file__).parent / path.name).read_bytes()


def test_shipped_conversations_are_what_their_generator_writes(tmp_path: Path) -> None:
    for path in conversations.write(tmp_path):
        assert path.read_bytes() == (Path(conversations.__file__).parent / path.name).read_bytes()


@pytest.mark.parametrize("task", conversations.TASKS)
def test_conversations_are_whole_and_what_is_to_be_done_is_not_in_the_users_words(task: str) -> None:
    data = load_task(resolve_task(f"helpdesk/{task}", base_dir=Path(), defaults=TaskDefaults()))
    assert {split: len(rows) for split, rows in data.rows.items()} == conversations.ROWS and not data.bad
    every = [row for rows in data.rows.values() for row in rows]
    assert not any(word in row.text for row in every for word in ("JSON", "politely", "policy"))
    if task == "policy_answer":
        assert 0.2 < sum(len(row.turns) == 4 for row in every) / len(every) < 0.45
    if task == "order_note":
        assert all(set(json.loads(row.target)) == {"product", "order", "wish"} for row in every)
        assert all(json.loads(row.target)[key] in row.text for row in every for key in ("product", "order"))


@pytest.mark.parametrize("task", free_text.TASKS)
def test_free_text_answers_are_in_the_text_and_no_row_is_bad(task: str) -> None:
    data = load_task(resolve_task(f"helpdesk/{task}", base_dir=Path(), defaults=TaskDefaults()))
    assert {split: len(rows) for split, rows in data.rows.items()} == free_text.ROWS
    for row in (row for rows in data.rows.values() for row in rows):
        parts = row.target.split(", ") if task == "mail_facts" else [row.target]
        assert row.label is None and all(part in row.text for part in parts)


def test_stream_has_rows_enough_balanced_labels_and_no_bad_row(stream: dict[str, dict[str, list[Row]]]) -> None:
    for name in NAMES:
        rows = stream[name]
        assert (len(rows["train"]), len(rows["dev"]), len(rows["test"])) == (240, 60, 180)
        for split in rows.values():
            counts = Counter(row.target for row in split)
            assert max(counts.values()) - min(counts.values()) == 0


def test_no_text_is_there_twice_in_the_whole_stream_and_lengths_keep_their_bounds() -> None:
    texts = []
    for task in generate.TASKS:
        for split in generate.ROWS:
            lines = (Path(generate.__file__).parent / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            texts += [json.loads(line)["text"] for line in lines]
    assert len({text.lower() for text in texts}) == len(texts) == 4 * 480
    assert all(generate.WORDS[0] <= len(text.split()) <= generate.WORDS[1] for text in texts)
    assert not any("{" in text or "  " in text for text in texts)


def test_labels_of_the_four_tasks_do_not_overlap() -> None:
    labels = [label for task in generate.TASKS for label in generate.Grammar(task).labels]
    assert len(labels) == len(set(labels)) == 14


def bag_of_words_accuracy(train: list[tuple[str, str]], test: list[tuple[str, str]], longest: int) -> float:
    """Percent right of logistic regression on tf-idf weights of word n-grams up to ``longest``."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, longest)), LogisticRegression(C=10, max_iter=2000))
    model.fit([text for text, _ in train], [label for _, label in train])
    return 100 * float(model.score([text for text, _ in test], [label for _, label in test]))


@pytest.mark.integration
@pytest.mark.parametrize("longest", [1, 2])
def test_word_counts_tell_labels_and_tasks_often_but_not_always(
    stream: dict[str, dict[str, list[Row]]], longest: int
) -> None:
    which: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name, rows in stream.items():
        pairs = {split: [(row.text, row.target) for row in rows[split]] for split in which}
        assert 80 < bag_of_words_accuracy(pairs["train"], pairs["test"], longest) < 95, name
        for split, found in which.items():
            found += [(row.text, name) for row in rows[split]]
    assert 80 < bag_of_words_accuracy(which["train"], which["test"], longest) < 95
