"""``cluster/kuberay``: pods that Pod Security "restricted" lets in, and overlays that are whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kustomization import Document, documents, rendered

REPOSITORY = Path(__file__).resolve().parents[1]
KUBERAY = REPOSITORY / "cluster" / "kuberay"
OVERLAYS = sorted(file.parent for file in KUBERAY.glob("overlays/*/kustomization.yaml"))
ALONE = [file for file in sorted(KUBERAY.glob("*.yaml")) if file.name not in ("kustomization.yaml", "serving-vllm.yaml")]
APPLIED: dict[str, list[Document]] = {
    **{folder.name: rendered(folder) for folder in OVERLAYS},
    **{file.name: documents(file) for file in ALONE},
}


def pods(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's specification with the way to it."""
    if isinstance(node, dict):
        if "containers" in node:
            yield path, node
        for key, value in node.items():
            yield from pods(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from pods(value, f"{path}[{number}]")


PODS = {
    f"{source} {document['metadata']['name']}{path}": pod
    for source, found in APPLIED.items()
    for document in found
    for path, pod in pods(document)
}


def test_there_are_pods_of_every_kind() -> None:
    assert {"cpu", "gpu", "spot", "dev", "rayjob.yaml", "serving.yaml"} <= set(APPLIED)
    assert len(PODS) > 25


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_restricted(name: str) -> None:
    pod = PODS[name]
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }, container["name"]  # fmt: skip


@pytest.mark.parametrize("name", PODS)
def test_what_must_be_written_is_a_volume(name: str) -> None:
    pod = PODS[name]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "emptyDir" in volumes[mounts["/tmp"]], container["name"]
        if container["image"].startswith("amlora-dist"):
            assert "emptyDir" in volumes[mounts["/home/amlora"]], "caches of libraries"
        assert all("hostPath" not in volume for volume in volumes.values())


@pytest.mark.parametrize("name", PODS)
def test_passwords_of_databases_are_files(name: str) -> None:
    for container in PODS[name]["containers"]:
        secrets = {entry["name"] for entry in container.get("env", []) if "secretKeyRef" in entry.get("valueFrom", {})}
        assert secrets <= {"HF_TOKEN", "AMLORA_API_KEY"}, "what has no file to be read from"


def test_the_namespace_enforces_it() -> None:
    for folder in OVERLAYS:
        (space,) = [one for one in APPLIED[folder.name] if one["kind"] == "Namespace"]
        assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_an_overlay_names_its_namespace_its_images_and_where_to_fill_in(folder: Path) -> None:
    text = (folder / "kustomization.yaml").read_text(encoding="utf-8")
    (settings,) = documents(folder / "kustomization.yaml")
    assert settings["namespace"] and {entry["name"] for entry in settings["images"]} == {"amlora-node", "amlora-mlflow"}
    assert "digest: sha256:" in text and "behavior: merge" in text
    assert "storageClassName" in text or folder.name == "dev"
    named = {(one["kind"], one["metadata"]["name"]) for one in APPLIED[folder.name]}
    assert {
        ("ConfigMap", "amlora-runs"), ("PersistentVolumeClaim", "amlora-data"), ("PodDisruptionBudget", "amlora-ray-head"),
        ("StatefulSet", "amlora-redis"),
    } <= named  # fmt: skip


def test_what_the_overlays_differ_in() -> None:
    def groups(overlay: str) -> dict[str, dict[str, Any]]:
        (cluster,) = [one for one in APPLIED[overlay] if one["kind"] == "RayCluster"]
        return {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}

    assert set(groups("cpu")) == set(groups("dev")) == {"workers"}
    assert set(groups("gpu")) == {"gpu"} and set(groups("spot")) == {"gpu", "spot"}
    for pod in groups("spot").values():
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert pod["nodeSelector"] and {"nvidia.com/gpu"} <= {one["key"] for one in pod["tolerations"]}
    assert "nvidia.com/gpu" not in groups("cpu")["workers"]["containers"][0]["resources"]["limits"]
    ordinary, spot = groups("spot")["gpu"], groups("spot")["spot"]
    same = ("volumes", "securityContext", "automountServiceAccountToken")
    assert [ordinary[key] for key in same] == [spot[key] for key in same]
    assert ordinary["containers"] == spot["containers"], "a spot node is a node like the others"
    assert rendered(KUBERAY) == APPLIED["spot"], "`kubectl apply -k cluster/kuberay` is what it was"


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_who_may_be_reached_from_where(folder: Path) -> None:
    found = {one["metadata"]["name"]: one["spec"] for one in APPLIED[folder.name] if one["kind"] == "NetworkPolicy"}
    assert set(found) == {"amlora-ray", "amlora-mlflow", "amlora-stores", "amlora-redis"}
    assert all(set(policy["policyTypes"]) == {"Ingress", "Egress"} for policy in found.values())
    assert found["amlora-stores"]["egress"] == found["amlora-redis"]["egress"] == [], "databases call nobody"
    assert all(rule.get("to") and (rule.get("ports") or rule["to"] == [{"podSelector": {"matchLabels": {"amlora": "ray"}}}])
               for policy in found.values() for rule in policy["egress"])  # fmt: skip
    covered = [policy["podSelector"] for policy in found.values()]
    kept = [one for one in APPLIED[folder.name] if one["kind"] in ("Deployment", "StatefulSet")]
    for label in (one["spec"]["template"]["metadata"]["labels"] for one in kept):
        assert any(_selects(selector, label) for selector in covered), label


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {})
    listed = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in exact.items()) and all(
        labels.get(one["key"]) in one["values"] for one in listed
    )


def test_the_head_s_state_is_kept_where_its_service_is() -> None:
    for folder in OVERLAYS:
        (cluster,) = [one for one in APPLIED[folder.name] if one["kind"] == "RayCluster"]
        options = cluster["spec"]["gcsFaultToleranceOptions"]
        host, _, port = options["redisAddress"].partition(":")
        (service,) = [one for one in APPLIED[folder.name] if (one["kind"], one["metadata"]["name"]) == ("Service", host)]
        assert service["spec"]["ports"][0]["port"] == int(port)
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "amlora-redis", "key": "password"}


def test_the_run_of_one_s_own_is_a_configuration() -> None:
    from amlora_dist.config.loading import load_config

    config = load_config(KUBERAY / "base" / "runs" / "run.yaml", [])
    assert (config.storage, str(config.data_dir)) == ("/mnt/shared/storage", "/mnt/data")


@pytest.mark.parametrize("folder", [KUBERAY, KUBERAY / "monitoring", *OVERLAYS], ids=lambda folder: folder.name)
def test_kustomize_builds_the_same(folder: Path) -> None:
    program = next((line for line in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(line[0])), None)
    if program is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*program, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

    def by_name(found: list[Document]) -> dict[tuple[str, str], Document]:
        return {(one["kind"], one["metadata"]["name"]): one for one in found}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(rendered(folder))


DIGEST = f"sha256:{'0123456789abcdef' * 4}"


def _images(found: list[Document]) -> set[str]:
    return {
        one["image"]
        for _, pod in pods(found)
        for one in [*pod["containers"], *pod.get("initContainers", [])]
    }


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_pins_every_image_by_its_digest_as_the_page_says(overlay: str, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n( +images:\n.*?)```", page, flags=re.DOTALL)
    copied = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, copied)
    file = copied / "overlays" / overlay / "kustomization.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) | yaml.safe_load(block.replace("sha256:…", DIGEST))
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    pinned = _images(rendered(file.parent))
    assert len(pinned) == 4 and all(image.endswith(f"@{DIGEST}") for image in pinned), pinned
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: only our own reading of the overlay was looked at")
    done = subprocess.run(
        ["kubectl", "kustomize", str(file.parent)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert _images(list(yaml.safe_load_all(done.stdout))) == pinned


@pytest.mark.parametrize("name", ["rayjob.yaml", "serving.yaml", "rayservice.yaml"])
def test_a_file_that_is_applied_alone_gets_its_digest_on_the_way(name: str) -> None:
    page = (REPOSITORY / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
    (command,) = re.findall(r'sed "s#(.*?)#\$image#"', page)
    text = (KUBERAY / name).read_text(encoding="utf-8").replace(command, f"registry.example.org/amlora-dist@{DIGEST}")
    assert _images(list(yaml.safe_load_all(text))) == {f"registry.example.org/amlora-dist@{DIGEST}"}


def test_the_base_image_is_an_argument_that_takes_a_digest() -> None:
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=python:3\.11-slim$", text, re.MULTILINE)
    assert re.findall(r"^FROM (?!base|build|run)(\S+)", text, re.MULTILINE) == ["${BASE}"], "nothing else is fetched"


MONITORING = KUBERAY / "monitoring"


def expressions() -> dict[str, str]:
    """Every query of the alerts and of the dashboard, by its name."""
    (rules,) = documents(MONITORING / "rules.yaml")
    found = {rule["alert"]: rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]}
    for panel in json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    return found


def test_alerts_and_dashboard_ask_for_figures_that_are_exported() -> None:
    from amlora_dist.evaluation.requests import Route
    from amlora_dist.serving.metrics import ServingMetrics

    counters = ServingMetrics()
    counters.passed("prefill", 2, 0.1)
    counters.answered("/v1/completions", 200, 0.1)
    counters.tokens(read=1, written=1)
    counters.serving("1")
    counters.follow_failed()
    counters.routed(Route(tasks={"one": 1.0}, adapters={"one": 1.0}, abstention=0.0))
    exported = set(re.findall(r"^(amlora_[a-z_]+)(?:\{| )", counters.page().decode(), re.MULTILINE))
    agent = Path(str(find_spec("ray").origin)).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    rays = set(re.findall(r'"(node_[a-z_]+)"', agent.read_text(encoding="utf-8")))
    asked = {name for query in expressions().values() for name in re.findall(r"\b(?:amlora|ray)_[a-z_]+", query)}
    ours = {name for name in asked if name.startswith("amlora_")}
    assert len(ours) > 8 and ours <= exported, ours - exported
    assert len(asked - ours) > 4 and {name.removeprefix("ray_") for name in asked - ours} <= rays


def test_labels_that_queries_pick_by_are_labels_of_our_figures() -> None:
    source = (REPOSITORY / "amlora_dist" / "serving" / "metrics.py").read_text(encoding="utf-8")
    for name, query in expressions().items():
        for label in re.findall(r"amlora_[a-z_]+\{([a-z]+)=", query):
            assert f'"{label}"' in source, (name, label)


def test_what_is_scraped_is_there_and_let_in() -> None:
    found = {one["kind"]: one for one in documents(MONITORING / "monitors.yaml")}
    (service,) = [one for one in APPLIED["serving.yaml"] if one["kind"] == "Service"]
    server = found["ServiceMonitor"]["spec"]
    assert server["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert server["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    nodes = found["PodMonitor"]["spec"]
    (cluster,) = [one for one in APPLIED["spot"] if one["kind"] == "RayCluster"]
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        assert nodes["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": nodes["podMetricsEndpoints"][0]["port"], "containerPort": 8080} in ports
    (policy,) = [one["spec"] for one in APPLIED["spot"]
                 if (one["kind"], one["metadata"]["name"]) == ("NetworkPolicy", "amlora-ray")]  # fmt: skip
    assert any({"port": 8080, "protocol": "TCP"} in rule.get("ports", []) for rule in policy["ingress"])


def test_every_alert_has_a_severity_and_a_place_in_the_guide() -> None:
    (rules,) = documents(MONITORING / "rules.yaml")
    guide = (REPOSITORY / "docs" / "how-to" / "first-hour-on-call.md").read_text(encoding="utf-8")
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
            assert f"`{rule['alert']}`" in guide, rule["alert"]
