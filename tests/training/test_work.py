"""What a stage is asked to do, on a node that has other folders than the driver."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.base_model import ModelSettings, resolve_base
from amlora_dist.errors import UserError
from amlora_dist.training.settings import StageSettings, TrainingSettings
from amlora_dist.training.stage_spec import Cell, Parent, StageWork
from tests.tiny_config import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def work(base: dict[str, object], url: str | None = "file:///mnt/bucket") -> StageWork:
    scores, before = "/driver/storage/scores/f", ("/driver/storage/scores/e",)
    cell = Cell("t", "test", "router", "f" * 64, scores, before, "/driver/storage/x")
    settings = StageSettings(
        method="am_lora", seed=0, dtype="fp32", attention="eager", adapters=AdapterSettings(), router=RouterSettings(),
        training=TrainingSettings(),
    )  # fmt: skip
    return StageWork(
        fingerprint="a" * 64, index=1, task="t", folder="/driver/storage/stages/a", settings=settings, base=base,
        tasks={}, data_seed=0, data_dir=None, parents=[Parent("s", "d" * 64, "/driver/storage/adapters/d")], cells=[cell],
        deepspeed={}, evaluation_batch_size=1, cache="/driver/cache", root="/driver/storage", url=url, apart=url is not None,
        taken=Parent("t", "e" * 64, "/driver/storage/adapters/e"),
    )  # fmt: skip


def test_folders_move_with_the_node_and_nothing_else() -> None:
    before = work({})
    after = before.moved(Path("/mine/storage"), Path("/mine/cache"))
    assert (after.folder, after.cache, after.root) == ("/mine/storage/stages/a", "/mine/cache", "/mine/storage")
    assert [one.folder for one in after.adapters] == ["/mine/storage/adapters/d", "/mine/storage/adapters/e"]
    (cell,) = after.cells
    assert (cell.folder, cell.features) == ("/mine/storage/scores/f", "/mine/storage/x")
    assert cell.before == ("/mine/storage/scores/e",)
    assert after.moved(Path("/driver/storage"), Path("/driver/cache")) == before
    assert StageWork.from_json(before.to_json()) == before


def test_a_node_without_the_model_fetches_what_the_driver_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write_model(snapshot, "llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("AMLORA_HOME", str(tmp_path / "home"))
    here = resolve_base(ModelSettings(source="org/tiny", revision=COMMIT), tmp_path / "home")
    assert here.path == snapshot, "from this node's own copy of the Hub"

    there = Path("/driver/hub/models--org--tiny/snapshots") / COMMIT
    base = asdict(here) | {"path": str(there), "revision": None}
    assert work(base).base_model() == replace(here, revision=COMMIT)
    with pytest.raises(UserError, match=r"'org/tiny' has digest \w{12} on node .*, where the driver runs eeeeeeeeeeee"):
        work(base | {"digest": "e" * 64}).base_model()
    with pytest.raises(UserError, match="put it into a folder that all nodes share"):
        work(base, url=None).base_model()
    with pytest.raises(UserError, match="put it into a folder that all nodes share"):
        work(base | {"source": "models/tiny", "path": "/driver/models/tiny"}).base_model()
    assert work(asdict(here) | {"path": str(snapshot)}, url=None).base_model() == here
