"""The command line: exit codes, one clear message, one JSON object on standard output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration  # starts processes

DEMO = "configs/demo.yaml"

RESULT = {
    "run_id": "r1",
    "registered_model": "helpdesk",
    "method": "am_lora",
    "seed": 0,
    "tasks": ["helpdesk/email_route", "helpdesk/chat_mood"],
    "accuracy_matrix": [[0.9, 0.1], [0.85, 0.8]],
    "untrained": [0.0, 0.25],
    "oracle": [0.9, 0.8],
    "metrics": {
        "average_performance": 0.825,
        "backward_transfer": -0.05,
        "forward_transfer_gem": -0.15,
        "forward_transfer_single": None,
        "forgetting": 0.05,
    },
    "stages": [],
}

# A sequence that does what a test asks for: the command line around it is the real one.
FAKE = """
import os, sys, types
from amlora_dist import errors
fake = types.ModuleType("pipelines.runs.sequence")
def run_sequence(config, *, run_id, progress, verbose, **more):
    print("noise of a library")
    os.write(1, b"noise of a C library\\n")
    progress.stage("email", 1, 1)
    progress.step(1, 2, 1.5, 300.0)
    {body}
    return {result!r}
fake.run_sequence = run_sequence
stored = types.ModuleType("pipelines.runs.results")
stored.load_result = lambda run_id, tracking_uri: run_sequence(None, run_id=run_id, progress=types.SimpleNamespace(
    stage=lambda *a: None, step=lambda *a: None), verbose=False)
sys.modules["pipelines.runs.sequence"], sys.modules["pipelines.runs.results"] = fake, stored
from pipelines.cli.main import main
main()
"""


@pytest.fixture
def amlora(repository: Path):
    def amlora(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=timeout)

    return amlora


@pytest.fixture
def amlora_with(repository: Path):
    """The command line over a sequence whose body is given."""

    def amlora_with(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FAKE.format(body=body, result=RESULT), *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)

    return amlora_with


HEAVY = ("torch", "transformers", "ray", "mlflow", "datasets", "deepspeed", "numpy", "pandas")
LOADED = """
import sys
from pipelines.cli.main import main
try:
    main()
finally:
    loaded = [name for name in {heavy!r} if name in sys.modules]
    print("loaded:", loaded, file=sys.stderr)
"""


def light(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, which says at the end what it has imported of the heavy libraries: a promise of speed that
    does not depend on how busy the machine is."""
    command = [sys.executable, "-c", LOADED.format(heavy=HEAVY), *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert "loaded: []" in done.stderr, done.stderr
    return done


def test_help_imports_nothing_heavy_and_names_the_commands(repository):
    done = light(repository, "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "validate", "show", "tasks", "doctor"))


def test_validate_imports_nothing_heavy_and_says_what_the_run_will_do(repository):
    done = light(repository, "validate", DEMO, "model.source=some/model")
    assert done.returncode == 0, done.stderr
    assert "configs/demo.yaml: valid" in done.stdout
    assert "4. helpdesk/review_topic: 4 labels" in done.stdout


def test_validate_json_prints_the_resolved_configuration(amlora):
    done = amlora("validate", DEMO, "--json", "seed=3", "model.source=some/model")
    assert json.loads(done.stdout)["seed"] == 3


@pytest.mark.parametrize("command", ["validate", "run"])
def test_faults_are_listed_on_standard_error_with_exit_code_2(amlora, command, amlora_home):
    done = amlora(command, DEMO, "trainig.epochs=3", "adapters.rank=0", "model.source=some/model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "configs/demo.yaml: 2 faults" in done.stderr
    assert "did you mean 'training'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not amlora_home.exists()


def test_verbose_shows_the_traceback(amlora):
    done = amlora("validate", DEMO, "seed=x", "-v")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [("run",), ("validate", DEMO, "--what")])
def test_wrong_usage_has_exit_code_2(amlora, arguments):
    done = amlora(*arguments)
    assert done.returncode == 2
    assert "Usage: amlora" in done.stderr


def test_run_ids_that_could_be_paths_are_refused(amlora):
    done = amlora("run", DEMO, "model.source=some/model", "--run-id", "../up")
    assert done.returncode == 2
    assert "--run-id: found '../up'" in done.stderr


@pytest.mark.parametrize("command", [("run", DEMO, "model.source=some/model", "--run-id", "r1"), ("show", "r1")])
def test_json_is_alone_on_standard_output(amlora_with, command):
    done = amlora_with("pass", *command, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == RESULT
    assert "noise of a library" in done.stderr
    assert "noise of a C library" in done.stderr


def test_run_prints_the_table_on_standard_output_and_progress_on_standard_error(amlora_with):
    done = amlora_with("pass", "run", DEMO, "model.source=some/model", "--run-id", "r1")
    assert done.returncode == 0, done.stderr
    assert "after 2 chat_mood" in done.stdout
    assert "noise" not in done.stdout
    assert "stage 1/1: email" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


ENDS = {
    "mendable": ("raise errors.UserError('no such target')", 2, "error: no such target"),
    "held": ("raise errors.HeldError('held by another')", 3, "error: held by another"),
    "failed": ("raise errors.TrainingError('NaN twice')", 4, "error: NaN twice"),
    "our fault": ("raise KeyError('x')", 1, "unexpected KeyError"),
    "a file cut short": ("raise EOFError('too few bytes')", 1, "error: unexpected EOFError: too few bytes\n"),
    "a module cut short": ("raise EOFError('marshal data too short')", 1, " -m compileall -qf /"),
    "interrupted": ("os.kill(os.getpid(), 2); import time; time.sleep(5)", 130, "goes on from here"),
    "terminated": ("os.kill(os.getpid(), 15); import time; time.sleep(5)", 143, ""),
    "terminated under Ray's own handler": ("sys.exit(15)", 143, ""),
}


@pytest.mark.parametrize(("body", "code", "says"), ENDS.values(), ids=ENDS)
def test_exit_code_and_message_of_every_end(amlora_with, body, code, says):
    done = amlora_with(body, "run", DEMO, "model.source=some/model", "--json")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_our_own_fault_shows_its_place_only_on_request(amlora_with):
    done = amlora_with("raise KeyError('x')", "run", DEMO, "model.source=some/model", "-v")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_standard_output_that_goes_away_is_no_traceback(repository):
    command = f"{sys.executable} -m pipelines.cli tasks | true"
    done = subprocess.run(command, shell=True, cwd=repository, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_gone_is_said_and_nothing_else(repository, tmp_path):
    command = f"mkdir gone && cd gone && rmdir ../gone && PYTHONPATH={repository} {sys.executable} -m pipelines.cli versions"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the folder that this was started in is gone") and done.stderr.count("\n") == 1


def test_tasks_lists_the_built_in_ones(amlora):
    done = amlora("tasks")
    assert done.returncode == 0, done.stderr
    assert "helpdesk/email_route" in done.stdout
    assert "dbpedia" in done.stdout


def test_tasks_says_which_revision_of_the_hub_is_read(amlora):
    done = amlora("tasks", "superni/task875_emotion_classification")
    assert "Hub Muennighoff/natural-instructions, revision a29a9757125f4bb1c26445ad0d2ef7d9b2cc9c4c\n" in done.stdout


def test_tasks_shows_the_turns_of_a_conversation(amlora):
    output = amlora("tasks", "helpdesk/polite_reply").stdout
    assert "system: Say this politely." in output and "\nuser: " in output and "\nassistant: " in output


def test_tasks_shows_a_prompt_as_the_model_sees_it(amlora):
    done = amlora("tasks", "helpdesk/chat_mood", "--style", "options")
    assert done.returncode == 0, done.stderr
    assert "Options: " in done.stdout
    assert "Answer:[ " in done.stdout


def test_unknown_task_and_style_are_answered_with_what_is_known(amlora):
    assert "did you mean 'mnli'?" in amlora("tasks", "mnly").stderr
    done = amlora("tasks", "mnli", "--style", "optoins")
    assert done.returncode == 2
    assert "question, options, bare, named" in done.stderr


@pytest.mark.integration
def test_doctor_finds_this_machine_fit(amlora):
    done = amlora("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, count, last = done.stdout.splitlines()
    assert all(line.startswith("warn  ") for line in lines), "what is ok is counted only"
    good, everything = re.fullmatch(r"ok    (\d+) of (\d+) checks", count).groups()
    assert int(everything) - int(good) == len(lines) and int(good) > 20
    assert last.startswith(f"{len(lines)} thing") if lines else last == "fit: nothing to fix"


@pytest.mark.integration
def test_doctor_has_exit_code_2_where_something_is_bad(amlora, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("AMLORA_HOME", str(blocked / "home"))
    done = amlora("doctor")
    assert done.returncode == 2
    assert "bad   AMLORA_HOME" in done.stdout
    assert "set AMLORA_HOME to a folder that can be written" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert "1 thing to fix; first AMLORA_HOME: set AMLORA_HOME to a folder that can be written" in last


def test_the_doctor_names_the_first_thing_to_do():
    from pipelines.cluster.local_checks import Check, count_of, first_of, line_of

    good, low = Check("CPUs", "ok", "2"), Check("memory", "warn", "1 GiB", "end something")
    no_torch, no_store = Check("torch", "bad", "not installed", "pip install torch"), Check("MLflow store", "bad", "away")
    assert first_of([good]) == "fit: nothing to fix"
    assert first_of([good, low]) == "1 thing to look at; first memory: end something"
    assert first_of([low, no_torch, no_store]) == "2 things to fix; first torch: pip install torch"
    assert first_of([no_store]) == "1 thing to fix; first MLflow store: away", "where no fix is known, what was found"
    assert count_of([good, low, no_torch]) == "ok    1 of 3 checks"
    assert line_of(good, every=False) == "" and "CPUs" in line_of(good, every=True)


def test_signals_are_known_numbers():
    assert (128 + signal.SIGINT, 128 + signal.SIGTERM) == (130, 143)
    assert os.name == "posix"
