"""The background of generic texts is read once, by whoever comes first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoTokenizer

from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.tasks import background
from amlora_dist.training.engine import Alone
from amlora_dist.training.stage_statistics import StageStatistics
from amlora_dist.training.worker_cache import WorkerCache
from tests.tiny_config import write_tokenizer

DEADLINE_S = 60


class Counting(StageStatistics):
    """Reads no text, but counts how often it was asked to."""

    parts = 0
    going = threading.Event()
    waits = threading.Event()

    def _texts(self, mixture: Any, examples: Any) -> tuple[Tensor, list[int]]:
        type(self).parts += 1
        self.going.set()
        assert self.waits.wait(DEADLINE_S)
        return torch.full((len(examples), 3), float(len(examples))), list(range(len(examples)))


def counting(folder: Path) -> Counting:
    write_tokenizer(folder, closes_prompts=False)
    return Counting(
        "colours", 0, RouterSettings(), AutoTokenizer.from_pretrained(folder), False, Alone(), torch.device("cpu"), False,
        True, WorkerCache(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("parts", 0), ("going", threading.Event()), ("waits", threading.Event())):
        monkeypatch.setattr(Counting, name, value)


def test_who_comes_while_another_reads_waits_and_takes_what_it_found(tmp_path: Path) -> None:
    made = [counting(tmp_path / str(number)) for number in range(2)]
    found: list[dict[str, Tensor]] = []
    threads = [
        threading.Thread(target=lambda one=one: found.append(one.background(None, tmp_path, {})), daemon=True)  # type: ignore[misc]
        for one in made
    ]
    threads[0].start()
    assert Counting.going.wait(DEADLINE_S)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive(), "it waits"
    Counting.waits.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(found) == 2 and Counting.parts == len(background.parts())
    assert all(torch.equal(found[0][part], found[1][part]) for part in background.parts())


def test_who_takes_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Counting.waits.set()
    expected = counting(tmp_path / "one").background(None, tmp_path, {})  # type: ignore[arg-type]
    (file,) = (tmp_path / "background").glob("*.safetensors")
    file.unlink()
    monkeypatch.setattr("amlora_dist.training.stage_statistics.WAIT_S", 0.1)
    with FileLock(f"{file}.lock"):
        again = counting(tmp_path / "two").background(None, tmp_path, {})  # type: ignore[arg-type]
    assert again.keys() == expected.keys() and Counting.parts == 2 * len(background.parts())
