"""Removing versions, on an embedded store and over HTTP with proxied artifacts: never what others refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from amlora_dist.errors import UserError
from amlora_dist.registry import tags
from amlora_dist.registry.housekeeping import aliases, candidates, point_alias, remove
from amlora_dist.registry.pulling import pull_home
from amlora_dist.registry.store import Store
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
