"""``amlora promote``: the alias moves to a version that passes on the sample as it is served, and else stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.housekeeping import aliases, crown_first
from amlora_dist.registry.store import Store
from amlora_dist.registry.versions import Version
from pipelines.cli.main import app
from tests.bank_with_base import texts_of, write_keyed_bank
from tests.registry.tiny_banks import fingerprint, rewrite

pytestmark = pytest.mark.integration
TASKS = ("colours", "shapes")
NAME = "promoted"


def publish(store: Store, folder: Path, tasks: tuple[str, ...], stage: int) -> Version:
    """A working bank of these tasks as a version; another order makes other adapters."""
    write_keyed_bank(folder / f"bank-{stage}", folder / "base", tasks=tasks)
    run = store.stage_run(store.parent_run(NAME, NAME, {}), f"{stage}", fingerprint(stage))
    bank, place = read_bank(folder / f"bank-{stage}"), store.placement(NAME, run, 1)
    rewrite(
        folder / f"bank-{stage}", run_id=NAME, epoch=1, stage=stage,
        adapters=[dataclasses.replace(line, stored=place.of(line.folder)) for line in bank.manifest.adapters],
        statistics=[dataclasses.replace(part, stored=place.of(part.file)) for part in bank.manifest.statistics],
    )  # fmt: skip
    values = {tags.TRAINING_FINGERPRINT: fingerprint(stage), tags.RUN_ID: NAME}
    return store.publish(NAME, folder / f"bank-{stage}", stage_run=run, tags=values, epoch=1, guard=lambda: None)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Path:
    """A home with three versions (two tasks, the same in another order, one task), and a sample that the first answers
    right throughout."""
    folder = tmp_path_factory.mktemp("promotion")
    shutil.copytree(empty_home, folder / "home")
    store = Store.open(folder / "home")
    for stage, tasks in enumerate((TASKS, TASKS[::-1], TASKS[:1]), start=1):
        publish(store, folder, tasks, stage)
    model = AMLoRAModel.from_bank(folder / "bank-1", device="cpu")
    rows = [{"text": text, "task": task} for task in TASKS for text in texts_of(task, 6, "golden")]
    answers = [found.label for found in model.classify([row["text"] for row in rows])]
    lines = [json.dumps(row | {"label": answer}) + "\n" for row, answer in zip(rows, answers, strict=True)]
    (folder / "golden.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def store(published: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, with no alias ``champion``."""
    monkeypatch.setenv("AMLORA_HOME", str(published / "home"))
    store = Store.open(published / "home")
    if tags.CHAMPION in aliases(store, NAME):
        store.connection.client.delete_registered_model_alias(NAME, tags.CHAMPION)
    return store


def promote(published: Path, version: int, *options: Any) -> Result:
    given = ["promote", NAME, version, "--sample", published / "golden.jsonl", "--device", "cpu", *options]
    return CliRunner().invoke(app, [str(one) for one in given])


def test_a_version_that_passes_takes_the_alias_and_leaves_a_tag_and_a_page(published: Path, store: Store) -> None:
    done = promote(published, 1, "--require", "accuracy[colours] >= 0.9", "--require", "accuracy >= 1", "--json")
    assert done.exit_code == 0, done.output + done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] and result["replaced"] is None and result["scores"]["shapes"]["rows"] == 6
    assert aliases(store, NAME)[tags.CHAMPION] == 1
    version = store.resolve(f"models:/{NAME}@champion")
    assert version.tags[tags.PROMOTION].startswith("models:/promoted/1 passes for champion: 2 of 2 checks")
    page = published / "home" / "reports" / "promotion-promoted-1-champion.html"
    assert "accuracy[colours] &gt;= 0.9" in page.read_text(encoding="utf-8")
    assert store.load_json(version.run, "promotions/promotion-promoted-1-champion.json") == result
    assert store.has_artifact(version.run, f"promotions/{page.name}")
    store.pull_version(version, published / "home" / "pulled")  # the page lies outside of the bank


def test_a_version_that_is_worse_than_the_one_it_replaces_leaves_the_alias_where_it_is(
    published: Path, store: Store
) -> None:
    store.set_alias(NAME, tags.CHAMPION, store.resolve(f"models:/{NAME}/1"))
    done = promote(published, 2, "--json")
    assert done.exit_code == 5, done.output + done.stderr
    result = json.loads(done.stdout)
    assert result["replaced"] == "models:/promoted/1" and not result["passed"]
    assert result["worse_rows"] and all(row["now"] != row["answer"] == row["before"] for row in result["worse_rows"])
    assert "text" not in result["worse_rows"][0] and result["worse_rows"][0]["row"].startswith("golden.jsonl, line ")
    assert aliases(store, NAME)[tags.CHAMPION] == 1
    assert "does not pass" in store.resolve(f"models:/{NAME}/2").tags[tags.PROMOTION]
    assert promote(published, 2, "--margin", "1").exit_code == 0
    assert aliases(store, NAME)[tags.CHAMPION] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to check: no other version is champion"),
        (("--require", "accuracy[fruit] >= 0.5"), "the sample has no rows of 'fruit'"),
        (("--require", "accuracy[colours] >= 0.5", "--label", "gold"), "found no 'gold'"),
        (("--require", "accuracy >= 0", "--alias", "current"), "'current' follows the newest version by itself"),
    ],
)
def test_a_promotion_that_cannot_be_decided_is_refused(
    published: Path, store: Store, options: tuple, message: str
) -> None:
    done = promote(published, 1, *options)
    assert done.exit_code == 2 and message in done.stderr
    assert tags.CHAMPION not in aliases(store, NAME)


def test_rows_of_the_sample_are_looked_at_before_a_model_is_loaded(
    published: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AMLoRAModel, "from_bank", lambda *a, **k: pytest.fail("a model was loaded"))
    row = {"text": "a wall", "task": "shapes", "label": "pink"}
    (tmp_path / "rows.jsonl").write_text((published / "golden.jsonl").read_text() + json.dumps(row) + "\n")
    done = promote(published, 1, "--sample", tmp_path / "rows.jsonl", "--require", "accuracy >= 0")
    assert done.exit_code == 2 and "line 13: label: found 'pink', the labels of 'shapes' are" in done.stderr, done.output
    scored = CliRunner().invoke(app, ["score", f"models:/{NAME}/1", str(tmp_path / "none.jsonl"), "--task", "shapes"])
    assert scored.exit_code == 2 and "none.jsonl: no such file" in scored.stderr
    asked = CliRunner().invoke(app, ["ask", f"models:/{NAME}/1", "a wall", " "])
    assert asked.exit_code == 2 and "TEXT: found ' ', expected a text with words" in asked.stderr


def test_a_version_that_lacks_a_task_of_the_replaced_one_is_refused(
    published: Path, store: Store, tmp_path: Path
) -> None:
    store.set_alias(NAME, tags.CHAMPION, store.resolve(f"models:/{NAME}/1"))
    rows = (published / "golden.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = promote(published, 3, "--sample", tmp_path / "rows.jsonl", "--require", "accuracy >= 0")
    assert done.exit_code == 2 and "models:/promoted/3 lacks shapes, which models:/promoted/1 serves" in done.stderr


def test_the_first_complete_run_sets_champion_and_nobody_sets_it_again(published: Path, store: Store) -> None:
    first, second = store.resolve(f"models:/{NAME}/1"), store.resolve(f"models:/{NAME}/2")
    assert crown_first(store, first, lambda: None) == 1 == aliases(store, NAME)[tags.CHAMPION]
    assert crown_first(store, second, lambda: None) == 1, "a later run moves it no more"
    store.set_alias(NAME, tags.CHAMPION, second)
    assert crown_first(store, first, lambda: None) == 2, "where a person has put it"
    store.connection.client.delete_registered_model_alias(NAME, tags.CHAMPION)
    assert crown_first(store, first, lambda: None) == 0 and tags.CHAMPION not in aliases(store, NAME)
