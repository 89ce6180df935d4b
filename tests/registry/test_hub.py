"""Banks on the Hub, through its own client: what is pulled is what was pushed, and every refusal is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.card import adapter_readme, readme
from amlora_dist.registry.hub import parse_hub_uri
from amlora_dist.registry.manifest import AccuracyMatrix, BaseEntry, read_manifest, replace
from amlora_dist.tasks.task_entry import TaskEntry
from pipelines.cli.main import app
from tests.ports import free_port
from tests.registry.fake_hub import TOKEN, FakeHub, Repository, running_hub
from tests.registry.tiny_banks import TASKS, fingerprint, rewrite, tiny_adapter, tiny_bank

pytestmark = pytest.mark.integration


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of this test's, which the client in this process talks to, and its children by HF_ENDPOINT."""
    with running_hub() as made:
        point(monkeypatch, made.url, tmp_path)
        yield made


def point(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    for name, value in {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    constants = "huggingface_hub.constants"  # read when the client was imported
    monkeypatch.setattr(f"{constants}.ENDPOINT", url)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)


def amlora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def good(*arguments: object) -> str:
    done = amlora(*arguments)
    assert done.exit_code == 0, done.output + done.stderr
    return done.stdout


def bad(*arguments: object) -> str:
    done = amlora(*arguments)
    assert done.exit_code == 2, done.output + done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_what_is_pulled_is_what_was_pushed_and_the_repository_is_private(hub: FakeHub, tmp_path: Path) -> None:
    manifest = tiny_bank(tmp_path / "bank")
    assert f"is at {hub.url}/me/helpdesk/commit/" in good("push", tmp_path / "bank", "me/helpdesk")
    there = hub.repositories["me/helpdesk"]
    assert there.private and not any(path.startswith("statistics/") for path in there.files)
    folders = {"adapters/1-helpdesk-email", "adapters/2-agnews", "adapters/3-yahoo", ""}
    assert {path.rpartition("/")[0] for path in there.files} == folders, "no base model"
    environment = os.environ | {"AMLORA_HOME": str(tmp_path / "home")}
    pulled = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "pull", "hf://me/helpdesk", str(tmp_path / "pulled")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert pulled.returncode == 0, pulled.stderr
    assert read_manifest(tmp_path / "pulled").digest() == manifest.digest()
    bank = read_bank(tmp_path / "pulled")
    assert [one.digest() for one in bank.adapters] == [line.digest for line in manifest.adapters] and not bank.statistics
    assert "statistics" in bad("pull", "hf://me/helpdesk", tmp_path / "whole", "--statistics")
    assert "expected 0000000" in bad("pull", "hf://me/helpdesk", tmp_path / "x", "--expect-digest", "0" * 64)


def test_a_newer_bank_replaces_the_older_one_and_brings_its_statistics_if_asked(hub: FakeHub, tmp_path: Path) -> None:
    tiny_bank(tmp_path / "one", ["a", "b", "c"])
    adapters = [tiny_adapter("a", 1, seed=1), tiny_adapter("b", 2, seed=1)]
    second = tiny_bank(tmp_path / "two", ["a", "b"], adapters=adapters)
    good("push", tmp_path / "one", "me/bank")
    good("push", tmp_path / "two", "me/bank", "--statistics", "--base-model", "owner/base-1.5")
    files = hub.repositories["me/bank"].files
    assert not any("3-c" in path for path in files), "what the newer bank lacks is gone"
    assert b"base_model: owner/base-1.5" in files["README.md"]
    assert f"hf://me/bank@main is in {tmp_path / 'two-again'}" in good(
        "pull", "hf://me/bank@main", tmp_path / "two-again", "--statistics"
    )
    bank = read_bank(tmp_path / "two-again")
    assert bank.manifest.digest() == second.digest() and sorted(bank.statistics) == ["a", "b"]
    assert "is there already" in bad("pull", "hf://me/bank", tmp_path / "two-again")


def test_what_was_changed_on_the_hub_is_not_pulled(hub: FakeHub, tmp_path: Path) -> None:
    tiny_bank(tmp_path / "bank", ["a", "b"])
    good("push", tmp_path / "bank", "me/bank")
    files = hub.repositories["me/bank"].files
    path = "adapters/2-b/adapter_model.safetensors"
    whole, files[path] = files[path], files[path][:-1] + bytes([files[path][-1] ^ 1])
    assert f"{path}: sha256: found" in bad("pull", "hf://me/bank", tmp_path / "pulled")
    files[path] = whole + b"x"
    assert f"{path}: found {len(whole) + 1} bytes on the Hub" in bad("pull", "hf://me/bank", tmp_path / "pulled")
    files[path], files["model.py"] = whole, b"import os"
    assert "model.py: found a file that the manifest does not name" in bad("pull", "hf://me/bank", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    del files["model.py"]
    good("pull", "hf://me/bank", tmp_path / "pulled")


def test_every_refusal_of_the_hub_is_one_line(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bank(tmp_path / "bank", ["a"])
    bank = tmp_path / "bank"
    assert "somebody-else/bank is somebody else's, or the token may not write it" in bad("push", bank, "somebody-else/bank")
    assert "me/nothing: not on the Hub, or not for this token" in bad("pull", "hf://me/nothing")
    hub.repositories["somebody/private"] = Repository(private=True)
    assert "somebody/private: not on the Hub, or not for this token" in bad("pull", "hf://somebody/private")
    hub.repositories["me/other"] = Repository(private=True, files={"model.safetensors": b"weights"})
    assert "me/other holds 'model.safetensors' and no bank" in bad("push", bank, "me/other")
    assert "holds no manifest.json, expected a bank" in bad("pull", "hf://me/other")
    hub.repositories["me/open"] = Repository(private=False)
    assert "me/open is public" in bad("push", bank, "me/open")
    assert not hub.repositories["me/open"].files
    good("push", bank, "me/open", "--public")
    assert "no such revision" in bad("pull", "hf://me/open@v7")
    assert "expected OWNER/NAME" in bad("push", bank, "bank") and "expected OWNER/NAME" in bad("pull", "hf://bank")
    for name in ("me/a..b", "me/a--b", "me/a.git", f"me/{'b' * 120}"):
        assert "expected OWNER/NAME as the Hub has it" in bad("push", bank, name)
        assert "expected OWNER/NAME as the Hub has it" in bad("pull", f"hf://{name}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not take this token for me/bank" in bad("push", bank, "me/bank")
    assert "hf auth login" in bad("pull", "hf://me/open")
    point(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    assert "does not answer" in bad("pull", "hf://me/open") and "does not answer" in bad("push", bank, "me/bank")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE; unset it" in bad("push", bank, "me/bank")


def matter(text: str) -> dict:
    """The front matter of a card."""
    _, head, _ = text.split("---\n", 2)
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


def test_cards_say_what_the_hub_asks_for(tmp_path: Path) -> None:
    tiny_bank(tmp_path / "bank")
    base = BaseEntry(source="owner/base", digest=fingerprint("base"), architecture="llama")
    rows = [[None, None, None], [0.5, 0.625, None]]
    manifest = replace(
        rewrite(tmp_path / "bank", base=base), accuracy_matrix=AccuracyMatrix(tasks=list(TASKS), accuracy=rows),
        training_configuration={
            "prompt_format": 2, "evaluation": {"prompts": "served"}, "tasks": ["helpdesk/email", "agnews", "yahoo.yaml"],
        },
    )  # fmt: skip
    found = matter(readme(manifest))
    assert found["base_model"] == "owner/base" and found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft" and "continual-learning" in found["tags"]
    assert found["datasets"] == ["sh0416/ag_news"], "a task of one's own says nothing of where its rows are"
    (index,) = found["model-index"]
    assert [one["dataset"]["name"] for one in index["results"]] == ["helpdesk/email", "agnews"]
    assert index["results"][1]["metrics"] == [{"type": "accuracy", "value": 0.625, "name": "served answer, test rows"}]
    assert "base_model" not in matter(readme(replace(manifest, base=BaseEntry(
        source="package:llm", digest=fingerprint("base"), architecture="llama")))), "no Hub id"  # fmt: skip
    entry = TaskEntry(question="Which topic?", labels=["World", "Sports"], template="{{ text }}")
    lines = [line if line.task != "agnews" else replace_line(line, entry) for line in manifest.adapters]
    card = adapter_readme(replace(manifest, adapters=lines), "agnews", 4)
    assert matter(card)["base_model"] == "owner/base" and matter(card)["datasets"] == ["sh0416/ag_news"]
    assert "Answers: `World`, `Sports`" in card and "Question: Which topic?" in card and "model-index" not in matter(card)


def replace_line(line: object, entry: TaskEntry) -> object:
    import dataclasses

    return dataclasses.replace(line, task_spec=entry)  # type: ignore[type-var]


def test_a_uri_names_a_repository_and_a_revision() -> None:
    assert parse_hub_uri("hf://me/bank") == ("me/bank", "main")
    assert parse_hub_uri("hf://me/bank@v1.0") == ("me/bank", "v1.0")
