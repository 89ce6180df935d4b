"""What the doctor says of a node: from answers that servers really give, and from what nodes have found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.cluster import node_checks
from pipelines.cluster.node_checks import PACKAGES, Probe, _graphics, _hub, _storage, _versions


class Picky(BaseHTTPRequestHandler):
    """As MLflow answers a host name that it does not allow: health to anybody, the rest to nobody."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 403)
        self.end_headers()
        self.wfile.write(b"OK" if self.path == "/health" else b"Invalid Host header")

    def log_message(self, *given: object) -> None: ...


@pytest.fixture
def picky() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Picky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_lives_and_refuses_this_host_is_bad(picky: str, tmp_path: Path) -> None:
    assert str(Probe().mlflow(picky)).startswith("403 Forbidden: Invalid Host header")
    assert "refused" in str(Probe().mlflow("http://127.0.0.1:9")).lower()
    assert Probe().mlflow(f"sqlite:///{tmp_path}/mlflow.db") is None
    assert "no folder" in str(Probe().mlflow(f"sqlite:///{tmp_path}/nowhere/mlflow.db"))
    assert "127.0.0.1: connection refused" in str(Probe().mlflow("postgresql+psycopg2://user:secret@127.0.0.1:9/mlflow"))


def test_gpus_that_ray_counts_and_torch_cannot_use_are_bad() -> None:
    assert _graphics("n", [], 0.0).found == "none"
    assert _graphics("n", ["A", "A", "B"], 3.0).found == "2 x A, 1 x B"
    head = _graphics("head", ["A"], 0.0)
    assert (head.state, head.found) == ("ok", "1 x A; Ray offers 0"), "a head that drives and trains nothing"
    hidden = _graphics("n", [], 8.0)
    assert hidden.state == "bad" and "Ray counts 8, torch sees none" in hidden.found and "--gpus=all" in hidden.fix


def test_a_folder_of_hub_models_that_nodes_do_not_share_is_reported() -> None:
    def states(*places: str | None) -> list[str]:
        facts = {str(n): {"hub": place} for n, place in enumerate(places)}
        return [check.state for check in _hub("/mnt/s", facts, {n: n for n in facts})]

    assert states("/mnt/hub", "/mnt/hub") == ["ok"]
    assert states("/mnt/hub", None) == states(None, None) == states("/a", "/b") == ["warn"]


def test_nodes_that_write_to_folders_of_their_own_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "CONNECT_S", 0.5)
    folders = {"a": tmp_path / "one", "b": tmp_path / "one", "c": tmp_path / "other"}
    probes = {node: Probe() for node in folders}

    def ask(method: str, *given: object, own: dict[str, tuple[object, ...]] | None = None) -> dict[str, object]:
        return {
            node: getattr(probe, method)(str(folders[node]), *given[1:], *(own or {}).get(node, ()))
            for node, probe in probes.items()
        }

    checks = {check.name: check for check in _storage("/shared", list(probes), {n: f"node {n}" for n in probes}, ask)}
    assert {name: check.state for name, check in checks.items()} == {f"node {n} storage": "bad" for n in "abc"}
    assert checks["node a storage"].found == "/shared: does not see what was written on node c"
    assert "node a, node b" in checks["node c storage"].found
    assert not [file for folder in set(folders.values()) for file in folder.iterdir()], "it takes its files away again"

    folders["c"] = tmp_path / "one"
    assert {c.state for c in _storage("/shared", list(probes), {n: n for n in probes}, ask)} == {"ok"}
    (tmp_path / "file").write_text("")
    folders["c"] = tmp_path / "file"
    checks = {check.name: check for check in _storage("/shared", list(probes), {n: n for n in probes}, ask)}
    assert checks["c storage"].fix == "mount it there, writable by this user" and checks["a storage"].state == "ok"


def test_a_node_of_another_version_is_named() -> None:
    usual = dict.fromkeys(("python", *PACKAGES), "1") | {"amlora-dist": None}
    facts = {node: {"versions": dict(usual)} for node in "abc"}
    facts["b"]["versions"]["torch"] = "2"
    checks = {check.name: check for check in _versions(facts, {n: f"node {n}" for n in facts})}
    torch = checks["torch"]
    assert (torch.state, torch.found) == ("bad", "1; node b has 2") and "one image" in torch.fix
    assert checks["amlora-dist"].found == "shipped with the job" and checks["ray"].state == "ok"


def test_a_url_is_written_and_read_like_a_folder(tmp_path: Path) -> None:
    probe, url = Probe(), f"file://{tmp_path}/bucket"
    assert probe.write(url, "mine", "0123456789") is None and (tmp_path / "bucket" / "mine").read_text() == "0123456789"
    assert probe.sees(url, {"mine": "0123456789"}) == []
    assert probe.facts(url)["disk"] > 0, "of the node's own folder"
    probe.remove(url, "mine")
    assert not (tmp_path / "bucket" / "mine").exists()
    (tmp_path / "file").write_text("in the way")
    assert "not a directory" in str(probe.write(f"file://{tmp_path}/file/bucket", "mine", "text"))
    assert "s4" in str(probe.write("s4://bucket", "mine", "text"))
