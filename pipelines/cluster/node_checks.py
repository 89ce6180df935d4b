"""Runs on a cluster: one probe on every node looks at what a stage needs of it, and all look at each other.

Started as a job by ``amlora doctor --address``; prints one JSON object a line behind ``MARK``, everything else is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from amlora_dist.config.loading import home
from amlora_dist.errors import plain_reason
from pipelines.cluster.local_checks import ENOUGH_DISK, ENOUGH_FILES, ENOUGH_MEMORY, ENOUGH_SHARED_MEMORY, GIB, Check

MARK = "amlora-check: "
PACKAGES = ("amlora-dist", "ray", "torch", "transformers", "deepspeed", "mlflow", "safetensors")
DEADLINE_S = 120.0
CONNECT_S = 5.0
DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Stores that MLflow reaches without a server of its own, and where they listen."""
Ask = Callable[..., dict[str, Any]]


class Probe:
    """One node, seen from itself."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def facts(self, storage: str) -> dict[str, Any]:
        """Versions, GPUs, and free bytes."""
        return {
            "host": socket.gethostname(),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "memory": psutil.virtual_memory().available,
            "shared_memory": _free(Path("/dev/shm")),
            "disk": _free(home() if "://" in storage else Path(storage)),
            "local_disk": _free(Path(tempfile.gettempdir())),
            "gpus": _gpus(),
            "files": _open_files(),
            "hub": os.environ.get("HF_HOME"),
        }

    def write(self, storage: str, name: str, text: str) -> str | None:
        """Write a file as checkpoints are written, tmp and then renamed, and append to it, as progress is reported; at a
        URL in one piece. What went wrong, or None."""
        if "://" in storage:
            return _written(f"{storage}/{name}", text)
        folder = Path(storage)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tmp = folder / f".{name}.{os.getpid()}"
            tmp.write_text(text[:8], encoding="utf-8")
            tmp.replace(folder / name)
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write(text[8:])
        except OSError as error:
            return f"{error.strerror or error}".lower()
        return None

    def sees(self, storage: str, expected: dict[str, str]) -> list[str]:
        """Names of the files that are not there, or not as they were written, after a while."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            missing = [name for name, text in expected.items() if _read(storage, name) != text]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.2)

    def remove(self, storage: str, name: str) -> None:
        """Take the own file away again."""
        with contextlib.suppress(Exception):
            if "://" in storage:
                system, path = _at(f"{storage}/{name}")
                system.rm_file(path)
            else:
                (Path(storage) / name).unlink()

    def listen(self) -> tuple[str, int]:
        """Address that others can try, as gloo and NCCL will: any free port."""
        import ray

        self._listener = socket.create_server(("", 0), backlog=64)
        return ray.util.get_node_ip_address(), self._listener.getsockname()[1]

    def reaches(self, addresses: dict[str, tuple[str, int]]) -> dict[str, str]:
        """Nodes that cannot be connected to, and why."""
        out: dict[str, str] = {}
        for node, (host, port) in addresses.items():
            try:
                socket.create_connection((host, port), timeout=CONNECT_S).close()
            except OSError as error:
                out[node] = f"{host}: {error.strerror or error}".lower()
        return out

    def mlflow(self, uri: str) -> str | None:
        """Why MLflow cannot be used from here; None if it can."""
        if uri.startswith("sqlite:///"):
            file = Path(uri.removeprefix("sqlite:///"))
            return None if file.parent.is_dir() else f"no folder {file.parent}"
        where = urlsplit(uri)
        if port := DATABASES.get(where.scheme.partition("+")[0]):
            try:
                socket.create_connection((where.hostname or "", where.port or port), timeout=CONNECT_S).close()
            except OSError as error:
                return f"{where.hostname}: {error.strerror or error}".lower()
            return None
        import requests
        from mlflow.utils.credentials import read_mlflow_creds

        # Not /health: a server answers that to anybody, and refuses the rest to a host name it does not know.
        known = read_mlflow_creds()  # as MLflow's client: ~/.mlflow/credentials, or variables
        try:
            answer = requests.get(
                f"{uri.rstrip('/')}/api/2.0/mlflow/registered-models/search", params={"max_results": 1},
                timeout=CONNECT_S, auth=(known.username, known.password or "") if known.username else None,
            )  # fmt: skip
        except requests.RequestException as error:
            message = str(error).splitlines()[0]
            return (message.partition("Caused by ")[2] or message)[:200]
        return None if answer.ok else f"{answer.status_code} {answer.reason}: {answer.text[:100].strip()}"


def examine_nodes(storage: str, tracking_uri: str | None) -> Iterator[Check]:
    """All checks of all nodes of the cluster that this process is connected to."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    actor = ray.remote(num_cpus=0)(Probe)
    probes = {
        node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    }
    names = {node: f"{data['NodeManagerHostname']} ({data['NodeManagerAddress']})" for node, data in nodes.items()}
    if len(set(names.values())) < len(names):
        names = {node: f"{name} {node[:6]}" for node, name in names.items()}

    silent: dict[str, str] = {}

    def ask(method: str, *arguments: Any, own: dict[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Every node's answer; one that gives none is not asked again."""
        deadline = time.monotonic() + DEADLINE_S
        waiting = {
            node: getattr(probe, method).remote(*arguments, *(own or {}).get(node, ())) for node, probe in probes.items()
        }
        out: dict[str, Any] = {}
        for node, ref in waiting.items():
            try:
                out[node] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            except RayError as error:
                silent[node] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
                del probes[node]
        return out

    yield Check("nodes", "ok", f"{len(nodes)}: {', '.join(names.values())}")
    facts = ask("facts", storage)
    if facts:
        yield from _versions(facts, names)
    for node, found in facts.items():
        yield from _machine(names[node], found)
        yield _graphics(names[node], found["gpus"], nodes[node]["Resources"].get("GPU", 0.0))
    if len(facts) > 1 and "://" not in storage:
        yield from _hub(storage, facts, names)
    yield from _storage(storage, list(probes), names, ask)
    if tracking_uri:
        for node, fault in ask("mlflow", tracking_uri).items():
            fix = "open the port to this node, start the server, or allow its name (--allowed-hosts)" if fault else ""
            yield Check(f"{names[node]} MLflow", "bad" if fault else "ok", fault or tracking_uri, fix)
    addresses = ask("listen")
    for node, unreachable in ask("reaches", addresses).items():
        message = "; ".join(f"{names[other]}: {why}" for other, why in unreachable.items())
        fix = "open all TCP ports between the nodes: gloo and NCCL choose them freely" if unreachable else ""
        yield Check(f"{names[node]} ports", "bad" if unreachable else "ok", message or "reaches every node", fix)
    for node, reason in silent.items():
        fix = "see whether it lives (`ray list nodes`) and runs the same image, start it again"
        yield Check(f"{names[node]} node", "bad", f"gave no answer: {reason}", fix)


def _versions(facts: dict[str, Any], names: dict[str, str]) -> Iterator[Check]:
    for package in ("python", *PACKAGES):
        found = {node: fact["versions"][package] for node, fact in facts.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        odd = [f"{names[node]} has {version or 'none'}" for node, version in found.items() if version != usual]
        if usual is None and package == "amlora-dist":
            yield Check(package, "ok", "shipped with the job")
            continue
        fix = f"install the same {package} on every node: use one image" if odd or usual is None else ""
        yield Check(package, "bad" if fix else "ok", "; ".join([str(usual or "not installed"), *odd]), fix)


def _machine(name: str, found: dict[str, Any]) -> Iterator[Check]:
    for what, key, enough, fix in (
        ("memory", "memory", ENOUGH_MEMORY, "end something, or take fewer workers a node"),
        ("shared memory", "shared_memory", ENOUGH_SHARED_MEMORY, "start the container with a larger /dev/shm (--shm-size)"),
        ("disk", "disk", ENOUGH_DISK, "make room on the storage"),
        ("local disk", "local_disk", ENOUGH_DISK, "make room: Ray keeps logs, packages and spilled objects there"),
    ):
        free = found[key]
        if free is not None:
            fine = free >= enough
            yield Check(f"{name} {what}", "ok" if fine else "warn", f"{free / GIB:.1f} GiB free", "" if fine else fix)
    fine = found["files"] is None or found["files"] >= ENOUGH_FILES
    if not fine:
        yield Check(f"{name} open files", "warn", str(found["files"]), f"ulimit -n {ENOUGH_FILES * 4}")


def _graphics(name: str, found: list[str], offered: float) -> Check:
    """``found``: names of the GPUs that torch sees; ``offered``: how many Ray counts."""
    counted = Counter(found)
    message = ", ".join(f"{count} x {kind}" for kind, count in counted.items()) or "none"
    if offered > len(found):
        fix = "take the image with CUDA, start its container with the GPUs (--gpus=all), look at the driver's version"
        return Check(f"{name} GPUs", "bad", f"Ray counts {offered:g}, torch sees {message}", fix)
    return Check(f"{name} GPUs", "ok", message + (f"; Ray offers {offered:g}" if offered < len(found) else ""))


def _hub(storage: str, facts: dict[str, Any], names: dict[str, str]) -> Iterator[Check]:
    """The driver fetches a base model from the Hub into ``HF_HOME``, and workers on every node read it there."""
    places = {node: fact["hub"] for node, fact in facts.items()}
    if len(set(places.values())) == 1 and None not in places.values():
        yield Check("HF_HOME", "ok", str(next(iter(places.values()))))
        return
    message = "; ".join(f"{names[node]}: {place or 'not set'}" for node, place in places.items())
    fix = f"for base models from the Hub set it on every node to one shared folder, such as {Path(storage) / 'huggingface'}"
    yield Check("HF_HOME", "warn", message, fix)


def _storage(storage: str, nodes: list[str], names: dict[str, str], ask: Ask) -> Iterator[Check]:
    """Every node writes a file, then every node looks for all of them."""
    run = uuid.uuid4().hex[:8]
    written = {node: (f"amlora-doctor-{run}-{node[:12]}", uuid.uuid4().hex) for node in nodes}
    faults = ask("write", storage, own=written)
    expected = {name: text for node, (name, text) in written.items() if faults.get(node, "silent") is None}
    by_file = {name: node for node, (name, _) in written.items()}
    missing = ask("sees", storage, expected)
    ask("remove", storage, own={node: (name,) for node, (name, _) in written.items()})
    for node in missing:
        if faults[node]:
            fix = "mount it there, writable by this user"
            if "://" in storage:
                fix = "give the node its package for fsspec (s3fs, gcsfs, adlfs) and its credentials"
            yield Check(f"{names[node]} storage", "bad", f"{storage}: {faults[node]}", fix)
        elif missing[node]:
            others = ", ".join(names[by_file[name]] for name in missing[node])
            fix = "give the same folder (or endpoint) to every node: each writes to its own"
            yield Check(f"{names[node]} storage", "bad", f"{storage}: does not see what was written on {others}", fix)
        else:
            yield Check(f"{names[node]} storage", "ok", f"{storage}: writable and shared")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _free(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def _read(storage: str, name: str) -> str | None:
    try:
        if "://" in storage:
            system, path = _at(f"{storage}/{name}")
            return bytes(system.cat_file(path)).decode()
        return (Path(storage) / name).read_text(encoding="utf-8")
    except Exception:  # noqa: BLE001  (every store has errors of its own)
        return None


def _at(url: str) -> tuple[Any, str]:
    from amlora_dist.training.remote_storage import file_system

    return file_system(url)


def _written(url: str, text: str) -> str | None:
    """What went wrong, or None."""
    try:
        system, path = _at(url)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, text.encode())
    except Exception as error:  # noqa: BLE001
        return plain_reason(error)
    return None


def _gpus() -> list[str]:
    """Names, one for each GPU."""
    import torch

    return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _open_files() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


def main() -> None:
    """The job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--tracking-uri")
    arguments = parser.parse_args()
    import ray

    # Older versions of Ray hide a node's GPUs from whoever asks for none of them, as the probes do.
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}})
    for check in examine_nodes(arguments.storage, arguments.tracking_uri):
        fields = {"name": check.name, "state": check.state, "found": check.found, "fix": check.fix}
        print(MARK + json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
