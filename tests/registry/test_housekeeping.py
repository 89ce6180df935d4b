"""Removing versions, on an embedded store and over HTTP with proxied artifacts: never what others refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import housekeeping, tags
from amlora_dist.registry.housekeeping import aliases, candidates, point_alias, remove
from amlora_dist.registry.manifest import Manifest
from amlora_dist.registry.pulling import pull_home
from amlora_dist.registry.store import Store
from amlora_dist.registry.versions import Version
from tests.registry.tiny_banks import publish_sequence

pytestmark = pytest.mark.integration


def test_a_version_that_others_refer_to_stays_and_the_rest_goes_with_its_files(
    store: Store, name: str, tmp_path: Path
) -> None:
    first, second, third = publish_sequence(store, name, tmp_path, tasks=("a", "b", "c"))
    (found,) = candidates(store, name, [1])
    assert found.reasons == [f"{uri} keeps parts there" for uri in (second.uri, third.uri)]
    with pytest.raises(UserError, match="has to stay"):
        remove(store, [found])
    assert aliases(store, name) == {tags.CURRENT: 3}
    assert any("alias 'current'" in reason for reason in candidates(store, name, [3])[0].reasons)

    point_alias(store, name, 2, "champion")
    store.set_alias(name, tags.CURRENT, second)
    remove(store, candidates(store, name, [3]))
    assert [version.number for version in store.versions(name)] == [1, 2]
    assert not store.has_artifact(third.run, third.artifact_path)
    whole = pull_home(store, store.resolve(f"models:/{name}@champion"), tmp_path / "banks")
    assert sorted(folder.name for folder in (whole / "adapters").iterdir()) == ["1-a", "2-b"]
    assert store.has_artifact(first.run, first.artifact_path)


def test_a_damaged_version_keeps_what_it_may_need_until_it_is_deleted_itself(
    store: Store, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, other = f"{name}-broken", f"{name}-other"
    *_, damaged = publish_sequence(store, broken, tmp_path, tasks=("a", "b"))
    publish_sequence(store, other, tmp_path, tasks=("a",))
    stale = publish_sequence(store, other, tmp_path, tasks=("a", "b"), start=2)[0]
    store.set_alias(other, tags.CURRENT, store.versions(other)[0])
    real = housekeeping.manifest_of

    def manifest_of(store: Store, version: Version) -> Manifest:
        if version.uri == damaged.uri:
            raise BankError("manifest.json: not JSON\nfetch the bank again")
        return real(store, version)

    monkeypatch.setattr(housekeeping, "manifest_of", manifest_of)
    (kept,) = candidates(store, other, [stale.number])
    (reason,) = kept.reasons
    assert damaged.uri in reason and "manifest.json: not JSON)" in reason
    assert f"delete it first with `amlora prune {broken} 2 --yes`" in reason
    with pytest.raises(UserError, match=r"has to stay.*nothing was deleted"):
        remove(store, [kept])

    remove(store, candidates(store, broken, [2]))
    assert aliases(store, broken) == {tags.CURRENT: 1}, "the alias of a damaged version moves on"
    (free,) = candidates(store, other, [stale.number])
    assert free.reasons == []
    remove(store, [free])
    assert [version.number for version in store.versions(other)] == [1]
    for model in (broken, other):
        store.connection.client.delete_registered_model(model)
