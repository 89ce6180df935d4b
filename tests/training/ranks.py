"""Run a function on several gloo ranks in fresh processes and hand back what each returned."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ports import free_port


def _entry(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    result = function(*args)
    out.put((rank, result))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of ``function(*args)`` on ``world`` ranks; results must be plain values (tensors as lists)."""
    context = mp.get_context("spawn")
    out = context.Manager().Queue()
    mp.spawn(_entry, args=(world, free_port(), function, args, out), nprocs=world, join=True)
    results = [out.get(timeout=60) for _ in range(world)]
    return [value for _, value in sorted(results, key=lambda pair: pair[0])]
