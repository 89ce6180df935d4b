"""What a stage leaves behind: its adapter, the router's statistics of its task, and how it was trained.

A folder of the files that a bank keeps of a stage (``in_bank``), which are copied there and back as they are, and
``training.json``; it counts when ``COMMIT``, written last, names the digests of the others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.digests import file_digest
from amlora_dist.errors import BankError, UserError
from amlora_dist.files import new_folder
from amlora_dist.registry.adapter_folder import ADAPTER_FILES, read_parts, write_adapter
from amlora_dist.registry.bank_folder import adapter_entry
from amlora_dist.registry.manifest import AdapterEntry, statistics_file
from amlora_dist.registry.tensor_files import read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.statistics import TaskStatistics

MEMORY = "memory."
"""Where, among the statistics' tensors, those begin that the method keeps."""
ADAPTER_OF = "adapter_of"
"""In the record of a stage that took an adapter as it was: the fingerprint of the stage that it is of."""
STATISTICS, RECORD, MARK = "statistics.safetensors", "training.json", "COMMIT"
FILES = (*ADAPTER_FILES, STATISTICS, RECORD)
_OLD_FILES = ("adapter.safetensors", STATISTICS, RECORD)
"""Of results that were written before a bank's files were (``renew``)."""


@dataclass(frozen=True, slots=True)
class Result:
    """The adapter of one stage with all that goes with it."""

    adapter: Adapter
    statistics: TaskStatistics
    training: dict[str, Any]
    """Losses, tokens, seconds, and what the stage was trained with (world size, ZeRO stage, versions)."""
    index: int
    """1-based place of the adapter in its bank."""
    method_state: dict[str, Tensor] = field(default_factory=dict)
    """What the method keeps for later stages (``Method.finished``)."""

    @property
    def entry(self) -> AdapterEntry:
        """The adapter's entry in a manifest, without what only its bank knows."""
        return adapter_entry(self.adapter, self.index, training_fingerprint=self.training["fingerprint"], parent=None)

    def continuation(self) -> dict[str, Tensor]:
        """What only continuation needs, by name: the statistics and the method state."""
        memory = {f"{MEMORY}{name}": tensor.contiguous() for name, tensor in self.method_state.items()}
        return self.statistics.tensors() | memory


def split_continuation(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The statistics' tensors and the method state, from ``Result.continuation``."""
    statistics = {name: tensor for name, tensor in tensors.items() if not name.startswith(MEMORY)}
    return statistics, {n.removeprefix(MEMORY): tensor for n, tensor in tensors.items() if n.startswith(MEMORY)}


def in_bank(line: AdapterEntry) -> dict[str, str]:
    """Where a bank has the files that it keeps of a stage: name in the stage's folder -> path in the bank."""
    paths = {name: f"{line.folder}/{name}" for name in ADAPTER_FILES}
    return paths | {STATISTICS: statistics_file(line.index, line.task)}


def is_whole(folder: Path) -> bool:
    """Whether the folder was committed and its files are those that were."""
    return _is_committed(folder, FILES)


def _is_committed(folder: Path, names: Sequence[str]) -> bool:
    try:
        expected = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return bool(expected == {name: file_digest(folder / name) for name in names})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def new_result(folder: Path, entry: AdapterEntry, training: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for what a bank keeps of a stage, which at the end gets its record and mark, and becomes ``folder``.

    Args:
        folder: of the result; replaced.
        entry: of the adapter. What only its bank knows of it is left out.
        training: how it was trained.

    Raises:
        UserError: the disk is full or not writable.
    """
    own = replace(entry, parent=None, stored=None, task_spec=None, learned=None)
    try:
        with new_folder(folder, replace=True) as tmp:
            yield tmp
            line = {key: value for key, value in asdict(own).items() if key != "learned"}
            write_text(tmp / RECORD, json.dumps({"adapter": line, **training}))
            write_text(tmp / MARK, json.dumps({name: file_digest(tmp / name) for name in FILES}))
    except OSError as error:
        if is_whole(folder):
            return  # another run was quicker
        raise UserError(f"cannot write the trained adapter to {folder}: {error}; make room, then run again") from error


def write_result(folder: Path, result: Result) -> None:
    """Write a result. A whole folder is left as it is: who comes late changes nothing.

    Raises:
        UserError: the disk is full or not writable.
    """
    if not is_whole(folder):
        with new_result(folder, result.entry, result.training) as tmp:
            write_adapter(tmp, result.adapter.tensors())
            write_tensors(tmp / STATISTICS, result.continuation())


def read_result(folder: Path) -> Result:
    """Read what ``new_result`` made.

    Raises:
        BankError: the folder is not whole, or its adapter differs from its digest.
    """
    from amlora_dist.adapters.statistics import TaskStatistics

    if not is_whole(folder):
        raise BankError(f"{folder}: not a whole training result (no commit marker that agrees with its files)")
    try:
        training = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        entry = AdapterEntry(**training.pop("adapter"))
        adapter = read_parts(folder, entry)
        stored, state = split_continuation(read_tensors(folder / STATISTICS))
        statistics = TaskStatistics.from_tensors(entry.task, stored)
    except (BankError, KeyError, TypeError, AttributeError, ValueError) as error:  # committed, but not by this code
        raise BankError(f"{folder}: not a training result of this project ({error}); remove it and start again") from error
    return Result(adapter, statistics, training, entry.index, state)


def renew(folder: Path, index: int) -> None:
    """Write what release 0.1 left as a result again, in today's form; ``index`` is the adapter's place in its bank.

    Raises:
        BankError: it is committed, but no result of that release.
        UserError: the disk is full or not writable.
    """
    if not _is_committed(folder, _OLD_FILES):
        return
    try:
        training = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tensors, fingerprint = read_tensors(folder / _OLD_FILES[0]), training["fingerprint"]
        targets = sorted(name.removeprefix("a.") for name in tensors if name.startswith("a."))
        entry = AdapterEntry(**training.pop("adapter"), index=index, targets=targets, training_fingerprint=fingerprint)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BankError(f"{folder}: not a training result of release 0.1 ({error}); remove it and start again") from error
    with new_result(folder, entry, training) as tmp:
        write_adapter(tmp, tensors)
        write_tensors(tmp / STATISTICS, read_tensors(folder / STATISTICS))
