"""Leases on a store in memory, with a clock of the test's own where time matters."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlora_dist.errors import AmloraError, HeldError, LeaseLostError
from amlora_dist.registry import tags
from amlora_dist.registry.leases import (
    RUN_KEY,
    Lease,
    Timing,
    acquire,
    claim_or_wait,
    counted,
    drop_claim,
    format_numbers,
    parse_numbers,
    read_state,
    stage_key,
)

KEY = f"{RUN_KEY}run-1"
QUICK = Timing(heartbeat_s=0.01, dead_after_s=0.1, poll_s=0.005)
"""For holders that are dead."""
STEADY = Timing(heartbeat_s=0.01, dead_after_s=20, poll_s=0.005)
"""For holders that live, however loaded the machine is."""


class Memory:
    """Entries in memory; ``before`` lets a test slip in between two steps of a claimer."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        self.lock = threading.Lock()
        self.before: dict[str, Callable[[], None]] = {}
        self.broken = False

    def _reach(self, what: str) -> None:
        if self.broken:
            raise AmloraError("the store does not answer")
        hook = self.before.pop(what, None)
        if hook is not None:
            hook()

    def create_entry(self, name: str, values: Mapping[str, str]) -> bool:
        self._reach("create")
        with self.lock:
            if name in self.rows:
                return False
            self.rows[name] = dict(values)
            return True

    def entries(self, prefix: str) -> dict[str, dict[str, str]]:
        self._reach("read")
        with self.lock:
            return {name: dict(row) for name, row in self.rows.items() if name.startswith(prefix)}

    def tag_entry(self, name: str, key: str, value: str) -> bool:
        self._reach("tag")
        with self.lock:
            if name not in self.rows:
                return False
            self.rows[name][key] = value
            return True

    def delete_entry(self, name: str) -> None:
        self._reach("delete")
        with self.lock:
            self.rows.pop(name, None)


@dataclass
class Version:
    number: int
    epoch: int


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def stop() -> Iterator[list[Lease]]:
    """Leases whose heartbeat must end with the test."""
    leases: list[Lease] = []
    yield leases
    for lease in leases:
        kill(lease)


def kill(lease: Lease) -> None:
    """What SIGKILL does to a holder: the heartbeat ends, nothing is released."""
    lease._stop.set()
    lease._thread.join()


def test_a_lease_that_is_found_lost_before_a_write_is_known_to_be_lost(memory: Memory, stop: list[Lease]) -> None:
    """Whoever looks at ``lost`` only, as the loop over a stage's steps does, ends too."""
    lease = acquire(memory, KEY, timing=QUICK)
    stop.append(lease)
    memory.delete_entry(lease.name)
    with pytest.raises(LeaseLostError):
        lease.check()
    assert lease.lost


def test_the_first_driver_gets_epoch_one_and_may_write(memory: Memory) -> None:
    with acquire(memory, KEY, timing=QUICK) as lease:
        lease.check()
        assert lease.epoch == 1
        assert list(memory.rows) == ["amlora.lease.run.run-1.1"]


def test_a_second_driver_gets_the_name_of_the_runs_holder(memory: Memory) -> None:
    with acquire(memory, KEY, label="run 'run-1'", timing=QUICK), pytest.raises(HeldError) as caught:
        acquire(memory, KEY, timing=STEADY)
    for part in ("run 'run-1' is held by", socket.gethostname(), f"pid {os.getpid()}", "since 20"):
        assert part in str(caught.value)


def test_a_released_run_is_taken_without_waiting(memory: Memory) -> None:
    acquire(memory, KEY, timing=QUICK).release()
    patient = Timing(heartbeat_s=3600, dead_after_s=3600, poll_s=3600)
    begin = time.monotonic()
    with acquire(memory, KEY, timing=patient) as lease:
        assert lease.epoch == 2
    assert time.monotonic() - begin < 5


def test_a_dead_holder_is_replaced_and_only_the_highest_epoch_is_kept(memory: Memory, stop: list[Lease]) -> None:
    for epoch in (1, 2, 3):
        lease = acquire(memory, KEY, timing=QUICK)
        stop.append(lease)
        assert lease.epoch == epoch
        assert list(memory.rows) == [f"amlora.lease.run.run-1.{epoch}"]
        kill(lease)


def test_a_holder_that_wakes_up_late_can_write_nothing_that_counts(memory: Memory, stop: list[Lease]) -> None:
    asleep = acquire(memory, KEY, timing=QUICK)
    kill(asleep)
    successor = acquire(memory, KEY, count=lambda state: [1, 2], timing=QUICK)
    stop.append(successor)
    with pytest.raises(LeaseLostError, match=r"was replaced: now .* is held by"):
        asleep.check()
    successor.check()
    written = [Version(1, 1), Version(2, 1), Version(3, 1), Version(4, 2)]  # 3 came after the takeover
    assert [version.number for version in counted(written, successor)] == [1, 2, 4]
    asleep.release()
    successor.check()
    assert [version.number for version in counted(written, read_state(memory, KEY))] == [1, 2, 4]


def test_what_counts_is_handed_on_from_epoch_to_epoch(memory: Memory) -> None:
    written = [Version(1, 1), Version(2, 1)]
    acquire(memory, KEY, timing=QUICK).release()
    numbers = acquire_counting(memory, written)
    assert numbers == [1, 2]
    written += [Version(3, 1), Version(4, 2)]  # 3 is stale
    assert acquire_counting(memory, written) == [1, 2, 4]
    assert acquire_counting(memory, written) == [1, 2, 4]


def acquire_counting(memory: Memory, written: list[Version]) -> list[int]:
    lease = acquire(
        memory, KEY, count=lambda state: [version.number for version in counted(written, state)], timing=QUICK
    )
    lease.release()
    return sorted(lease.counted)


def test_a_slow_claimer_that_recreates_a_deleted_epoch_backs_off(memory: Memory, stop: list[Lease]) -> None:
    """The name of epoch 2 exists once, dies, and is deleted by epoch 3 before the slow one creates it again."""
    acquire(memory, KEY, timing=QUICK).release()

    def others() -> None:
        kill(acquire(memory, KEY, timing=QUICK))
        stop.append(acquire(memory, KEY, timing=QUICK))

    memory.before["create"] = others
    with pytest.raises(HeldError):
        acquire(memory, KEY, timing=STEADY)
    assert list(memory.rows) == ["amlora.lease.run.run-1.3"]
    stop[0].check()


def test_of_two_claimers_of_one_epoch_one_gets_it(memory: Memory, stop: list[Lease]) -> None:
    memory.before["create"] = lambda: stop.append(acquire(memory, KEY, timing=QUICK))
    with pytest.raises(HeldError):
        acquire(memory, KEY, timing=STEADY)
    assert [lease.epoch for lease in stop] == [1]
    stop[0].check()


def test_many_drivers_at_once_leave_one_holder(memory: Memory, stop: list[Lease]) -> None:
    refused: list[HeldError] = []

    def start() -> None:
        try:
            stop.append(acquire(memory, KEY, timing=STEADY))
        except HeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert (len(stop), len(refused)) == (1, 7)


def test_an_answer_lost_on_the_way_does_not_lose_the_claim(memory: Memory, stop: list[Lease]) -> None:
    create = memory.create_entry

    def twice(name: str, values: Mapping[str, str]) -> bool:
        create(name, values)
        return create(name, values)  # the repeated call says that the name exists

    memory.create_entry = twice  # type: ignore[method-assign]
    stop.append(acquire(memory, KEY, timing=QUICK))
    stop[0].check()
    assert not stop[0].lost


def test_an_observer_that_was_suspended_itself_judges_nobody_dead(memory: Memory, stop: list[Lease]) -> None:
    """One gap of an hour between two looks is the observer's own sleep; the holder's heartbeat comes right after."""
    holder = acquire(memory, KEY, timing=QUICK)
    kill(holder)
    now, beats = [0.0], [0]

    def sleep(seconds: float) -> None:
        now[0] += 3600 if beats[0] == 0 else seconds
        beats[0] += 1
        if beats[0] == 3:
            memory.rows[holder.name][tags.BEAT] = "another"

    observer = Timing(heartbeat_s=3, dead_after_s=15, poll_s=1, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(HeldError):
        acquire(memory, KEY, timing=observer)


def test_a_holder_counts_as_dead_after_the_timeout_and_not_before(memory: Memory, stop: list[Lease]) -> None:
    kill(acquire(memory, KEY, timing=QUICK))
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    observer = Timing(heartbeat_s=3, dead_after_s=15, poll_s=1, clock=lambda: now[0], sleep=sleep)
    stop.append(acquire(memory, KEY, timing=observer))
    assert now[0] == pytest.approx(115.0)


def test_a_heartbeat_survives_a_store_that_is_away_for_a_while(memory: Memory, stop: list[Lease]) -> None:
    lease = acquire(memory, KEY, timing=QUICK)
    stop.append(lease)
    memory.broken = True
    time.sleep(0.05)
    memory.broken = False
    before = memory.rows[lease.name][tags.BEAT]
    deadline = time.monotonic() + 10
    while memory.rows[lease.name][tags.BEAT] == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert int(memory.rows[lease.name][tags.BEAT]) > int(before)
    lease.check()


def test_run_ids_that_start_alike_do_not_mix(memory: Memory) -> None:
    with acquire(memory, f"{RUN_KEY}a", timing=QUICK), acquire(memory, f"{RUN_KEY}a.1", timing=QUICK) as other:
        assert other.epoch == 1
        assert read_state(memory, f"{RUN_KEY}a") != read_state(memory, f"{RUN_KEY}a.1")


def test_without_a_lease_every_version_counts() -> None:
    versions = [Version(1, 0), Version(2, 5)]
    assert counted(versions, None) == versions


def test_a_fingerprint_that_nobody_has_is_claimed_and_forgotten_after_publication(memory: Memory) -> None:
    claim = claim_or_wait(memory, "f" * 64, deadline_s=1, timing=QUICK)
    assert claim is not None
    claim.release(forget=True)
    assert memory.rows == {}
    with pytest.raises(LeaseLostError, match="its entry is gone"):
        claim.check()


@pytest.mark.parametrize("forget", [True, False], ids=["published", "failed"])
def test_a_waiting_run_goes_on_when_the_other_one_ends(memory: Memory, forget: bool) -> None:
    claim = claim_or_wait(memory, "f" * 64, deadline_s=1, timing=QUICK)
    assert claim is not None
    timer = threading.Timer(0.1, claim.release, kwargs={"forget": forget})
    timer.start()
    let_go: list[str] = []
    waited = claim_or_wait(memory, "f" * 64, deadline_s=30, timing=STEADY, on_wait=lambda: let_go.append("workers"))
    assert waited is None and let_go, "what the other run may need is let go of before waiting"
    timer.join()
    again = claim_or_wait(memory, "f" * 64, deadline_s=1, timing=QUICK)
    assert again is not None
    again.release()


def test_a_waiting_run_takes_over_from_a_dead_one(memory: Memory, stop: list[Lease]) -> None:
    claim = claim_or_wait(memory, "f" * 64, deadline_s=1, timing=QUICK)
    assert claim is not None
    kill(claim)
    mine = claim_or_wait(memory, "f" * 64, deadline_s=30, timing=QUICK)
    assert mine is not None
    stop.append(mine)
    assert mine.epoch == 2
    with pytest.raises(LeaseLostError):
        claim.check()


def test_a_claim_left_on_published_work_is_dropped_by_the_run_that_left_it(memory: Memory) -> None:
    fingerprint, mine = "f" * 64, "stage 'agnews' of run 'a'"
    claim = claim_or_wait(memory, fingerprint, label=mine, deadline_s=1, timing=QUICK)
    assert claim is not None
    kill(claim)
    drop_claim(memory, fingerprint, "stage 'agnews' of run 'b'")
    assert read_state(memory, stage_key(fingerprint)) is not None, "not its own"
    drop_claim(memory, fingerprint, mine)
    drop_claim(memory, fingerprint, mine)
    assert memory.rows == {}


def test_waiting_has_a_deadline_that_names_the_holder(memory: Memory) -> None:
    claim = claim_or_wait(memory, "f" * 64, label="stage agnews of run 'a'", deadline_s=1, timing=QUICK)
    assert claim is not None
    with claim, pytest.raises(HeldError, match="stage agnews of run 'a' is held by"):
        claim_or_wait(memory, "f" * 64, deadline_s=0.05, timing=STEADY)
    assert read_state(memory, stage_key("f" * 64)) is not None


@given(st.sets(st.integers(1, 300)))
def test_lists_of_numbers_read_back(numbers: set[int]) -> None:
    assert parse_numbers(format_numbers(numbers)) == numbers


def test_lists_of_numbers_are_short() -> None:
    assert format_numbers(range(1, 1001)) == "1-1000"
    assert format_numbers([3, 1, 2, 7]) == "1-3,7"
    assert parse_numbers("") == frozenset()
