"""The page on adding a method: its example runs as it is there, and its table names the methods there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.methods import METHODS, ZERO_3, MethodEntry
from amlora_dist.methods.settings import MethodSettings
from tests.methods.stages import stages
from tests.tiny_config import write_config


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture
def example(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example, added as the page says, but to a folder of its own; its name."""
    (code,) = re.findall(r"```python\n# amlora_dist/methods/warm_lora\.py\n(.*?)```", page, flags=re.DOTALL)
    (line,) = re.findall(r'```python\n    "(\w+)": MethodEntry\("amlora_dist\.methods\.([\w.:]+)", ZERO_3\),\n```', page)
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "warm_lora.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "added"))
    monkeypatch.setitem(METHODS, line[0], MethodEntry(line[1], ZERO_3))
    return str(line[0])


def test_the_example_trains_and_its_penalty_holds_it_back(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warm_lora

    file = write_config(tmp_path, tasks=("colours", "shapes"), method=example)
    moved, fingerprints = {}, {}
    for pull in (0.0, 1.0):
        monkeypatch.setattr(warm_lora.WarmLoRA, "PULL", pull)
        first, second = stages(load_config(file, ["training.epochs=2"]), tmp_path / str(pull), score=False)
        pairs = [(first.result.adapter.a[m], second.result.adapter.a[m]) for m in first.result.adapter.a]
        moved[pull] = sum(float((new - old).square().sum()) for old, new in pairs)
        fingerprints[pull] = [first.work.fingerprint, second.work.fingerprint]
    assert 0 < moved[1.0] < 0.5 * moved[0.0]
    assert fingerprints[0.0][0] == fingerprints[1.0][0] and fingerprints[0.0][1] != fingerprints[1.0][1]


@pytest.mark.integration
def test_the_example_runs_a_sequence_like_any_other_method(example: str, tmp_path: Path) -> None:
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    file = write_config(tmp_path, tasks=("colours", "shapes"), method=example)
    result = run_sequence(load_config(file), run_id="warm", progress=Silent())
    assert result["method"] == example
    assert [stage["version"] for stage in result["stages"]] == [1, 2]
    assert result["metrics"]["average_performance"] is not None


def test_the_page_lists_every_method_and_every_setting(page: str) -> None:
    listed = re.findall(r"^\| `(\w+)` \|", page.split("##")[0], flags=re.MULTILINE)
    assert listed == list(METHODS)
    assert all(f"`{name}`" in page for name in MethodSettings.__dataclass_fields__)
