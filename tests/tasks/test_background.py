"""The background: many kinds of text, none twice, none of a task's, packaged, and light to import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError
from amlora_dist.tasks import background
from amlora_dist.tasks.demo import generate

REPOSITORY = Path(__file__).resolve().parents[2]
COMPARISONS = ("pairs_inference", "pairs_questions", "word_sense", "choices", "reading_yes_no", "reading_answers")
"""Kinds that public test sets have; each is a part of its own, so that it can be left out where it is tested."""
HEAVY = ("torch", "transformers", "mlflow", "ray", "datasets", "deepspeed", "pandas", "numpy")


def words(text: str) -> set[str]:
    return set(text.lower().split())


def test_parts_hold_every_kind_and_each_kind_of_comparison_is_a_part_of_its_own() -> None:
    parts = background.parts()
    assert list(parts) == sorted(parts)
    assert {*COMPARISONS, "news", "questions", "chat", "code", "lists", "languages", "noise"} <= set(parts)
    assert 16 <= len(parts) <= 32


@pytest.mark.parametrize("part", background.parts())
def test_a_part_has_texts_enough_of_its_own_and_of_many_lengths(part: str) -> None:
    texts = background.texts(part)
    assert 70 <= len(texts) <= 150
    sizes = sorted(len(text) for text in texts)
    assert sizes[-1] <= 700
    assert sizes[len(sizes) * 9 // 10] >= 1.5 * sizes[len(sizes) // 10]
    assert len({text[:12] for text in texts}) >= 0.85 * len(texts), "many texts begin alike"


@pytest.mark.parametrize("part", background.parts())
def test_no_text_is_empty_and_only_noise_has_fewer_than_three_words(part: str) -> None:
    for text in background.texts(part):
        assert text == text.strip() and text
        unspaced = len(re.findall(r"[\u0e00-\u0e7f\u2e80-\u9fff]", text)) >= 8  # Thai, Chinese, Japanese have no spaces
        assert part == "noise" or unspaced or len(text.split()) >= 3, text


def test_no_text_is_there_twice_whatever_its_case_and_spaces() -> None:
    texts = [text for part in background.parts() for text in background.texts(part)]
    assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)


@pytest.mark.parametrize("part", background.parts())
def test_no_two_texts_of_a_part_are_one_template_filled_twice(part: str) -> None:
    long = [(text, words(text)) for text in background.texts(part) if len(words(text)) >= 8]
    alike = [(a, b) for (a, x), (b, y) in combinations(long, 2) if len(x & y) > 0.7 * len(x | y)]
    assert alike == []


def test_fields_of_a_comparison_are_joined_without_labels() -> None:
    fields = ("premise:", "hypothesis:", "question:", "passage:", "sentence 1", "choice 1", "answer:", "paragraph:")
    for part in COMPARISONS:
        for text in background.texts(part):
            assert "\n" in text and not any(name in text.lower() for name in fields), text


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a row, whatever its form."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def test_no_text_is_one_of_the_demo_stream() -> None:
    own = {text for part in background.parts() for text in background.texts(part)}
    for file in Path(generate.__file__).parent.glob("*.jsonl"):
        rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        assert not own & {text for row in rows for text in texts_in(row)}, file


def test_digest_is_of_names_and_texts_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = background.parts()
    before = background.digest()
    assert before == background.digest(parts[::-1]) == value_digest({name: background.texts(name) for name in parts})
    assert background.digest(parts[1:]) != before
    changed = {name: background.texts(name) for name in parts}
    changed["news"] = (*changed["news"][:-1], changed["news"][-1] + ".")
    monkeypatch.setattr(background, "texts", changed.__getitem__)
    assert background.digest() != before
    assert background.digest([name for name in parts if name != "news"]) == value_digest(
        {name: changed[name] for name in parts if name != "news"}
    )


def test_an_unknown_part_is_named_together_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"'sport'.*chat.*questions"):
        background.texts("sport")
    with pytest.raises(UserError, match="'sport'"):
        background.digest(["news", "sport"])


def test_texts_are_packaged() -> None:
    (data,) = re.findall(r"(?m)^amlora_dist = \[(.*)\]$", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = re.findall(r'"([^"]+)"', data)
    for part in background.parts():
        assert files("amlora_dist").joinpath(f"tasks/background/{part}.jsonl").is_file()
        assert any(fnmatch(f"tasks/background/{part}.jsonl", pattern) for pattern in patterns)


def test_lines_are_canonical_json_of_one_field() -> None:
    for part in background.parts():
        raw = files(background).joinpath(f"{part}.jsonl").read_bytes().decode("utf-8")
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in background.texts(part)]
        assert raw == "\n".join(lines) + "\n"


def test_reading_the_texts_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom amlora_dist.tasks import background\nbackground.digest()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
