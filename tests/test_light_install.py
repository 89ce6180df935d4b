"""``requirements-light.txt`` is enough to classify and serve the folder of a bank: nothing else can be imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.bank_with_base import texts_of, write_working_bank

ABSENT = ("ray", "mlflow", "deepspeed", "pyarrow", "datasets")
"""Named here, so that the list cannot grow by them."""

PROGRAM = """
import importlib.metadata as metadata, json, re, sys, threading, time, urllib.request

from packaging.requirements import Requirement

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def with_needs(name, found):
    if plain(name) in found:
        return found
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return found
    found.add(plain(name))
    for need in map(Requirement, needs):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            with_needs(need.name, found)
    return found

listed, absent, folder, text = set(json.loads(sys.argv[1])), set(json.loads(sys.argv[2])), sys.argv[3], sys.argv[4]
allowed = {plain(name) for name in listed} | with_needs("torch", set()) | {"amlora-dist"}
hidden = {top for top, owners in metadata.packages_distributions().items() if not allowed & set(map(plain, owners))}
assert absent <= hidden, absent - hidden

class Without:  # a finder that does not find what is not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in absent:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported")

import uvicorn
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.app import build_app
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.connections import http_protocol
from amlora_dist.serving.service import Service
from amlora_dist.serving.settings import ServeSettings

model = AMLoRAModel.from_bank(folder, device="cpu")
found = model.classify([text])[0]
settings = ServeSettings()
app = build_app(Service(ServedBank(model, "words"), settings))
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http=http_protocol(settings)))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
deadline = time.monotonic() + 60
while not server.started:
    assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
    time.sleep(0.05)
port = server.servers[0].sockets[0].getsockname()[1]
asked = urllib.request.Request(
    f"http://127.0.0.1:{port}/v1/classifications", json.dumps({"input": text}).encode(), {"content-type": "application/json"}
)
with urllib.request.urlopen(asked, timeout=60) as answer:
    served = json.load(answer)["data"][0]["label"]
server.should_exit = True
thread.join(60)
from typer.testing import CliRunner
from pipelines.cli.main import app as commands

pulled = CliRunner().invoke(commands, ["pull", "models:/demo@champion", "nowhere"])
found = {"label": found.label, "task": found.task, "served": served, "pull": [pulled.exit_code, pulled.stderr]}
print(json.dumps(found | {"hidden": sorted(hidden & set(sys.modules))}))
"""


def listed(file: Path) -> list[str]:
    """The lines of a file of requirements, without remarks."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def test_the_light_list_is_pinned_as_the_project_is_tested(repository: Path) -> None:
    light = listed(repository / "requirements-light.txt")
    assert light and set(light) <= set(listed(repository / "constraints.txt"))
    names = {line.partition("==")[0].lower() for line in light}
    assert not names & {*ABSENT, "torch"}, "torch is chosen by the machine, and comes first"


def megabytes(distribution: metadata.Distribution) -> float:
    """Of its files as its wheel lists them."""
    return sum(file.size or 0 for file in distribution.files or []) / 1e6


def test_the_light_list_is_as_large_as_the_page_says(repository: Path) -> None:
    page = (repository / "docs" / "evidence" / "memory.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"^\| light \| \d+ \| (\d+) \| (\d+) \|", page, flags=re.MULTILINE)
    rest = int(stated[0]) - int(stated[1])
    names = [line.partition("==")[0] for line in listed(repository / "requirements-light.txt")]
    found = sum(megabytes(metadata.distribution(name)) for name in names)
    assert 0.85 * rest < found < 1.1 * rest, "torch and what it needs are the machine's own choice"
    assert found < 0.5 * sum(megabytes(metadata.distribution(name)) for name in ("ray", "mlflow", "deepspeed", "pyarrow"))


@pytest.mark.integration
def test_a_bank_is_classified_and_served_with_the_light_list_alone(repository: Path, tmp_path: Path) -> None:
    write_working_bank(tmp_path / "bank", tmp_path / "base", "llama")
    names = [re.split("==", line)[0] for line in listed(repository / "requirements-light.txt")]
    text = texts_of("shapes", 1, "light")[0]
    command = [sys.executable, "-c", PROGRAM, json.dumps(names), json.dumps(ABSENT), str(tmp_path / "bank"), text]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["task"] == "shapes" and found["label"] == found["served"] == text.split()[-1]
    assert found["hidden"] == []
    assert found["pull"][0] == 2 and found["pull"][1].startswith("error: mlflow is not installed, and this command needs it")
