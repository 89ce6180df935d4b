"""Whether a process that is named in the store still exists: answered only where that is certain.

A pid means something in its own PID namespace until the machine starts again, and a later process may get the same
number. The mark therefore names the boot, the namespace and the moment the process started; whoever has another boot
or namespace (another machine, another container) cannot tell, and goes by the heartbeat.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def process_mark(pid: str) -> str:
    """``<boot> <namespace> <start>`` of a process here; empty where the system does not tell (not Linux)."""
    try:
        return f"{_here()} {_state_and_start(pid)[1]}"
    except OSError:
        return ""


def has_ended(who: Mapping[str, str]) -> bool:
    """Whether the process ``{"pid": ..., "process": mark}`` ran on this machine and is gone. False: it lives, or
    nobody here can tell."""
    pid, mark = who.get("pid", ""), who.get("process", "")
    here, _, started = mark.rpartition(" ")
    try:
        if not here or here != _here():
            return False
        os.kill(int(pid), 0)
        state, start = _state_and_start(pid)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # another user's process, or a system that hides it: it exists
        return False
    return state in ("Z", "X") or start != started


def _here() -> str:
    return f"{_BOOT.read_text(encoding='ascii').strip()} {os.readlink(_NAMESPACE)}"


def _state_and_start(pid: str) -> tuple[str, str]:
    """State and start time (clock ticks since boot) of ``/proc/<pid>/stat``, whose second field may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]
