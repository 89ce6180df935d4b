"""What `kubectl apply -k FOLDER` would apply, for the parts of kustomize that ``cluster/kuberay`` uses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "configMapGenerator",
    "generatorOptions",
}  # fmt: skip
CLUSTER_WIDE = {"Namespace"}


def documents(file: Path) -> list[Document]:
    """Every document of a file."""
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]


def rendered(folder: Path) -> list[Document]:
    """The documents of a kustomization: resources, then components, patches, namespace, images.

    Raises:
        AssertionError: a file that is named is not there, a patch has no object, or an image nobody.
    """
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert kustomization["kind"] == "Kustomization"
    found: list[Document] = []
    for name in kustomization["resources"]:
        place = folder / name
        assert place.exists(), f"{folder}/kustomization.yaml names {name}, which is not there"
        found += rendered(place) if place.is_dir() else copy.deepcopy(documents(place))
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(set(names)) == len(names), "every object once"
    _change(found, folder, kustomization)
    return found


def _change(found: list[Document], folder: Path, kustomization: Document) -> None:
    assert set(kustomization) <= KNOWN, set(kustomization) - KNOWN
    for entry in kustomization.get("configMapGenerator", []):
        assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}, "rayjob.yaml names it"
        data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in entry["files"]}
        labels = entry.get("options", {})
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"], **labels}, "data": data})
    for name in kustomization.get("components", []):
        (component,) = documents(folder / name / "kustomization.yaml")
        assert component["kind"] == "Component"
        _change(found, folder / name, component)
    for entry in kustomization.get("patches", []):
        text = entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text(encoding="utf-8")
        target = entry["target"]
        met = [one for one in found if one["kind"] == target["kind"]]
        met = [one for one in met if target.get("name") in (None, one["metadata"]["name"])]
        assert met, f"{folder}: a patch has no object: {target}"
        for one in met:
            for step in yaml.safe_load(text):
                _patch(one, step)
    if namespace := kustomization.get("namespace"):
        for one in found:
            if one["kind"] == "Namespace":
                one["metadata"]["name"] = namespace
            if one["kind"] not in CLUSTER_WIDE:
                one["metadata"]["namespace"] = namespace
    for entry in kustomization.get("images", []):
        assert any(_rename(one, entry) for one in found), f"{folder}: no container has the image {entry['name']}"


def _patch(document: Document, step: dict[str, Any]) -> None:
    """A step of RFC 6902."""
    *above, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:])
    place: Any = document
    for part in above:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if isinstance(place, list):
        assert (step["op"], last) == ("add", "-"), step
        place.append(step["value"])
    else:
        assert step["op"] == "add" or (step["op"] == "replace" and last in place), step
        place[last] = step["value"]


def _rename(node: Any, entry: dict[str, str]) -> int:
    """Give the containers below ``node`` with the image of ``entry`` its new one; how many there were."""
    if isinstance(node, list):
        return sum(_rename(one, entry) for one in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    for key, value in node.items():
        if key in ("containers", "initContainers"):
            for container in value:
                if container["image"].partition(":")[0] == entry["name"]:
                    mark = f"@{entry['digest']}" if "digest" in entry else f":{entry['newTag']}"
                    container["image"] = entry.get("newName", entry["name"]) + mark
                    count += 1
        else:
            count += _rename(value, entry)
    return count
