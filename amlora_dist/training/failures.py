"""How a stage ends without a result, and what each end says: which step, which rows, what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from amlora_dist.errors import AmloraError, TrainingError, UserError, is_full


class StoppedError(AmloraError):
    """Training was asked to stop and has written a checkpoint."""

    exit_code = 143


class StepError(TrainingError):
    """Something went wrong at one optimizer step, whose number (from 1) goes with it; None: not at a step."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class NonFiniteLossError(StepError):
    """The loss became NaN or infinite; nothing of that step was kept."""


class DeviceMemoryError(StepError):
    """A GPU (or this process) had no memory left for a tensor."""


class HostMemoryError(StepError):
    """A worker was killed because its node ran out of memory."""


LESS_MEMORY = (
    "lower training.micro_batch_size, set training.gradient_checkpointing: true, cut prompts (task_defaults.max_length), or"
    " raise deepspeed.zero_stage"
)

SLOWER = "lower training.learning_rate, keep training.clip above 0, or look at those rows"


def batch_text(step: int, rows: Sequence[int]) -> str:
    """``step 8 (rows 3, 17, 20 of the training split)``; long batches are cut."""
    listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return f"step {step} (rows {listed} of the training split)"


@contextlib.contextmanager
def memory_watched(what: str, fix: str, step: int | None = None) -> Iterator[None]:
    """Inside, running out of memory for tensors becomes an error that says ``what`` was done and how to fix it.

    Raises:
        DeviceMemoryError: torch could not allocate.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{what}: out of GPU memory ({_first_line(error)}); {fix}", step) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no class for it
            raise
        raise DeviceMemoryError(f"{what}: out of memory ({_first_line(error)}); {fix}", step) from error


@contextlib.contextmanager
def disk_watched() -> Iterator[None]:
    """Inside, a full disk is the user's to fix.

    Raises:
        UserError: no room for a file.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"{error.filename or 'a file'}: {error.strerror or error}; what was committed before is whole: make room, then"
            " start the same command again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
