"""Who may write: leases on run ids and claims on training fingerprints, by a uniqueness constraint of the store.

A lease with key ``k`` is a row of entries ``amlora.lease.k.1``, ``amlora.lease.k.2``, ... of which the store creates
each name at most once. Who creates the entry of an epoch holds it; the highest epoch is the one that counts. In
MLflow an entry is an empty registered model, so leases show in its user interface under ``amlora.lease.``; they hold
no versions, and every listing of this project leaves them out.

The holder raises a counter in its entry (the heartbeat). Whoever wants the lease judges the holder dead when that
counter did not change over ``dead_after_s`` on its *own* monotonic clock: clocks of two machines are never compared.
On the holder's own machine its process is looked up instead, and one that has ended is replaced at once. A dead holder
is replaced by creating the entry of the next epoch. The highest entry is kept, lower ones are deleted; a slow claimer
can so re-create a deleted name, which is why a claim counts only after a look that finds none higher.

A holder that was paused and wakes up late finds a higher epoch (``Lease.check`` raises) before each write. Between
that look and the write it may be paused again, so readers ignore what is stale: the entry of an epoch lists the
version numbers that counted when it took over, and a version counts when its epoch is the current one or its number
is in that list (``counted``).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from amlora_dist.errors import AmloraError, HeldError, LeaseLostError
from amlora_dist.registry import tags
from amlora_dist.registry.processes import has_ended, process_mark

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

_ATTEMPTS = 20


class Entries(Protocol):
    """What a store must offer: names that can be created once, with text tags."""

    def create_entry(self, name: str, values: Mapping[str, str]) -> bool:
        """Create the entry with its tags in one step; False when the name exists."""

    def entries(self, prefix: str) -> dict[str, dict[str, str]]:
        """Tags of all entries whose name starts with ``prefix``."""

    def tag_entry(self, name: str, key: str, value: str) -> bool:
        """Set a tag; False when there is no such entry."""

    def delete_entry(self, name: str) -> None:
        """Delete; nothing happens when there is no such entry."""


class Numbered(Protocol):
    """A version as far as counting goes."""

    @property
    def number(self) -> int: ...

    @property
    def epoch(self) -> int: ...


V = TypeVar("V", bound=Numbered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds; ``dead_after_s`` should be several heartbeats, because a busy store delays them."""

    heartbeat_s: float = 3.0
    dead_after_s: float = 15.0
    poll_s: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseState:
    """What the store says of a lease: its highest epoch."""

    key: str
    epoch: int
    token: str
    beat: str
    released: bool
    who: dict[str, str] = field(default_factory=dict)
    counted: frozenset[int] = frozenset()
    """Numbers of the versions that counted when this epoch took over."""

    def __str__(self) -> str:
        who = self.who
        return (
            f"{who.get('label', self.key)} is held by {who.get('host', '?')} (pid {who.get('pid', '?')}) "
            f"since {who.get('since', '?')}"
        )


RUN_KEY = "run."
"""A run id behind it is the key of the lease on it."""


def stage_key(fingerprint: str) -> str:
    """Key of the claim on a training fingerprint."""
    return f"stage.{fingerprint}"


def read_state(entries: Entries, key: str) -> LeaseState | None:
    """The highest epoch of a lease; None when it was never held (or forgotten after its work was done)."""
    found = _epochs(entries, key)
    if not found:
        return None
    epoch = max(found)
    values = found[epoch]
    return LeaseState(
        key=key,
        epoch=epoch,
        token=values.get(tags.TOKEN, ""),
        beat=values.get(tags.BEAT, ""),
        released=tags.RELEASED in values,
        who=json.loads(values.get(tags.HOLDER, "{}")),
        counted=parse_numbers(values.get(tags.COUNTED, "")),
    )


def counted(versions: Iterable[V], lease: Lease | LeaseState | None) -> list[V]:
    """The versions that count: of the current epoch, or counted at its takeover. Without a lease all count."""
    if lease is None:
        return list(versions)
    return [v for v in versions if v.epoch == lease.epoch or v.number in lease.counted]


class Lease:
    """A held lease; its daemon thread raises the heartbeat until ``release``. Also a context manager."""

    def __init__(self, entries: Entries, state: LeaseState, timing: Timing) -> None:
        self.key, self.epoch, self.token, self.counted = state.key, state.epoch, state.token, state.counted
        self.lost = False
        """The heartbeat has found that another driver took over. False proves nothing: ``check`` asks the store."""
        self._entries, self._timing, self._label = entries, timing, state.who.get("label", state.key)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {self.key}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """Name of the entry."""
        return _name(self.key, self.epoch)

    def check(self) -> None:
        """Ask the store whether this lease still counts; call it right before every write that matters.

        Raises:
            LeaseLostError: a higher epoch exists, or this entry was replaced.
        """
        state = read_state(self._entries, self.key)
        if state is None or state.token != self.token:
            self.lost = True
            self._stop.set()
            now = f"now {state}" if state else "its entry is gone"
            raise LeaseLostError(
                f"{self._label}: this driver (epoch {self.epoch}) was paused or cut off and was replaced: {now}; "
                "nothing it writes counts any more"
            )

    def release(self, *, forget: bool = False) -> None:
        """Give it back, so that the next start need not wait; a lost lease is left as it is.

        Args:
            forget: delete the entries instead of marking them. For claims on fingerprints whose result is published,
                never for run ids, whose last entry says which versions count.
        """
        self._stop.set()
        self._thread.join(timeout=self._timing.heartbeat_s + 60)
        try:
            state = read_state(self._entries, self.key)
            if state is None or state.token != self.token:
                return
            if forget:
                _delete(self._entries, self.key, up_to=self.epoch)
            else:
                self._entries.tag_entry(self.name, tags.RELEASED, _now())
        except AmloraError as error:  # nothing is lost by it: the next driver waits until this one counts as dead
            log.warning("%s: could not give back the lease: %s", self._label, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._timing.heartbeat_s):
            count += 1
            try:
                if not self._entries.tag_entry(self.name, tags.BEAT, str(count)):
                    self.lost = True
                    log.error("%s: the lease (epoch %d) was taken over by another driver", self._label, self.epoch)
                    return
            except AmloraError as error:
                log.warning("%s: heartbeat %d not written: %s", self._label, count, error)


def acquire(
    entries: Entries,
    key: str,
    *,
    label: str = "",
    count: Callable[[LeaseState | None], Iterable[int]] | None = None,
    timing: Timing | None = None,
) -> Lease:
    """Take a lease, replacing a holder that released it or died.

    Blocks for one heartbeat when the holder lives, for ``dead_after_s`` when it died without releasing.

    Args:
        entries: the store.
        key: ``RUN_KEY`` and a run id, or ``stage_key(...)``.
        label: what a person should read in messages.
        count: gives the numbers of the versions that count under the state that is replaced.
        timing: seconds.

    Raises:
        HeldError: the holder lives; the message says who it is.
    """
    timing = timing or Timing()
    for _ in range(_ATTEMPTS):
        state = read_state(entries, key)
        if state is not None and not state.released:
            seen = _watch(entries, state, timing)
            if seen == "alive":
                raise HeldError(
                    f"{state}; wait for it to end or stop it. One that died is replaced {timing.dead_after_s:.0f} s "
                    "after its last heartbeat: start again"
                )
            if seen == "changed":
                continue
            why = "its process has ended" if has_ended(state.who) else f"no sign of life for {timing.dead_after_s:.0f} s"
            log.warning("%s; %s: replacing it", state, why)
        claimed = _claim(entries, key, state, label=label, numbers=count(state) if count else ())
        if claimed is not None:
            return Lease(entries, claimed, timing)
    raise HeldError(f"{label or key}: {_ATTEMPTS} other drivers were faster, one after the other; try again")


def claim_or_wait(
    entries: Entries,
    fingerprint: str,
    *,
    label: str = "",
    deadline_s: float,
    timing: Timing | None = None,
    on_wait: Callable[[], None] | None = None,
) -> Lease | None:
    """Claim a training fingerprint, or wait for who has claimed it.

    Args:
        entries: the store.
        fingerprint: the training fingerprint.
        label: what a person should read in messages ("stage agnews of run orders").
        deadline_s: how long to wait for the other holder.
        timing: seconds.
        on_wait: called before it waits: the other holder may need what the caller has.

    Returns:
        The claim (nobody had it, or the holder died), or None when another holder ended. Either way look for a
        published version next (``Store.find_stage``): what was there before the claim may have been finished since.
        With None and nothing published the other one failed: call again.

    Raises:
        HeldError: the deadline passed while another holder lives.
    """
    timing = timing or Timing()
    start, logged = timing.clock(), 0.0
    while True:
        state = read_state(entries, stage_key(fingerprint))
        if state is not None and not state.released:
            if on_wait is not None:
                on_wait()
            seen = _watch(entries, state, timing)
            if seen == "changed":
                return None
            waited = timing.clock() - start
            if seen == "alive":
                if waited > deadline_s:
                    raise HeldError(f"waited {waited:.0f} s for a stage that another run trains: {state}")
                if waited - logged >= 60 or not logged:
                    logged = waited + 1e-9
                    log.info("waiting for a stage that another run trains: %s", state)
                continue
        try:
            return acquire(entries, stage_key(fingerprint), label=label, timing=timing)
        except HeldError:
            log.debug("another run was faster to claim %s", fingerprint)


def drop_claim(entries: Entries, fingerprint: str, label: str) -> None:
    """Delete a claim that was left by a holder of this label, who died after its work was published.

    Nobody waits for such a claim or replaces it: whoever looks for the fingerprint finds the version first.
    """
    state = read_state(entries, stage_key(fingerprint))
    if state is not None and state.who.get("label") == label:
        _delete(entries, state.key, up_to=state.epoch)


def _claim(
    entries: Entries, key: str, state: LeaseState | None, *, label: str, numbers: Iterable[int]
) -> LeaseState | None:
    """Create the entry of the next epoch; None when someone else has it or went past it."""
    epoch, token = (state.epoch if state else 0) + 1, uuid.uuid4().hex
    pid = str(os.getpid())
    who = {"host": socket.gethostname(), "pid": pid, "process": process_mark(pid), "since": _now(), "label": label or key}
    values = {
        tags.TOKEN: token,
        tags.BEAT: "0",
        tags.HOLDER: json.dumps(who),
        tags.COUNTED: format_numbers(numbers),
    }
    name = _name(key, epoch)
    entries.create_entry(name, values)
    # the answer alone does not decide: over HTTP it can be lost and the call repeated, so the token does
    if entries.entries(name).get(name, {}).get(tags.TOKEN) != token:
        return None
    found = read_state(entries, key)
    if found is None or found.token != token:
        entries.delete_entry(name)
        return None
    _delete(entries, key, up_to=epoch - 1)
    return found


def _watch(entries: Entries, state: LeaseState, timing: Timing) -> Literal["alive", "dead", "changed"]:
    """Look at a holder until its heartbeat moves, it lets go, or it has been silent for ``dead_after_s``.

    A gap between two looks counts as two polls at most: an observer that was itself suspended proves nothing.
    """
    if has_ended(state.who):
        return "dead"
    silent, last = 0.0, timing.clock()
    while silent < timing.dead_after_s:
        timing.sleep(timing.poll_s)
        now = read_state(entries, state.key)
        if now is None or now.token != state.token or now.released:
            return "changed"
        if now.beat != state.beat:
            return "alive"
        silent += min(timing.clock() - last, 2 * timing.poll_s)
        last = timing.clock()
    return "dead"


def _name(key: str, epoch: int) -> str:
    return f"{tags.LEASE_PREFIX}{key}.{epoch}"


def _epochs(entries: Entries, key: str) -> dict[int, dict[str, str]]:
    prefix = f"{tags.LEASE_PREFIX}{key}."
    found = {name.removeprefix(prefix): values for name, values in entries.entries(prefix).items()}
    return {int(rest): values for rest, values in found.items() if rest.isdecimal()}


def _delete(entries: Entries, key: str, *, up_to: int) -> None:
    """Delete entries up to an epoch, the lowest first, so that the highest of them is seen as long as any is."""
    for epoch in sorted(epoch for epoch in _epochs(entries, key) if epoch <= up_to):
        entries.delete_entry(_name(key, epoch))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def format_numbers(numbers: Iterable[int]) -> str:
    """``1-14,16``: short for a long run."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def parse_numbers(text: str) -> frozenset[int]:
    """The inverse of ``format_numbers``."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        numbers.update(range(int(low), int(high or low) + 1))
    return frozenset(numbers)
