"""``amlora serve`` as a user starts it: a process of its own, Ray Serve below it, real clients in front."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.store import Store
from pipelines.cli.main import app
from tests.bank_with_base import write_working_bank
from tests.ports import free_port
from tests.serving.load import TEXTS, ask_all, expected, publish, write_versions

KEY = "s3cret"


class Server:
    """``amlora serve`` and what it prints."""

    def __init__(self, home: Path, log: Path, bank: str, *options: str, key: str) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        environment = os.environ | {"AMLORA_HOME": str(home), "AMLORA_API_KEY": key}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "pipelines.cli", "serve", bank, "--port", str(self.port), "--device", "cpu"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--threads", "1", *options], stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def wait(self, words: str, deadline_s: float = 180) -> None:
        """Until it has printed ``words``."""
        start = time.monotonic()
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - start < deadline_s, self.log.read_text()
            time.sleep(0.1)

    def end(self) -> None:
        """Whatever state it is in, with all that it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(timeout=20)


@pytest.fixture
def started() -> Iterator[list[Server]]:
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.end()


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("requests", [160, pytest.param(2000, marks=pytest.mark.crash)])
def test_a_bank_is_served_followed_and_stopped_without_losing_a_request(
    tmp_path: Path, amlora_home: Path, started: list[Server], requests: int
) -> None:
    """The whole story in one server, because starting Ray takes most of the time."""
    folders = write_versions(tmp_path)
    store = Store.open(amlora_home)
    versions = [publish(store, "words", folder) for folder in folders]
    right: dict[str, Any] = {}
    for folder, version in zip(folders, versions, strict=True):
        model = AMLoRAModel.from_bank(folder, device="cpu")
        right[version.uri] = (model.tasks, expected(model))
    store.set_alias("words", "champion", versions[0])
    options = ("--poll", "0.3", "--request-timeout", "60")
    server = Server(amlora_home, tmp_path / "log", "models:/words@champion", *options, key=KEY)
    started.append(server)
    server.wait(f"serving models:/words/1 at {server.url}")

    with pytest.raises(openai.AuthenticationError, match="no or wrong API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0).models.list()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": TEXTS[0]}]
    response = client.chat.completions.create(model="words", messages=messages, max_tokens=5, extra_body={"routing": True})
    assert response.system_fingerprint == "models:/words/1"
    assert response.choices[0].message.content == right["models:/words/1"][1]["answer", TEXTS[0]]
    assert response.choices[0].routing["task"] == "colours"  # type: ignore[attr-defined]
    stream = client.chat.completions.create(model="words", messages=messages, max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == response.choices[0].message.content

    def move(number: int) -> Any:
        def moved() -> None:
            store.set_alias("words", "champion", versions[number])
            start = time.monotonic()
            while httpx.get(f"{server.url}/healthz").json()["version"] != versions[number].uri:
                assert time.monotonic() - start < 60
                time.sleep(0.1)

        return moved

    # one client moves the alias and waits, the others go on asking
    moves = {requests // 4: move(1), 2 * requests // 3: move(2)}
    counts = ask_all(server.url, right, requests=requests, clients=4, at=moves, key=KEY)
    assert set(counts) == {version.uri for version in versions}

    begun = threading.Barrier(5, timeout=60)

    def ask(text: str) -> str:
        """The last line of an answer that has begun when the server is asked to stop."""
        body = {"prompt": text, "max_tokens": 40, "raw": True, "stream": True}
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()
            next(lines)
            begun.wait()
            return [line for line in lines if line][-1]

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, text) for text in TEXTS[:4]]
        begun.wait()
        server.process.send_signal(signal.SIGTERM)
        assert [one.result() for one in asked] == ["data: [DONE]"] * 4
    assert server.process.wait(timeout=90) == 143, server.log.read_text()
    assert "stopping; what runs is finished first" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["BANK", "--name", "a:b"], "name: found 'a:b'"),
        (["BANK", "--base", "./missing"], "no folder './missing'"),
        (["BANK", "--port", "PORT"], "--host, --port: cannot listen"),
        (["BANK", "--engine-url", "http://localhost:1"], "--engine-url belongs to --engine vllm"),
        (["BANK", "--engine", "vllm", "--engine-url", "localhost:1"], "--engine-url: found 'localhost:1'"),
        (["BANK", "--engine", "vllm", "--engine-url", "http://127.0.0.1:1"], "cannot be reached"),
        (["BANK", "--engine", "vllm", "--engine-url", "http://h", "--engine-python", "p"], "--engine-python: found with"),
        (["BANK", "--engine", "vllm", "--engine-python", "/no/such/python"], "--engine-python: /no/such/python cannot"),
        (["BANK", "--engine", "vllm"], "has no vLLM; make it an environment"),
        (["models:/words/1", "--tracking-uri", "file:///tmp/x"], "MLflow keeps no registry in plain files"),
    ],
)
def test_what_cannot_be_served_is_reported_before_ray_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_working_bank(tmp_path / "bank", tmp_path / "base")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = {"BANK": str(tmp_path / "bank"), "PORT": str(taken.getsockname()[1])}
        done = CliRunner().invoke(app, ["serve", *(words.get(one, one) for one in arguments)])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
