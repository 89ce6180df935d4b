"""Publishing, finding and pulling banks, on the embedded store and over HTTP."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from amlora_dist.errors import BankError, LeaseLostError, UserError
from amlora_dist.registry import tags
from amlora_dist.registry.adapter_folder import ADAPTER_FILES, write_adapter
from amlora_dist.registry.bank_folder import adapter_entry, read_bank, statistics_entry, write_version
from amlora_dist.registry.leases import Timing
from amlora_dist.registry.manifest import Lineage, Stored, read_manifest, replace
from amlora_dist.registry.store import Store
from tests.registry.tiny_banks import TASKS, fingerprint, publish_sequence, rewrite, tiny_adapter, tiny_bank

pytestmark = pytest.mark.integration


def files_of(store: Store, run: str, path: str | None = None) -> dict[str, int]:
    """Artifacts of a run and their sizes in bytes."""
    found: dict[str, int] = {}
    for entry in store.connection.client.list_artifacts(run, path):
        found |= files_of(store, run, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found


def test_a_published_sequence_is_pulled_back_bit_for_bit(store: Store, name: str, tmp_path: Path) -> None:
    versions = publish_sequence(store, name, tmp_path)
    assert [version.number for version in versions] == [1, 2, 3]
    seen: list[tuple[int, int, str]] = []
    folder = store.pull(f"models:/{name}@latest", tmp_path / "pulled", lambda *step: seen.append(step))
    pulled, written = read_bank(folder), read_bank(tmp_path / f"{name}-3-e1")
    assert pulled.manifest == written.manifest
    assert [a.digest() for a in pulled.adapters] == [a.digest() for a in written.adapters]
    assert torch.equal(pulled.router["keys"], written.router["keys"])
    assert list(pulled.statistics) == list(TASKS)
    assert [done for done, _, _ in seen] == list(range(8))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".pulled.part")]


def test_each_adapter_is_stored_once(store: Store, name: str, tmp_path: Path) -> None:
    versions = publish_sequence(store, name, tmp_path)
    for index, version in enumerate(versions, start=1):
        stored = [path for path in files_of(store, version.run) if path.endswith("adapter_model.safetensors")]
        assert len(stored) == 1
        assert stored[0].startswith(f"{version.artifact_path}/adapters/{index}-")


@pytest.mark.parametrize("store", ["embedded"], indirect=True)  # what is uploaded is the same for any store
def test_version_fifteen_adds_its_own_adapter_the_router_and_little_else(
    store: Store, name: str, tmp_path: Path
) -> None:
    """Little else, and its own task's statistics: once, of a size that depends on no other task."""
    modules = {f"model.layers.{i}.self_attn.{m}_proj": (64, 64) for i in range(15, 30) for m in "qv"}
    tasks = [f"long/task-{k}" for k in range(1, 16)]
    adapters = [tiny_adapter(task, k, modules=modules) for k, task in enumerate(tasks, start=1)]
    last = publish_sequence(store, name, tmp_path, tasks=tasks, adapters=adapters)[-1]
    sizes = files_of(store, last.run)
    own = sum(t.numel() * t.element_size() for t in adapters[-1].tensors().values())
    router = next(size for path, size in sizes.items() if path.endswith("router.safetensors"))
    (statistics,) = (path for path in sizes if "/statistics/" in path)
    assert statistics.endswith("/statistics/15-long-task-15.safetensors")
    assert sum(sizes.values()) - sizes[statistics] <= own + router + 64 * 1024
    store.pull(last.uri, tmp_path / "pulled")
    assert len(read_bank(tmp_path / "pulled").adapters) == 15


def test_a_version_is_written_and_published_from_its_own_parts_alone(store: Store, name: str, tmp_path: Path) -> None:
    publish_sequence(store, name, tmp_path, tasks=TASKS[:2])
    whole = read_bank(tmp_path / f"{name}-2-e1")
    run = store.stage_run(store.parent_run(name, name, {}), "3 third", fingerprint(name, 3))
    place, made = store.placement(name, run, 1), tiny_adapter("third", 3)
    line = adapter_entry(made, 3, training_fingerprint=fingerprint(name, 3), parent=whole.manifest.parent_digest())
    part = statistics_entry(3, "third", whole.statistics[TASKS[0]])
    draft = replace(
        whole.manifest,
        adapters=[*whole.manifest.adapters, dataclasses.replace(line, stored=place.of(line.folder))],
        statistics=[*whole.manifest.statistics, dataclasses.replace(part, stored=place.of(part.file))],
    )
    folder = tmp_path / "third"
    with pytest.raises(BankError, match="adapters/3-third"):
        write_version(folder, draft, run, whole.router, {})
    write_adapter(tmp_path / "made", made.tensors())
    files = {f"{line.folder}/{name}": tmp_path / "made" / name for name in ADAPTER_FILES}
    files[part.file] = tmp_path / f"{name}-2-e1" / whole.manifest.statistics[0].file
    written = write_version(folder, draft, run, whole.router, files)
    assert [path.name for path in (folder / "adapters").iterdir()] == ["3-third"]
    values = {tags.TRAINING_FINGERPRINT: fingerprint(name, 3), tags.RUN_ID: name}
    version = store.publish(name, folder, stage_run=run, tags=values, epoch=1, guard=lambda: None)
    pulled = read_bank(store.pull_version(version, tmp_path / "pulled"))
    assert pulled.manifest == written
    assert [a.digest() for a in pulled.adapters] == [*(a.digest() for a in whole.adapters), made.digest()]


def test_publishing_twice_changes_nothing(store: Store, name: str, tmp_path: Path) -> None:
    first = publish_sequence(store, name, tmp_path)
    before = [files_of(store, version.run) for version in first]
    again = publish_sequence(store, name, tmp_path)
    assert again == first
    assert store.versions(name) == first
    assert [files_of(store, version.run) for version in first] == before


def test_a_stage_is_found_by_its_training_fingerprint_in_any_registered_model(
    store: Store, name: str, tmp_path: Path
) -> None:
    versions = publish_sequence(store, name, tmp_path)
    assert store.find_stage(fingerprint(name, *TASKS[:2])) == [versions[1]]
    assert store.find_stage(fingerprint(name, "never trained")) == []


def test_another_run_reuses_a_stage_by_reference(store: Store, name: str, tmp_path: Path) -> None:
    original = publish_sequence(store, name, tmp_path)[0]
    other = f"{name}-other"
    run = store.stage_run(store.parent_run(other, other, {}), "1 helpdesk/email", original.training_fingerprint)
    folder = store.pull_version(original, tmp_path / "mine")
    rewrite(folder, run_id=other, epoch=4, lineage=Lineage(reused_from=original.uri))
    values = {tags.TRAINING_FINGERPRINT: original.training_fingerprint, tags.RUN_ID: other}
    mine = store.reuse(other, original, folder, stage_run=run, tags=values, epoch=4, guard=lambda: None)
    assert mine.registered_model == other
    assert mine.tags[tags.REUSED_FROM] == original.uri
    stored = files_of(store, run)
    assert not [path for path in stored if "/adapters/" in path or "/statistics/" in path]
    pulled = read_bank(store.pull(mine.uri, tmp_path / "pulled"))
    assert pulled.manifest.adapters[0].stored == read_manifest(tmp_path / f"{name}-1-e1").adapters[0].stored
    assert pulled.adapters[0].digest() == tiny_adapter(TASKS[0], 1).digest()
    assert store.find_stage(original.training_fingerprint) == [original, mine]


def test_an_adapter_is_taken_from_where_it_was_trained(store: Store, name: str, tmp_path: Path) -> None:
    original = publish_sequence(store, name, tmp_path)[0]
    other = f"0-{name}"  # comes first by its name
    run = store.stage_run(store.parent_run(other, other, {}), "1 helpdesk/email", original.training_fingerprint)
    folder = store.pull_version(original, tmp_path / "mine")
    rewrite(folder, run_id=other, epoch=4, lineage=Lineage(reused_from=original.uri))
    values = {tags.TRAINING_FINGERPRINT: original.training_fingerprint, tags.RUN_ID: other}
    mine = store.reuse(other, original, folder, stage_run=run, tags=values, epoch=4, guard=lambda: None)
    for one in (mine, original):
        store.connection.client.set_model_version_tag(
            one.registered_model, str(one.number), tags.ADAPTER_FINGERPRINT, f"adapter of {name}"
        )
    assert [one.uri for one in store.find_adapter(f"adapter of {name}")] == [original.uri, mine.uri]


def test_a_name_of_another_run_is_refused(store: Store, name: str) -> None:
    store.parent_run(name, "run-a", {})
    with pytest.raises(UserError, match="belongs to run 'run-a'"):
        store.parent_run(name, "run-b", {})


def test_a_run_is_found_again_on_resumption(store: Store, name: str) -> None:
    config = {"training": {"epochs": 2}, "tasks": ["a", "b"]}
    parent = store.parent_run(name, name, config)
    stage = store.stage_run(parent, "1 a", fingerprint(name))
    store.log_metrics_batch(stage, [("loss", 1.0 / (step + 1), step, 1_700_000_000_000 + step) for step in range(1200)])
    store.end_run(stage, "FAILED")
    store.end_run(parent, "KILLED")
    longer = {**config, "tasks": ["a", "b", "c"]}
    assert store.parent_run(name, name, longer) == parent
    assert store.stage_run(parent, "1 a", fingerprint(name)) == stage
    assert store.load_json(parent, "config.json") == longer
    assert store.load_json(parent, "nothing.json") is None
    runs = store.find_runs({tags.RUN_ID: name, tags.KIND: "stage"}, registered_model=name)
    assert [(run.run, run.status) for run in runs] == [(stage, "RUNNING")]
    history = store.metric_history(stage, "loss")
    assert len(history) == 1200
    assert history[9][:2] == (9, 0.1)


def test_what_does_not_exist_is_named_with_what_does(store: Store, name: str, tmp_path: Path) -> None:
    publish_sequence(store, name, tmp_path, tasks=TASKS[:1])
    for uri, message in {
        f"models:/{name[:-1]}/1": f"did you mean '{name}'",
        f"models:/{name}@champion": "has no alias 'champion'",
        f"models:/{name}/7": r"no version 7; there are \[1\]",
        "helpdesk": "expected models:/NAME@ALIAS",
        "models:/a/b/c": "expected models:/NAME@ALIAS",
    }.items():
        with pytest.raises(UserError, match=message):
            store.resolve(uri)
    store.set_alias(name, tags.CHAMPION, store.versions(name)[0])
    assert {store.resolve(f"models:/{name}{end}").number for end in ("", "/1", "/latest", "@current", "@champion")} == {
        1
    }


def test_a_driver_that_lost_its_run_writes_nothing_that_counts(store: Store, name: str, tmp_path: Path) -> None:
    quick = Timing(heartbeat_s=0.2, dead_after_s=1.0, poll_s=0.1)
    asleep = store.hold_run(name, name, quick)
    published = publish_sequence(store, name, tmp_path, tasks=TASKS[:1], guard=asleep.check)
    asleep._stop.set()  # paused: no heartbeat, nothing released
    asleep._thread.join()
    successor = store.hold_run(name, name, quick)
    try:
        with pytest.raises(LeaseLostError):
            publish_sequence(store, name, tmp_path, tasks=TASKS[:2], guard=asleep.check)
        assert store.versions(name) == published
        # paused between its look and its write: the version is there, and does not count
        stale = publish_sequence(store, name, tmp_path, tasks=TASKS[:2])[-1]
        assert [version.number for version in store.versions(name)] == [1, 2]
        assert store.counted_versions(name) == published
        assert store.find_stage(stale.training_fingerprint) == []
        assert store.resolve(f"models:/{name}@latest") == published[0]
        assert store.resolve(f"models:/{name}@current") == published[0]
        with pytest.raises(BankError, match="had lost its run"):
            store.resolve(stale.uri)
        good = publish_sequence(
            store, name, tmp_path, tasks=TASKS[:2], epoch=successor.epoch, guard=successor.check, start=2
        )
        assert store.counted_versions(name) == [published[0], good[0]]
        assert store.resolve(f"models:/{name}@current").number == 3
        assert name in store.registered_models()
        assert not [found for found in store.registered_models() if found.startswith("amlora.lease.")]
    finally:
        successor.release()


def test_a_bank_that_was_never_trained_is_not_published(store: Store, name: str, tmp_path: Path) -> None:
    adapter = tiny_adapter("agnews", 1)
    for tensor in adapter.b.values():
        tensor.zero_()
    with pytest.raises(BankError, match="every B is zero"):
        publish_sequence(store, name, tmp_path, tasks=["agnews"], adapters=[adapter])
    assert store.versions(name) == []


def test_a_bank_of_another_store_must_be_published_here_first(store: Store, name: str, tmp_path: Path) -> None:
    parent = store.parent_run(name, name, {})
    run = store.stage_run(parent, "1 a", fingerprint(name))
    elsewhere = Stored(version_of="theirs", run="f" * 32, artifact_path="bank-e1/adapters/1-a")
    assert not store.has_artifact(elsewhere.run, elsewhere.artifact_path)
    draft = tiny_bank(tmp_path / "bank", ["a"])
    place = store.placement(name, run, 1)
    parts = [dataclasses.replace(draft.statistics[0], stored=place.of(draft.statistics[0].file))]
    values = {tags.TRAINING_FINGERPRINT: fingerprint(name), tags.RUN_ID: name}
    for stored, message in (
        (elsewhere, "not in the store"),
        (None, "has no storage"),
        (place.of("x"), "expected bank-e1"),
        (place.of(draft.adapters[0].folder), ""),
    ):
        lines = [dataclasses.replace(draft.adapters[0], stored=stored)]
        rewrite(tmp_path / "bank", adapters=lines, statistics=parts, run_id=name, epoch=1)
        arguments = {"stage_run": run, "tags": values, "epoch": 1, "guard": lambda: None}
        if message:
            with pytest.raises(BankError, match=message):
                store.publish(name, tmp_path / "bank", **arguments)
        else:
            assert store.publish(name, tmp_path / "bank", **arguments).number == 1


def test_statistics_that_were_not_given_are_named(store: Store, name: str, tmp_path: Path) -> None:
    run = store.stage_run(store.parent_run(name, name, {}), "1 a", fingerprint(name))
    place = store.placement(name, run, 1)
    draft = tiny_bank(tmp_path / "bank", ["a"])
    lines = [dataclasses.replace(draft.adapters[0], stored=place.of(draft.adapters[0].folder))]
    parts = [dataclasses.replace(draft.statistics[0], stored=place.of(draft.statistics[0].file))]
    rewrite(tmp_path / "bank", adapters=lines, statistics=parts, run_id=name, epoch=1)
    (tmp_path / "bank" / draft.statistics[0].file).unlink()
    values = {tags.TRAINING_FINGERPRINT: fingerprint(name), tags.RUN_ID: name}
    with pytest.raises(BankError, match=r"statistics/1-a.safetensors: missing"):
        store.publish(name, tmp_path / "bank", stage_run=run, tags=values, epoch=1, guard=lambda: None)


def test_an_interrupted_pull_goes_on_where_it_was(store: Store, name: str, tmp_path: Path) -> None:
    last = publish_sequence(store, name, tmp_path)[-1]
    dest = tmp_path / "pulled"

    def stop(done: int, total: int, part: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull(last.uri, dest, stop)
    assert not dest.exists()
    damaged = tmp_path / ".pulled.part" / "adapters" / "1-helpdesk-email" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = tmp_path / ".pulled.part" / "adapters" / "2-agnews" / "adapter_model.safetensors"
    stamp = kept.stat().st_mtime_ns
    store.pull(last.uri, dest)
    assert (dest / kept.relative_to(tmp_path / ".pulled.part")).stat().st_mtime_ns == stamp
    assert read_bank(dest).manifest.digest() == last.tags[tags.MANIFEST_DIGEST]
    store.pull(last.uri, dest)  # the same bank: left as it is
    with pytest.raises(UserError, match="holds something else"):
        store.pull(f"models:/{name}/1", dest)
    kept = dest / kept.relative_to(tmp_path / ".pulled.part")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(BankError, match="remove it and pull again"):
        store.pull(last.uri, dest)


def test_a_pull_without_statistics_serves_all_the_same(store: Store, name: str, tmp_path: Path) -> None:
    last = publish_sequence(store, name, tmp_path)[-1]
    (tmp_path / "pulled").mkdir()  # an empty folder is no obstacle
    bank = read_bank(store.pull(last.uri, tmp_path / "pulled", statistics=False))
    assert bank.statistics == {}
    assert len(bank.adapters) == 3
    assert list(read_bank(store.pull(last.uri, tmp_path / "pulled")).statistics) == list(TASKS)  # added later


def test_damage_in_the_artifact_store_is_found_when_pulling(store: Store, name: str, tmp_path: Path) -> None:
    versions = publish_sequence(store, name, tmp_path)
    other = tiny_bank(tmp_path / "other", TASKS[:1], adapters=[tiny_adapter(TASKS[0], 1, seed=5)])
    line = other.adapters[0]
    store.log_artifacts(versions[0].run, tmp_path / "other" / line.folder, f"{versions[0].artifact_path}/{line.folder}")
    with pytest.raises(BankError, match=r"adapter_model.safetensors: sha256: found"):
        store.pull(versions[2].uri, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    shutil.copytree(tmp_path / "other", tmp_path / "changed")
    store.log_artifacts(versions[1].run, tmp_path / "changed", versions[1].artifact_path)
    with pytest.raises(BankError, match=r"changed after it was published|the manifest does not name"):
        store.pull(versions[1].uri, tmp_path / "pulled-2")


def test_a_damaged_upload_is_not_registered(
    store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Store.log_artifacts

    def lossy(self: Store, run: str, folder: Path, artifact_path: str | None = None) -> None:
        router = folder / "router.safetensors"
        content = router.read_bytes()
        router.unlink()
        router.write_bytes(content[:-1])
        upload(self, run, folder, artifact_path)

    monkeypatch.setattr(Store, "log_artifacts", lossy)
    with pytest.raises(BankError, match=r"router.safetensors of run .* differs after its upload"):
        publish_sequence(store, name, tmp_path, tasks=TASKS[:1])
    assert store.versions(name) == []
    monkeypatch.undo()
    assert len(publish_sequence(store, name, tmp_path, tasks=TASKS[:1])) == 1


def test_nothing_but_the_bank_is_uploaded(store: Store, name: str, tmp_path: Path) -> None:
    version = publish_sequence(store, name, tmp_path, tasks=TASKS[:1])[0]
    root = version.artifact_path
    assert sorted(files_of(store, version.run)) == sorted(
        f"{root}/{path}"
        for path in (
            "MLmodel",
            "input_example.json",
            "README.md",
            "manifest.json",
            "router.safetensors",
            "statistics/1-helpdesk-email.safetensors",
            "adapters/1-helpdesk-email/adapter_config.json",
            "adapters/1-helpdesk-email/adapter_model.safetensors",
            "adapters/1-helpdesk-email/recipe.safetensors",
        )
    )
    assert os.listdir(tmp_path) == [f"{name}-1-e1"]
    assert read_manifest(tmp_path / f"{name}-1-e1").run_id == name
