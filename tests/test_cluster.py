"""What ``cluster/`` says, the code has: every flag, path, port, environment variable and image tag."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.cli.main import app
from pipelines.cluster.serve import STOP_GRACE_S
from tests.kustomization import documents, rendered

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
FILES = sorted(KUBERAY.rglob("*.yaml"))
PATCH = "serving-vllm.yaml"
ALONE = [file for file in FILES if file.parent == KUBERAY and file.name not in ("kustomization.yaml", PATCH)]
"""Manifests that are applied by themselves."""
DOCKERFILE = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
SCHEMAS = Path(os.environ.get("AMLORA_KUBERAY_SCHEMAS", REPOSITORY.parent / "shared" / "kuberay"))
"""KubeRay's custom resource definitions, as its releases ship them; they are not part of this project."""


ALL = [
    *(("", document) for document in rendered(KUBERAY)),
    *((file.name, document) for file in ALONE for document in documents(file)),
]
"""What is applied: by name of the file, empty for what `kubectl apply -k cluster/kuberay` does."""


def applied(kind: str, name: str = "amlora") -> dict[str, Any]:
    """One document of ``kubectl apply -k cluster/kuberay``."""
    documents = {(one["kind"], one["metadata"]["name"]): one for file, one in ALL if not file}
    return documents[kind, name]


def ray_documents() -> list[dict[str, Any]]:
    """The cluster that stays, and the run with a cluster of its own."""
    return [applied("RayCluster"), *documents(KUBERAY / "rayjob.yaml")]


def policies() -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document["spec"] for _, document in ALL if document["kind"] == "NetworkPolicy"}


def values(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with the keys above it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from values(value, (*path, str(key)))
    elif isinstance(node, list):
        for value in node:
            yield from values(value, path)
    else:
        yield path, node


def containers(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "containers":
                yield from value
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def version() -> str:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.*)"', text, re.MULTILINE)[1]


def pinned(package: str) -> str:
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{package}==(.*)$", text, re.MULTILINE)
    assert found, f"{package} is not in constraints.txt"
    return found[1]


def everything() -> str:
    pages = [REPOSITORY / "docs" / "cluster.md", *sorted((REPOSITORY / "docs" / "how-to").glob("*.md"))]
    files = [*FILES, CLUSTER / "ray-cluster.yaml", CLUSTER / "Dockerfile", *pages]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


# -- schemas -----------------------------------------------------------------------------------------------------------


def test_the_launchers_yaml_is_valid_by_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(config)] == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("file", "kind"),
    [("raycluster.yaml", "rayclusters"), ("rayjob.yaml", "rayjobs"), ("rayservice.yaml", "rayservices")],
)
def test_kuberays_resources_are_valid_by_its_definitions(file: str, kind: str) -> None:
    source = SCHEMAS / f"ray.io_{kind}.yaml"
    if not source.is_file():
        pytest.skip(f"KubeRay's definitions are not at {SCHEMAS}; set AMLORA_KUBERAY_SCHEMAS to a folder that has them")
    definition = yaml.safe_load(source.read_text(encoding="utf-8"))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    document = applied("RayCluster") if file == "raycluster.yaml" else documents(KUBERAY / file)[0]
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == definition["spec"]["names"]["kind"]
    jsonschema.validate(document, closed(schema))


def closed(schema: Any) -> Any:
    """The schema refusing keys that it does not name: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    return out


def test_every_document_is_one_and_its_references_lead_somewhere() -> None:
    names = {(document["kind"], document["metadata"]["name"]) for _, document in ALL}
    for _, document in ALL:
        for path, value in values(document):
            if path[-1] == "claimName":
                assert ("PersistentVolumeClaim", value) in names
            if path[-2:] == ("configMap", "name"):
                assert ("ConfigMap", value) in names
    services = {name for kind, name in names if kind == "Service"}
    assert {"amlora-mlflow", "amlora-postgres", "amlora-s3"} <= services
    for host in re.findall(r"(?:@|//|redisAddress: )(amlora-[a-z0-9-]+):", everything()):
        assert host in services, host


def test_mounts_have_volumes_and_shared_storage_is_mounted_on_every_node() -> None:
    for document in ray_documents():
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for pod in (group["template"]["spec"] for group in pods):
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert set(mounts) <= volumes and mounts["shared"] == "/mnt/shared"


# -- images and versions -----------------------------------------------------------------------------------------------


def test_image_tags_are_this_version_and_targets_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    tags = set(re.findall(r"amlora-dist:([A-Za-z0-9._-]+)", everything()))
    assert tags, "the project's own images are used"
    for tag in tags:
        number, _, target = tag.partition("-")
        assert number == version() and target in targets, tag
    images = [container["image"] for _, document in ALL for container in containers(document)]
    own = {image for image in images if image.startswith("amlora")}
    assert own <= {f"amlora-dist:{version()}-{target}" for target in targets}
    assert all(":" in image and not image.endswith(":latest") for image in images), "every image has a tag"


def test_ray_has_the_version_of_the_constraints() -> None:
    for _, document in ALL:
        for path, value in values(document):
            if path[-1] == "rayVersion":
                assert value == pinned("ray")


def test_the_dockerfile_copies_what_exists() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        words = [word for word in line.split() if not word.startswith("--")]
        source = re.search(r"--from=(\S+)", line)
        if source:
            assert source[1] in stages
            continue
        for name in words[:-1]:
            assert (REPOSITORY / name).exists(), name


# -- commands, paths, variables, ports ---------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """Every call of our program in the manifests, the Dockerfile and the guide."""
    text = re.sub(r"\\\n\s*", " ", everything())
    job = documents(KUBERAY / "rayjob.yaml")[0]["spec"]["entrypoint"]
    found = [job, *re.findall(r"^(?:\$ )?(amlora [^\n`#]*)", text, re.MULTILINE), *re.findall(r"`(amlora [^`\n]*)`", text)]
    return [shlex.split(line) for line in found]


def test_every_command_and_option_exists() -> None:
    program = typer.main.get_command(app)
    assert len(commands()) > 5
    for words in commands():
        words = words[words.index("pipelines.cli") + 1 :] if "pipelines.cli" in words else words[1:]
        command = program.commands.get(words[0])
        assert command is not None, words
        options = {name for parameter in command.params for name in parameter.opts}
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
        assert used <= options, (words, used - options)


@pytest.mark.integration
def test_every_flag_of_the_programs_that_are_started_exists() -> None:
    from mlflow.cli import cli as mlflow
    from ray.scripts.scripts import start, stop

    def flags(command: Any) -> set[str]:
        return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}

    every = {container["name"]: container for _, document in ALL for container in containers(document)}
    script = " ".join(every["mlflow"]["args"]).replace("\\\n", " ")
    line = re.search(r"exec mlflow server (.*)", script)[1]
    used = {argument.partition("=")[0] for argument in line.split()}
    assert used <= flags(mlflow.commands["server"]), used - flags(mlflow.commands["server"])
    assert "--app-name=basic-auth" in line and pinned("Flask-WTF")
    launcher = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text(encoding="utf-8"))
    for line in (*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]):
        program, verb, *rest = line.split()
        assert program == "ray" and verb in ("start", "stop")
        used = {word.partition("=")[0] for word in rest}
        assert used <= flags({"start": start, "stop": stop}[verb]), line
    for document in ray_documents():
        spec = document["spec"]
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert {f"--{key}" for key in group["rayStartParams"]} <= flags(start)


def test_every_configuration_that_is_named_exists_and_every_override_is_a_key() -> None:
    from amlora_dist.config.loading import load_config

    for name in re.findall(r"configs/[a-z0-9_]+\.yaml", everything()):
        assert (REPOSITORY / name).is_file(), name
    for words in commands():
        overrides = [word for word in words if re.match(r"[a-z_.]+=[^=]", word)]
        load_config(REPOSITORY / "configs" / "standard_cl_order1.yaml", overrides)


def test_every_environment_variable_is_read_by_somebody() -> None:
    every = [container for _, document in ALL for container in containers(document)]
    named = {entry["name"] for container in every for entry in container.get("env", [])}
    named |= set(re.findall(r"(?:--env=|\bENV |\s)([A-Z][A-Z0-9_]{3,})=", everything()))
    named |= set(yaml.safe_load(documents(KUBERAY / "rayjob.yaml")[0]["spec"]["runtimeEnvYAML"])["env_vars"])
    sources = [*(REPOSITORY / "amlora_dist").rglob("*.py"), *(REPOSITORY / "pipelines").rglob("*.py")]
    own = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    manifests = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    # What the programs in the containers read: PostgreSQL's and MinIO's images, pip, Python, CUDA's runtime, NCCL, the Hub's
    # client.
    others = re.compile(r"(POSTGRES_|PGDATA|MINIO_ROOT_|PIP_|PYTHON|NVIDIA_|NCCL_|AWS_|HF_(HOME|TOKEN)$|PATH$)")
    ray_files = Path(ray.__file__).parent
    for name in sorted(named):
        if others.match(name) or name in own or f"$({name})" in manifests:
            continue
        package = ray_files if name.startswith("RAY_") else Path(str(pytest.importorskip("mlflow").__file__)).parent
        known = ["_private/authentication", "_private/ray_constants.py", "dashboard/modules/job", "_common/usage"]
        known = known if package is ray_files else ["environment_variables.py", "cli/__init__.py"]
        roots = [package / part for part in known]
        files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))]
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        assert name in text or name in {"RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"}, name


def test_ports_are_the_ones_that_are_listened_on() -> None:
    from ray._private import ray_constants

    head = applied("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["dashboard"] == ray_constants.DEFAULT_DASHBOARD_PORT
    assert ports["gcs-server"] == ray_constants.DEFAULT_PORT
    listened = {port["containerPort"] for _, document in ALL for c in containers(document) for port in c.get("ports", [])}
    for policy in policies().values():
        outside = {53, 443}  # the cluster's DNS; the Hub and object storage
        for path, value in values(policy):
            if path[-1] == "port":
                assert value in listened or ("egress" in path and value in outside), value
    for port in re.findall(r"amlora-mlflow:([0-9]+)", everything()):
        assert int(port) == 5000
    assert "EXPOSE 6379 8265 10001" in DOCKERFILE
    launcher = (CLUSTER / "ray-cluster.yaml").read_text(encoding="utf-8")
    assert "--port=6379" in launcher and "--dashboard-port=8265" in launcher


def test_a_retried_job_is_the_same_run() -> None:
    job = documents(KUBERAY / "rayjob.yaml")[0]["spec"]
    assert job["backoffLimit"] >= 1 and "--run-id llama3-70b" in job["entrypoint"] and "$(" not in job["entrypoint"]
    assert "storage=/mnt/shared/" in job["entrypoint"], "what it resumes from outlives the cluster"


def test_the_pod_that_hands_a_job_over_passes_the_network_policy() -> None:
    rules = [r for r in policies()["amlora-ray"]["ingress"] if {"port": 8265, "protocol": "TCP"} in r.get("ports", [])]
    admitted = [peer["podSelector"]["matchLabels"] for rule in rules for peer in rule["from"] if "podSelector" in peer]
    template = documents(KUBERAY / "rayjob.yaml")[0]["spec"]["submitterPodTemplate"]
    assert template["metadata"]["labels"] in admitted
    assert template["spec"]["restartPolicy"] == "Never", "a Job's pod must say so"
    (container,) = template["spec"]["containers"]
    assert "command" not in container, "KubeRay's own, with the token"


def test_what_the_driver_fetches_from_the_hub_lies_where_all_nodes_read_it() -> None:
    for document in ray_documents():
        every = containers(document)
        nodes = [container for container in every if container["name"] in ("ray-head", "ray-worker")]
        assert len(nodes) == 3
        for node in nodes:
            variables = {entry["name"]: entry for entry in node["env"]}
            mounted = {mount["mountPath"] for mount in node["volumeMounts"] if mount["name"] == "shared"}
            for variable in ("HF_HOME", "AMLORA_HOME"):
                assert any(variables[variable]["value"].startswith(f"{place}/") for place in mounted)
            assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    launcher = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text(encoding="utf-8"))["docker"]["run_options"]
    assert "--volume=/mnt/shared:/mnt/shared" in launcher and "--env=HF_HOME=/mnt/shared/huggingface" in launcher


def test_the_server_s_pods_are_probed_where_it_answers_and_have_the_time_to_finish() -> None:
    found = {document["kind"]: document for document in documents(KUBERAY / "serving.yaml")}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = typer.main.get_command(app).commands[container["args"][0]]
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    given = dict(argument.split("=") for argument in container["args"][2:])
    assert container["command"] == ["amlora"] and set(given) <= set(options)
    assert container["args"][1].endswith("@champion"), "never whatever is newest"
    assert container["ports"] == [{"name": "http", "containerPort": int(given["--port"])}]
    app_source = (REPOSITORY / "amlora_dist" / "serving" / "app.py").read_text(encoding="utf-8")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "http" and container[probe]["httpGet"]["path"] in app_source
    assert pod["terminationGracePeriodSeconds"] >= float(given["--request-timeout"]) + STOP_GRACE_S
    assert pod["securityContext"]["runAsNonRoot"] and f"--uid {pod['securityContext']['runAsUser']}" in DOCKERFILE
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for place in (found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]):
        assert place == labels
    scaled = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert {"podSelector": {"matchLabels": labels}} in policies()["amlora-mlflow"]["ingress"][0]["from"]


def test_vllm_next_to_the_server_is_started_as_the_server_wants_it() -> None:
    whole = {document["kind"]: document for document in documents(KUBERAY / "serving.yaml")}["Deployment"]
    (patch,) = documents(KUBERAY / "serving-vllm.yaml")
    assert [patch[key] for key in ("apiVersion", "kind")] == [whole[key] for key in ("apiVersion", "kind")]
    assert patch["metadata"]["name"] == whole["metadata"]["name"]
    pod = whole["spec"]["template"]["spec"]
    server, vllm = patch["spec"]["template"]["spec"]["containers"]
    assert server["name"] == pod["containers"][0]["name"], "a patch joins containers by their names"
    command = typer.main.get_command(app).commands[server["args"][0]]
    given = dict(argument.split("=", 1) for argument in server["args"][2:])
    assert set(given) <= {name for parameter in command.params for name in parameter.opts}
    before = dict(argument.split("=", 1) for argument in pod["containers"][0]["args"][2:])
    assert {key: given[key] for key in before} == before and server["args"][:2] == pod["containers"][0]["args"][:2]
    flags = dict((*argument.split("=", 1), None)[:2] for argument in vllm["args"])
    assert given["--engine"] == "vllm" and given["--engine-url"] == f"http://{flags['--host']}:{flags['--port']}"
    assert given["--engine-rank"] == flags["--max-lora-rank"]
    child = (REPOSITORY / "pipelines" / "cluster" / "vllm_process.py").read_text(encoding="utf-8")
    assert all(f'"{flag}"' in child for flag in flags), "the flags with which the server starts one itself"
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "True"} in vllm["env"]
    assert vllm["securityContext"] == pod["containers"][0]["securityContext"]
    assert {mount["name"] for mount in vllm["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    home = next(entry["value"] for entry in pod["containers"][0]["env"] if entry["name"] == "AMLORA_HOME")
    assert any(home.startswith(f"{mount['mountPath']}/") for mount in vllm["volumeMounts"]), "both see the rows"


@pytest.mark.integration
def test_the_rayservice_holds_an_application_that_is_there_and_takes_its_arguments() -> None:
    import importlib

    from ray.serve.schema import ServeDeploySchema

    from pipelines.cluster.serve_app import ServedBankArgs

    (document,) = documents(KUBERAY / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    args = ServedBankArgs.model_validate(application.args)
    assert args.bank.endswith("@champion"), "never whatever is newest"
    cluster = document["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == args.replicas, "a node, and its GPU, for each"
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    assert pods[1]["terminationGracePeriodSeconds"] >= args.limits.request_timeout_s + STOP_GRACE_S
    server = {document["kind"]: document for document in documents(KUBERAY / "serving.yaml")}["Deployment"]
    plain = server["spec"]["template"]["spec"]
    for pod in pods:
        (container,) = pod["containers"]
        assert {port["name"]: port["containerPort"] for port in container["ports"]}["serve"] == config.http_options.port
        assert pod["securityContext"] == plain["securityContext"] and not pod["automountServiceAccountToken"]
        assert container["securityContext"] == plain["containers"][0]["securityContext"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package of one of the images' locks."""
    found: dict[str, tuple[str, int]] = {}
    text = (CLUSTER / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in (line for line in text.splitlines() if not line.startswith("#")):
        package, number = line.split()[0].split("==")
        found[package.lower()] = (number, line.count("--hash=sha256:"))
    return found


def test_everything_that_an_image_installs_has_one_version_and_all_but_torch_for_cpus_a_hash() -> None:
    installed = re.findall(r"pip install (.*)", DOCKERFILE)
    loose = [line for line in installed if "--require-hashes" not in line and not line.endswith(" .")]
    assert len(loose) == 1 and "-c constraints.txt" in loose[0] and loose[0].endswith("whl/cpu torch") and pinned("torch")
    assert all("--no-deps" in line for line in installed), "a lock is whole"
    locks = sorted(file.name for file in CLUSTER.glob("requirements*.txt"))
    assert set(locks) == set(re.findall(r"cluster/(requirements[a-z-]*\.txt)", DOCKERFILE))
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    known = {canonicalize_name(name): number for name, number in re.findall(r"^(\S+)==(\S+)$", constraints, re.MULTILINE)}
    for name in locks:
        for package, (number, hashes) in locked(name).items():
            assert hashes, f"{name}: {package}"
            assert number == known.get(package, number), f"{name}: {package}: make lock"


def test_the_lock_has_everything_that_the_project_needs_but_torch() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    lock = {*locked("requirements.txt"), *locked("requirements-cuda.txt")}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for needed in map(Requirement, [*project["dependencies"], *extras["search"], *extras["serve"]]):
        assert canonicalize_name(needed.name) in lock, f"{needed.name}: make lock"
    torch_needs = {"filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"}
    assert torch_needs <= locked("requirements.txt").keys(), "torch for CPUs is installed without what it needs"
    assert not any(name.startswith(("torch", "nvidia", "cuda", "triton")) for name in locked("requirements.txt"))
    assert "torch" in locked("requirements-cuda.txt")


def test_the_source_comes_after_what_it_needs() -> None:
    """A change of ours builds no layer of packages again."""
    stages = [stage for stage in DOCKERFILE.split("\nFROM ") if "COPY amlora_dist" in stage]
    assert len(stages) == 2
    for stage in stages:
        before, _, after = stage.partition("COPY pyproject.toml")
        assert "COPY amlora_dist" in after and "pip install" in before
        assert re.findall(r"pip install .*", after) == ["pip install --no-deps --no-build-isolation ."]


def test_every_container_asks_for_resources_and_ray_is_not_reachable_by_all() -> None:
    for _, document in ALL:
        for container in containers(document):
            assert container["resources"]["requests"], container["name"]
    assert all(rule.get("from") for policy in policies().values() for rule in policy["ingress"])
    assert policies()["amlora-ray"]["podSelector"]["matchLabels"] == {"amlora": "ray"}
    spec = applied("RayCluster")["spec"]
    assert spec["authOptions"]["mode"] == "token"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"]["amlora"] == "ray"
