"""What one method or one router brings stays in its own files: whoever injects, scores or loads a bank knows no method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BROUGHT = {
    "the pool of prompts": (r"(?i)l2p|prompt_?pool", 3),
    "the literal selectors": (r"\bliteral\b|Literal(?:Settings|Selector)", 10),
}
"""Names of what is brought, and in how many files of the code they may be."""


@pytest.mark.parametrize("what", BROUGHT)
def test_what_is_brought_stands_in_few_files(what: str, repository: Path) -> None:
    names, most = BROUGHT[what]
    files = [file for package in ("amlora_dist", "pipelines") for file in sorted((repository / package).rglob("*.py"))]
    found = [str(file.relative_to(repository)) for file in files if re.search(names, file.read_text(encoding="utf-8"))]
    assert len(found) <= most, found
    assert found, "the names are still those of the code"
