"""Tables and progress: complete on any width, plain in a pipe."""

from __future__ import annotations

import io
import re
import time

from rich.console import Console
from rich.table import Table

from amlora_dist.config.loading import load_config
from pipelines.cli.tables import console_for, show_result
from pipelines.runs.executor import threads_remark
from pipelines.runs.inputs import gather_inputs
from pipelines.runs.outlook import Outlook, StageSize, stage_sizes
from pipelines.runs.plan import BankState
from pipelines.runs.progress import Score, _Lines, progress_for
from tests.pipelines.test_cli import RESULT
from tests.tiny_config import write_config


class Terminal(io.StringIO):
    """What a bar is drawn on."""

    def isatty(self) -> bool:
        return True


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


def test_a_text_in_a_table_is_shown_as_it_is():
    stream = io.StringIO()
    table = Table("name [b]", box=None)
    table.add_row("accuracy[colours] >= 0.6 [/b] :smile: \x1b[31mred\u202e")
    console = console_for(stream)
    console.print(table)
    console.print("[INST] a [/INST]")
    shown = stream.getvalue()
    assert "name [b]" in shown and "accuracy[colours] >= 0.6 [/b] :smile: \\x1b[31mred\\u202e" in shown
    assert shown.splitlines()[-1] == "[INST] a [/INST]"


def test_a_machine_that_others_use_is_reported_as_one(monkeypatch):
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


def test_reused_stage_is_marked():
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


STAGES = [StageSize("chat", 60, 40), StageSize("email", 60, 40)]


def test_progress_in_a_pipe_is_plain_lines_and_seldom():
    stream, now = io.StringIO(), [0.0]
    lines = _Lines(stream, clock=lambda: now[0])
    lines.outline(STAGES)
    lines.stage("chat", 1, 2)
    for done in range(61):
        now[0] += 1
        if done:
            lines.step(done, 60, 2.0 / done, 310.4)
    for done in range(0, 41, 2):
        now[0] += 1
        lines.rows("chat", "router", done, 40)
    lines.score(Score("chat", "router", "accuracy", 0.5, 40))
    lines.note("published version 1")
    lines.stage("email", 2, 2)
    lines.close()
    text = stream.getvalue().splitlines()
    assert text[0] == "stage 1/2: chat", "nobody knows yet how long a row takes"
    # a second a row: 51 of this stage and 40 that are scored, 100 of the next one
    assert text[1] == "  step 9/60, loss 0.2222, 310 tokens/s, 3:11 left for all"
    assert "  step 60/60, loss 0.0333, 310 tokens/s, 2:20 left for all" in text
    scored = [line for line in text if "scoring" in line]
    assert scored[0].startswith("  scoring chat (router): 18/40 rows, 1:") and len(scored) == 2, "a row takes half a second"
    assert text[-3:-1] == ["  router    chat: accuracy 0.500 (40 rows)", "published version 1"]
    assert text[-1].startswith("stage 2/2: email, 1:2")
    assert len([line for line in text if "step" in line]) == 7


def test_the_share_that_is_done_is_of_the_whole_run_and_never_less_than_before():
    now = [0.0]
    outlook = Outlook(lambda: now[0])
    assert outlook.share is None and outlook.left_s is None, "the run's size is not known"
    outlook.outline(STAGES)
    shares = []

    def timed(of) -> None:
        now[0] += 1
        of()
        shares.append(outlook.share)

    timed(lambda: outlook.stage(1))
    timed(lambda: outlook.step(30, 60))  # resumed: what was done before it cost nothing today
    timed(lambda: outlook.step(40, 60))
    timed(lambda: outlook.scored("chat", "router", 40))  # an early end of training
    timed(lambda: outlook.stage(2))
    timed(lambda: outlook.step(60, 60))
    timed(lambda: outlook.rows("chat", "router", 20))
    timed(lambda: outlook.scored("chat", "router", 20))  # 20 rows fewer than were planned
    timed(lambda: outlook.other())
    assert shares == [0.0, 0.15, 0.2, 0.4, 0.5, 0.8, 0.9, 0.9, 0.9]
    outlook.scored("email", "router", 500)
    assert outlook.share == 0.99, "it is whole when the run has ended, and not before"


def test_rows_that_are_scored_again_after_a_restart_count_once():
    now = [0.0]
    outlook = Outlook(lambda: now[0])
    outlook.outline([StageSize("chat", 0, 100), StageSize("email", 0, 100)])
    outlook.stage(1)
    for attempt in range(3):  # workers die in the middle of the second score, and begin with the first one again
        outlook.rows("chat", "router", 0)
        now[0] += 40
        outlook.scored("chat", "router", 40)
        outlook.rows("email", "router", 0)
        now[0] += 20
        outlook.rows("email", "router", 20)
        assert outlook.share == 60 / 200, attempt
    assert outlook.left_s == 140 * 3, "a row takes three times as long"


def test_a_run_begins_without_the_stages_of_the_one_before(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    stream = Terminal()
    bar = progress_for(stream)
    bar.outline([StageSize("email", 60, 40)])
    bar.stage("email", 1, 1)
    bar.step(60, 60, 0.5, 200.0)
    time.sleep(0.2)
    assert "60%" in stream.getvalue()
    begun = len(stream.getvalue())
    bar.outline(())
    time.sleep(0.2)
    bar.step(1, 20, 0.5, 200.0)  # of a race of learning rates, before the first stage
    time.sleep(0.2)
    bar.close()
    shown = stream.getvalue()[begun:].partition("starting: preparing")
    assert shown[1], stream.getvalue()
    assert "starting: training 1/20" in shown[2] and "email" not in shown[2] and "%" not in shown[2]


def test_a_run_knows_how_many_rows_each_stage_trains_and_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    config = load_config(write_config(tmp_path, rows=32))
    sizes = stage_sizes(gather_inputs(config, tmp_path / "home"), BankState())
    assert [size.task for size in sizes] == ["colours", "shapes", "sizes"]
    assert {size.trained for size in sizes} == {32 * 4}
    # seen and next; before the first stage untrained, after the last one told the task: 9 test rows each
    assert [size.scored for size in sizes] == [9 * (2 + 3), 9 * 3, 9 * (3 + 3)]


def test_progress_knows_a_pipe_from_a_terminal():
    assert isinstance(progress_for(io.StringIO()), _Lines)


def test_bar_on_a_terminal_shows_stage_loss_and_speed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    stream = Terminal()
    bar = progress_for(stream)
    bar.outline([StageSize("email", 60, 40), StageSize("chat", 60, 40)])
    bar.stage("email", 1, 2)
    bar.step(30, 60, 0.5, 200.0)
    bar.note("a [line] above")
    time.sleep(0.2)  # rich draws ten times a second
    bar.step(60, 60, 0.4, 200.0)
    bar.rows("email", "router", 20, 40)
    time.sleep(0.2)
    bar.phase("publishing")
    time.sleep(0.2)
    bar.close()
    bar.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"1/2 email: training 30/60 +\S+ +15% +loss 0.5000  200 tokens/s", text)
    assert re.search(r"1/2 email: scoring email \(router\) 20/40 +\S+ +40% ", text)
    assert re.search(r"1/2 email: publishing +\S+ +40% .* left", text)
    assert "a [line] above" in text and "100%" not in text
