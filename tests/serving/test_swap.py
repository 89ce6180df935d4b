"""New versions are swapped in while requests run: none is lost, none is answered by two of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.store import Store
from amlora_dist.serving.alias_watcher import Follower, is_moving
from amlora_dist.serving.bank import ServedBank
from tests.serving.load import VERSIONS, ask_all, expected, publish, write_versions
from tests.serving.servers import running

pytestmark = pytest.mark.integration  # a running app under load


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> list[ServedBank]:
    """Three versions that share their base model's weights."""
    first, *others = write_versions(tmp_path_factory.mktemp("versions"))
    one = AMLoRAModel.from_bank(first, device="cpu")
    models = [one, *(AMLoRAModel.from_bank(folder, share_base_with=one) for folder in others)]
    return [ServedBank(model, f"v{number}") for number, model in enumerate(models, start=1)]


def test_versions_on_one_base_model_share_its_weights_and_nothing_else(banks: list[ServedBank]) -> None:
    first, second = (bank.model for bank in banks[:2])
    for name, parameter in first._plain.named_parameters():
        assert second._plain.get_parameter(name) is parameter
    shared = {id(p) for p in first.transformer.parameters()} & {id(p) for p in second.transformer.parameters()}
    assert shared == {id(p) for p in first._plain.parameters()}
    assert first.route("red wall")[0].tasks.keys() != second.route("red wall")[0].tasks.keys()


@pytest.mark.parametrize("requests", [150, pytest.param(2000, marks=pytest.mark.crash)])
def test_no_request_is_lost_or_half_answered_while_versions_change(banks: list[ServedBank], requests: int) -> None:
    right = {bank.version: (bank.tasks, expected(bank.model)) for bank in banks}
    with running(banks[0]) as server:
        moves = {
            requests // 3: lambda: server.service.swap(banks[1]),
            2 * requests // 3: lambda: server.service.swap(banks[2]),
        }
        versions = ask_all(server.url, right, requests=requests, clients=8, at=moves)
        assert server.client.get("/healthz").json()["version"] == banks[2].version
    assert all(versions[bank.version] > requests // 6 for bank in banks)


def test_only_aliases_and_latest_move() -> None:
    assert is_moving("models:/a@champion") and is_moving("models:/a/latest") and is_moving("models:/a")
    assert not is_moving("models:/a/3") and not is_moving("some/folder")


@pytest.mark.integration
def test_a_server_follows_its_alias_and_keeps_what_it_has_when_that_fails(
    amlora_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(amlora_home)
    first, second, third = (publish(store, "words", folder) for folder in write_versions(tmp_path))
    store.set_alias("words", "champion", first)
    served = ServedBank.load("models:/words@champion", device="cpu")
    assert (served.name, served.version) == ("words", "models:/words/1")
    with running(served, poll_s=0.1) as server:
        follower = Follower(server.service, "models:/words@champion", device="cpu")
        assert not follower.look()
        store.set_alias("words", "champion", second)
        assert follower.look()
        assert server.good("/v1/completions", model="words", prompt="red")["system_fingerprint"] == second.uri
        assert [one["task"] for one in server.client.get("/v1/models").json()["data"][1:]] == list(VERSIONS[1])
        # what cannot be loaded is counted, and the old version stays
        load = ServedBank.load

        def refused(*_args: Any, **_options: Any) -> ServedBank:
            raise UserError("damaged")

        monkeypatch.setattr(ServedBank, "load", refused)
        store.set_alias("words", "champion", third)
        follower.start()
        _until(lambda: "amlora_follow_failures_total 0.0" not in server.client.get("/metrics").text)
        assert server.client.get("/healthz").json()["version"] == second.uri
        monkeypatch.setattr(ServedBank, "load", load)
        _until(lambda: server.client.get("/healthz").json()["version"] == third.uri)
        follower.stop()


def _until(holds: Any, deadline_s: float = 60) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < deadline_s
        time.sleep(0.05)
