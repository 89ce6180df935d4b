"""`amlora evaluate` where lm-evaluation-harness is not installed; with it: `test_harness.py`."""

from __future__ import annotations

import sys

import pytest

from pipelines.cli.main import app


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert app(["evaluate", "models:/any/1", "--tasks", "hellaswag"], standalone_mode=False) == 2
    assert "pip install 'amlora-dist[evaluate]'" in capsys.readouterr().err
