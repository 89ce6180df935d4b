"""A row in fewer ranks is the closest one there is, and what it lacks is reported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from amlora_dist.adapters.adapter import Adapter
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.exports import row_adapter
from amlora_dist.registry.peft_adapters import read_peft
from amlora_dist.registry.row_compression import compressed
from amlora_dist.serving.vllm_rows import write_rows
from tests.bank_with_base import write_working_bank


def random_adapter(rank: int) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    shapes = {"x.q": (12, 10), "x.v": (4, 10)}
    a = {name: torch.randn(rank, inner, generator=draw) for name, (_, inner) in shapes.items()}
    return Adapter("t", rank, 2.0, a, {name: torch.randn(o, rank, generator=draw) for name, (o, _) in shapes.items()})


def function(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: adapter.scale * (adapter.b[name] @ adapter.a[name]).double() for name in adapter.a}


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_what_the_largest_singular_triples_make(rank: int) -> None:
    whole = random_adapter(7)
    small, gap = compressed(whole, rank)
    assert small.rank == rank and small.scale == 1
    lost, all_of_it = 0.0, 0.0
    for name, matrix in function(whole).items():
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(function(small)[name], (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-5, rtol=1e-5)
        assert small.a[name].shape[0] == small.b[name].shape[1] == rank
        lost, all_of_it = lost + float((function(small)[name] - matrix).norm() ** 2), all_of_it + float(matrix.norm() ** 2)
    assert gap == pytest.approx((lost / all_of_it) ** 0.5, rel=1e-4, abs=1e-6)


def test_ranks_that_are_not_used_cost_nothing() -> None:
    whole = random_adapter(2)
    wide = Adapter(
        "t", 6, 6.0, {n: torch.cat([one, one, torch.zeros_like(one)]) for n, one in whole.a.items()},
        {n: torch.cat([one, one, one], dim=1) for n, one in whole.b.items()},
    )  # fmt: skip
    small, gap = compressed(wide, 5)  # of the v layer's 4 outputs too: filled up with zeros
    assert gap < 1e-6
    for name, matrix in function(wide).items():
        torch.testing.assert_close(function(small)[name], matrix, atol=1e-5, rtol=1e-5)


def test_rows_are_written_once_whole_and_with_the_measured_gap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_working_bank(tmp_path / "bank", tmp_path / "base")
    bank = read_bank(tmp_path / "bank")
    with caplog.at_level(logging.WARNING):
        rows = write_rows(bank, "help desk", "models:/words/7", tmp_path, limit=4)
    assert rows.names == {task: f"help-desk-v7-{task}" for task in bank.manifest.tasks}
    assert list(rows.gaps) == ["shapes", "sizes"]  # of ranks 5 and 9; the first has 2
    assert "rank 9 and was compressed to 4" in caplog.text and f"{rows.gaps['sizes']:.4f}" in caplog.text
    for task, name in rows.names.items():
        written, _ = read_peft(rows.folders[name], task)
        own = function(row_adapter(bank, task))
        apart = sum(float((function(written)[n] - own[n]).norm() ** 2) for n in own)
        assert (apart / sum(float(m.norm() ** 2) for m in own.values())) ** 0.5 == pytest.approx(
            rows.gaps.get(task, 0.0), abs=1e-4
        )
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("vllm/rows/*/*/*")}
    assert before and write_rows(bank, "help desk", "models:/words/7", tmp_path, limit=4) == rows
    assert {file: file.stat().st_mtime_ns for file in before} == before
    other = write_rows(bank, "help desk", "some/folder", tmp_path, limit=64)
    assert not other.gaps and set(other.folders.values()).isdisjoint(rows.folders.values())
