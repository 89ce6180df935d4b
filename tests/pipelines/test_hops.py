"""How far it is from the command to the loss, and how often a run id is handed on: counted in runs that are traced."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

import pytest

from tests.tiny_config import write_config

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
SHORT = {"epochs": 1, "batch_size": 6, "learning_rate": 3e-2, "probe_rows": 8}

TRACER = '''
import json, os, sys, threading

ROOT, FOLDER = os.environ["HOPS_ROOT"] + "/", os.environ["HOPS_FOLDER"]


def profile(frame, event, argument):
    code = frame.f_code
    if event != "call" or code.co_name not in ("loss", "hand_out") or not code.co_filename.startswith(ROOT):
        return
    stack, first = [], code.co_name == "loss"
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith((ROOT + "amlora_dist/", ROOT + "pipelines/")):
            stack.append(code.co_filename.removeprefix(ROOT) + ":" + code.co_qualname)
        frame = frame.f_back
    name = os.path.join(FOLDER, ("worker" if first else "driver") + ".json")
    with open(name + str(os.getpid()), "w") as file:
        json.dump(stack[:0:-1], file)  # what is called is not one of those that are passed
    os.replace(name + str(os.getpid()), name)
    sys.setprofile(None)


class Watch:  # imports before these would take several times as long
    def find_spec(self, name, path=None, target=None):
        if name in ("pipelines.cluster.worker_group", "amlora_dist.training.loop"):
            sys.setprofile(profile)
            threading.setprofile(profile)


sys.meta_path.insert(0, Watch())
'''


def documented() -> list[str]:
    section = PAGE.partition("\n## From `main` to the loss\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)


@pytest.mark.slow
def test_from_main_to_the_loss_it_is_12_functions_in_8_files_with_workers(tmp_path: Path, amlora_home: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(TRACER, encoding="utf-8")
    config = write_config(tmp_path, tasks=("colours",), workers=2, training=SHORT)
    paths = os.pathsep.join([str(tmp_path / "hook"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "HOPS_ROOT": str(REPOSITORY), "HOPS_FOLDER": str(tmp_path)}
    environment |= {"AMLORA_HOME": str(amlora_home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "from pipelines.cli.main import main; main()", "run", str(config), "--run-id", "hops"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    passed = [*json.loads((tmp_path / "driver.json").read_text()), *json.loads((tmp_path / "worker.json").read_text())]
    assert passed == documented(), "docs/architecture.md lists what a run passes"
    assert len(passed) <= 12
    assert len({one.partition(":")[0] for one in passed}) <= 8


def test_a_run_id_is_handed_from_file_to_file_at_most_8_times(tmp_path: Path, amlora_home: Path) -> None:
    from pipelines.cli.main import app

    name, handed = "an-id-that-nothing-else-has", set[str]()

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and ours(code) and frame.f_back is not None and ours(frame.f_back.f_code):
            count = code.co_argcount + code.co_kwonlyargcount
            given = [frame.f_locals.get(one) for one in code.co_varnames[:count]]
            given = [one for one in given if type(one) is str and one == name]
            if given and frame.f_back.f_code.co_filename != code.co_filename:
                handed.add(f"{Path(code.co_filename).relative_to(REPOSITORY)}:{code.co_qualname}")

    config = write_config(tmp_path, tasks=("colours",), training=SHORT, registered_model="something-else")
    sys.setprofile(profile)
    threading.setprofile(profile)
    try:
        app(["run", str(config), "--run-id", name], standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert "pipelines/runs/sequence.py:run_sequence" in handed, "it was traced"
    assert len(handed) <= 8, sorted(handed)


def ours(code: CodeType) -> bool:
    """Whether it is of the two packages."""
    return code.co_filename.startswith((f"{REPOSITORY}/amlora_dist/", f"{REPOSITORY}/pipelines/"))
