"""Named crash points: the places where a process may die, so that tests can make it die exactly there.

``AMLORA_CRASH=point:kind[:nth]`` makes the ``nth`` (default first) arrival at ``point`` raise (``raise``), exit
(``exit``), send itself SIGKILL (``kill``) or pause itself until SIGCONT (``stop``); several are parted by commas. ``hold``
keeps the thread that arrives there until another one of them has happened, ``pass`` only happens: with these a test decides
which of two threads is first. With ``AMLORA_CRASH_ONCE=FILE`` each happens in one process only: the first to create
FILE.point. Unset, a crash point costs one comparison.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

POINTS = (
    "stage_claimed",
    "workers_started",
    "step_done",
    "checkpoint_written",
    "checkpoint_committed",
    "training_ended",
    "adapter_gathered",
    "scores_written",
    "artifacts_uploaded",
    "read_back",
    "version_registered",
    "alias_moved",
    "run_closed",
)

HOLD_DEADLINE_S = 60.0
_SPEC = os.environ.get("AMLORA_CRASH", "")
_seen: Counter[str] = Counter()
_happened = threading.Event()


class CrashedOnPurposeError(RuntimeError):
    """Raised at a crash point by a test."""


def reach(point: str) -> None:
    """Die here if a test asked for it. ``point`` is one of ``POINTS``."""
    if not _SPEC:
        return
    _seen[point] += 1
    for spec in _SPEC.split(","):
        name, _, rest = spec.partition(":")
        kind, _, nth = rest.partition(":")
        if name != point or _seen[point] != int(nth or 1):
            continue
        if _first_process(point):
            _die(point, kind)


def _die(point: str, kind: str) -> None:
    if kind == "hold":
        if not (_happened_in_another_process() or _happened.wait(HOLD_DEADLINE_S)):
            raise CrashedOnPurposeError(f"crash point {point!r}: held for {HOLD_DEADLINE_S:.0f} s (AMLORA_CRASH={_SPEC})")
        return
    _happened.set()
    if kind == "pass":
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    if kind == "exit":
        os._exit(70)
    raise CrashedOnPurposeError(f"crash point {point!r} (AMLORA_CRASH={_SPEC})")


def _happened_in_another_process() -> bool:
    """Whether what a held thread waits for has happened already, in a process that died of it before anybody was held."""
    marker = os.environ.get("AMLORA_CRASH_ONCE")
    others = (spec.split(":") for spec in _SPEC.split(","))
    return any(kind != "hold" and os.path.exists(f"{marker}.{point}") for point, kind, *_ in others) if marker else False


def _first_process(point: str) -> bool:
    marker = os.environ.get("AMLORA_CRASH_ONCE")
    if not marker:
        return True
    try:
        os.close(os.open(f"{marker}.{point}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
