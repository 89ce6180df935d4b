"""The table of what is tried again, and how a failure of Ray's becomes one of ours."""

from __future__ import annotations

import json

import pytest
import torch

from amlora_dist.errors import AmloraError, BankError, HeldError, LeaseLostError, TrainingError, UserError
from amlora_dist.registry.connection import StoreError
from amlora_dist.training.failures import (
    DeviceMemoryError,
    HostMemoryError,
    NonFiniteLossError,
    StepError,
    StoppedError,
    memory_watched,
)
from pipelines.cluster.worker_errors import WorkersLostError, error_event, error_of
from pipelines.runs.retries import RETRIES, Failure, decide

LOST = WorkersLostError("rank 1 died")


def outcomes(*errors: tuple[AmloraError, object]) -> list[bool]:
    """Whether each failure, one after the other, is tried again."""
    failures = [Failure.of(error, place) for error, place in errors]
    return [decide(failures[: count + 1]).retry for count in range(len(failures))]


@pytest.mark.parametrize(
    ("error", "retries"),
    [
        (LOST, 4),
        (NonFiniteLossError("not finite", 7), 1),
        (DeviceMemoryError("out of GPU memory", 7), 0),
        (HostMemoryError("node ran out of memory"), 0),
        (UserError("training.epochs: found 0"), 0),
        (BankError("digest"), 0),
        (TrainingError("an old adapter changed"), 0),
        (StoppedError("SIGTERM"), 0),
        (HeldError("held"), 0),
        (LeaseLostError("lost"), 0),
        (StoreError("MLflow"), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_how_often_each_class_is_tried_again_in_one_place(error: AmloraError, retries: int) -> None:
    assert outcomes(*[(error, (8, 0))] * (retries + 1)) == [True] * retries + [False]


def test_every_class_in_the_table_exists() -> None:
    def below(kind: type[AmloraError]) -> set[str]:
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))

    assert set(RETRIES) <= below(AmloraError)


def test_workers_may_be_lost_again_and_again_while_the_stage_comes_further() -> None:
    assert all(outcomes(*[(LOST, (step, 0)) for step in range(20)]))


def test_a_loss_that_is_not_finite_is_tried_again_at_another_step_but_not_at_the_same() -> None:
    at = [(NonFiniteLossError("not finite", step), (0, 0)) for step in (5, 9, 5)]
    assert outcomes(*at) == [True, True, False]


def test_lost_workers_do_not_use_up_the_retry_of_another_failure() -> None:
    assert outcomes((LOST, 0), (LOST, 0), (NonFiniteLossError("not finite", 5), 0)) == [True, True, True]


def test_the_verdict_says_what_happened_and_what_comes() -> None:
    again = decide([Failure.of(LOST, 0)])
    assert again.reason.startswith("attempt 1 failed (rank 1 died); trying again from the last checkpoint")
    failures = [Failure.of(NonFiniteLossError("step 5 (rows 1, 2): the loss is not finite; lower ...", 5), 0)] * 2
    over = decide(failures)
    assert not over.retry
    assert over.reason.endswith("(given up after 2 failures in the same place)")
    assert "rows 1, 2" in over.reason


# -- memory -----------------------------------------------------------------------------------------------------------


def test_cuda_out_of_memory_is_named_with_its_place_and_fix() -> None:
    message = r"^here: out of GPU memory \(Tried to allocate 20 GiB\); less$"
    with pytest.raises(DeviceMemoryError, match=message) as caught, memory_watched("here", "less", 7):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 20 GiB\nmore lines")
    assert caught.value.step == 7
    assert caught.value.exit_code == TrainingError.exit_code


def test_a_tensor_that_does_not_fit_in_this_process_is_named_too() -> None:
    with pytest.raises(DeviceMemoryError, match="out of memory"), memory_watched("here", "less"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size mismatch"), memory_watched("here", "less"):
        raise RuntimeError("size mismatch")


# -- what Ray says ------------------------------------------------------------------------------------------------------


class Group(Exception):  # noqa: N818 (as Ray's WorkerGroupError)
    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors:\nmany lines")
        self.worker_failures = failures


LAST = {"kind": "step", "step": 7, "next_rows": [3, 17]}


def test_a_worker_killed_by_the_memory_monitor_is_no_lost_worker() -> None:
    cause = RuntimeError("A health check failed.\n1 worker(s) were killed due to the node running low on memory. Node 1")
    error = error_of(None, Group({1: cause}), LAST)
    assert isinstance(error, HostMemoryError)
    for part in ("rank 1", "after step 7", "step 8 (rows 3, 17 of the training split)", "larger nodes", "micro_batch_size"):
        assert part in str(error)


def test_a_killed_worker_is_lost() -> None:
    error = error_of(None, Group({0: RuntimeError("head\nThe worker died: SIGKILL")}), {})
    assert isinstance(error, WorkersLostError)
    assert str(error) == "rank 0: The worker died: SIGKILL"


@pytest.mark.parametrize(
    ("reported", "reason"),
    [
        ("Traceback ...\nRuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
         " [127.0.0.1]:4711. This may indicate a remote rank failure. GLHF", "lost its connection to another worker"),
        ("NCCL error: remote process exited or there was a network error", "lost its connection to another worker"),
        ("A worker health check failed.\nThe actor is dead because its worker process has died. Worker exit type:"
         " SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2.", "its process died"),
        ("Traceback ...\nValueError: x", "ValueError: x"),
        ("", "no reason is known"),
    ],
)  # fmt: skip
def test_why_a_worker_was_lost_is_named_in_plain_words(reported: str, reason: str) -> None:
    error = error_of(None, Group({1: RuntimeError(reported)}), {"step": 7})
    assert str(error) == f"rank 1: {reason}, after step 7"


def test_a_lost_object_store_and_workers_that_could_not_start_are_lost_workers() -> None:
    from ray.exceptions import NodeDiedError, ObjectLostError, OwnerDiedError
    from ray.train import ControllerError, WorkerGroupError

    for error in (
        ObjectLostError("ab" * 28, None, ""),
        OwnerDiedError("ab" * 28, None, ""),
        NodeDiedError("the node died"),
        ControllerError(NodeDiedError("the node died")),
        WorkerGroupError("could not start", {}),
    ):
        lost = error_of(None, error, LAST)
        assert isinstance(lost, WorkersLostError)
        assert not isinstance(error, ControllerError) or str(lost).startswith("the node died, after step 7")


@pytest.mark.parametrize(
    "raised",
    [NonFiniteLossError("step 3: not finite", 3), DeviceMemoryError("step 3: no memory", 3), UserError("workers: 3"),
     BankError("digest"), TrainingError("changed"), StoppedError("stopped")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_a_worker_raised_comes_back_as_what_it_was(raised: AmloraError) -> None:
    event = json.loads(json.dumps(error_event(raised, rank=0)))
    error = error_of(event, Group({}), LAST)
    assert (str(error), error.exit_code) == (str(raised), raised.exit_code)
    assert isinstance(error, UserError if isinstance(raised, BankError) else type(raised))
    if isinstance(raised, StepError):
        assert isinstance(error, StepError) and error.step == 3
