"""Tables and progress: complete on any width, plain in a pipe."""

from __future__ import annotations

import io

from rich.console import Console

from pipelines.cli.tables import show_result
from pipelines.runs.executor import threads_remark
from pipelines.runs.progress import Score, _Lines, progress_for
from tests.pipelines.test_cli import RESULT


def printed(result, width=100, **keys) -> str:
    stream = io.StringIO()
    show_result(result, Console(file=stream, width=width, highlight=False), **keys)
    return stream.getvalue()


def wide_result(count: int) -> dict:
    names = [f"task-number-{n}" for n in range(count)]
    rows = [[(t * count + i) / count**2 if i <= t + 1 else None for i in range(count)] for t in range(count)]
    return {**RESULT, "tasks": names, "accuracy_matrix": rows, "untrained": None, "oracle": None}


def test_matrix_has_untrained_first_and_oracle_last():
    lines = printed(RESULT).splitlines()
    first, last = (next(n for n, line in enumerate(lines) if line.startswith(row)) for row in ("untrained", "oracle"))
    assert [line.split()[0] for line in lines[first : last + 1]] == ["untrained", "after", "after", "oracle"]
    assert lines[first + 2].split() == ["after", "2", "chat_mood", "0.850", "0.800"]


def test_scores_are_called_what_they_are():
    first, second = RESULT["tasks"]
    lines = printed({**RESULT, "task_metrics": {first: "rouge_l", second: "rouge_l"}}).splitlines()
    assert "ROUGE-L" in lines and "accuracy" not in lines
    mixed = printed({**RESULT, "task_metrics": {first: "accuracy", second: "rouge_l"}}, width=200)
    assert "email_route (accuracy)" in mixed and "chat_mood (ROUGE-L)" in mixed
    assert "scores" in mixed.splitlines() and "accuracy" in printed(RESULT).splitlines()
    score = Score("a", "router", "rouge_l", 0.25, 8, 3)
    assert str(score) == "router    a: ROUGE-L 0.250 (8 rows, 3 of them answered as before)"


def test_a_machine_that_others_use_is_said_to_be_one(monkeypatch):
    import os

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.2, 1.0, 1.0))
    assert threads_remark().startswith("2 CPU threads, and others use this machine (load 7 on 2 CPUs)")
    assert "OMP_NUM_THREADS=1" in threads_remark()
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 9.0, 9.0))
    assert threads_remark() == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (7.2, 1.0, 1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads_remark() == ""


def test_undefined_metric_is_called_undefined():
    line = next(line for line in printed(RESULT).splitlines() if line.startswith("forward transfer single"))
    assert "undefined" in line


def test_every_cell_of_a_long_sequence_is_shown_on_a_narrow_terminal():
    result = wide_result(15)
    text = printed(result, width=80)
    assert "accuracy, tasks 1 to" in text
    for row in result["accuracy_matrix"]:
        assert all(f"{value:.3f}" in text for value in row if value is not None)
    assert max(map(len, text.splitlines())) <= 80


def test_mlflow_is_named_with_the_command_that_opens_it():
    text = printed(RESULT, tracking_uri="sqlite:////home/me/.amlora/mlflow.db")
    assert "mlflow ui --backend-store-uri sqlite:////home/me/.amlora/mlflow.db" in text


def test_reused_stage_is_told_apart():
    stage = {
        "task": "helpdesk/email_route",
        "fingerprint": "f" * 64,
        "reused": True,
        "version": 1,
        "train_seconds": 0.0,
        "score_seconds": None,
        "other_seconds": 1.25,
        "tokens": 12345,
        "tokens_per_second": None,
    }
    line = next(line for line in printed({**RESULT, "stages": [stage]}, 200).splitlines() if "ffffffffffff" in line)
    assert line.split() == ["1", "helpdesk/email_route", "1", "yes", "0.0", "-", "1.2", "12,345", "-", "f" * 12]


def test_run_without_a_finished_stage_can_be_shown():
    assert "nothing yet" in printed({**RESULT, "accuracy_matrix": [], "untrained": None, "oracle": None})


def test_progress_in_a_pipe_is_plain_lines_and_seldom():
    stream, now = io.StringIO(), [0.0]
    lines = _Lines(stream, clock=lambda: now[0])
    lines.stage("email", 2, 4)
    for done in range(1, 61):
        now[0] += 1
        lines.step(done, 60, 2.0 / done, 310.4)
    lines.note("published version 2")
    lines.close()
    text = stream.getvalue().splitlines()
    assert text[0] == "stage 2/4: email"
    assert text[1] == "  step 10/60, loss 0.2000, 310 tokens/s, 0:50 left"
    assert text[-2:] == ["  step 60/60, loss 0.0333, 310 tokens/s", "published version 2"]
    assert len(text) == 8


def test_progress_knows_a_pipe_from_a_terminal():
    assert isinstance(progress_for(io.StringIO()), _Lines)


def test_bar_on_a_terminal_shows_stage_loss_and_speed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = progress_for(stream)
    bar.stage("email", 1, 4)
    bar.step(3, 10, 0.5, 200.0)
    bar.note("a [line] above")
    bar.close()
    bar.close()
    text = stream.getvalue()
    assert "1/4 email" in text
    assert "loss 0.5000  200 tokens/s" in text
    assert "a [line] above" in text
