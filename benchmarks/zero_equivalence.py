"""Largest difference of losses between ZeRO stages, world sizes and one process without DeepSpeed.

    python benchmarks/zero_equivalence.py [--steps 12] [--json FILE]

Two stages of a tiny random Llama and T5 (the second with a recipe on the first), the same global batches everywhere;
gloo on the CPU. A difference is in nats per target token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from amlora_dist.config import load_config
from amlora_dist.training.stage import run_stage
from amlora_dist.training.work import StageWork
from tests.methods.stages import stages
from tests.tiny_folder import write_config
from tests.training.ranks import on_ranks

KINDS, DTYPES, ZERO, WORLDS = ("llama", "t5"), ("fp32", "bf16"), (0, 1, 2, 3), (1, 2)
BATCH, ROWS = 6, 24

Losses = dict[str, list[float]]


def losses(config: Path, folder: Path, dtype: str, zero: int | None) -> list[float]:
    """Losses of every step of both stages."""

    def run(work: StageWork) -> None:
        run_stage(work, distributed=zero is not None, report=lambda event: None, device=torch.device("cpu"))

    overrides = [f"dtype={dtype}"] + ([] if zero is None else [f"deepspeed.zero_stage={zero}"])
    done = stages(load_config(config, overrides), folder, run, score=False)
    return [loss for stage in done for loss in stage.result.training["losses"]]


def every_case(configs: dict[str, Path], folder: Path) -> Losses:
    """All cases of one world size, on its ranks."""
    return {
        f"{kind} {dtype} {zero}": losses(configs[kind], folder / f"{kind}-{dtype}-{zero}", dtype, zero)
        for kind in KINDS for dtype in DTYPES for zero in ZERO
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a stage")
    parser.add_argument("--json", type=Path, help="write the differences there, too")
    options = parser.parse_args()
    epochs = max(1, options.steps * BATCH // ROWS)
    training = {"epochs": epochs, "batch_size": BATCH, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 1000}
    with tempfile.TemporaryDirectory(prefix="zero-") as name:
        folder = Path(name)
        configs = {
            kind: write_config(folder / kind, kind, ("colours", "shapes"), training=training | {"probe_rows": 8})
            for kind in KINDS
        }
        alone = {
            f"{kind} {dtype}": losses(configs[kind], folder / f"alone-{kind}-{dtype}", dtype, None)
            for kind in KINDS for dtype in DTYPES
        }  # fmt: skip
        found = {world: on_ranks(world, every_case, configs, folder / f"world-{world}")[0] for world in WORLDS}
    rows = []
    for kind in KINDS:
        for dtype in DTYPES:
            same, exact = alone[f"{kind} {dtype}"], alone[f"{kind} fp32"]
            for world in WORLDS:
                for zero in ZERO:
                    here = found[world][f"{kind} {dtype} {zero}"]
                    rows.append((kind, dtype, world, zero, apart(here, same), apart(here, exact)))
    print(f"{len(same)} steps in two stages, global batch {BATCH}; losses start near {max(same):.2f} nats per token\n")
    print("| model | dtype | ranks | ZeRO | against one process | against fp32 in one process |")
    print("|---|---|---|---|---|---|")
    for kind, dtype, world, zero, one, fp32 in rows:
        print(f"| {kind} | {dtype} | {world} | {zero} | {one:.1e} | {fp32:.1e} |")
    if options.json:
        keys = ("model", "dtype", "ranks", "zero", "against_one_process", "against_fp32")
        options.json.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))


def apart(one: list[float], other: list[float]) -> float:
    """Largest absolute difference over the steps."""
    return max(abs(x - y) for x, y in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
