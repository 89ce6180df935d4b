"""Largest difference of losses between ZeRO stages, world sizes and one process without DeepSpeed.

    python benchmarks/zero_equivalence.py [--steps 12] [--json FILE]

Two stages of a tiny random Llama and T5 (the second with a recipe on the first), the same global batches everywhere;
gloo on the CPU. A difference is in nats per target token. Rows are printed as they come; exit code 1 when one in fp32 is
above 1e-4, which is what *equivalent* means (docs/operations.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from amlora_dist.config.loading import load_config
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import StageWork
from pipelines.cluster.library_output import set_up
from tests.methods.stages import stages
from tests.tiny_config import write_config
from tests.training.ranks import on_ranks

KINDS, DTYPES, ZERO, WORLDS = ("llama", "t5"), ("fp32", "bf16"), (0, 1, 2, 3), (1, 2)
BATCH, ROWS = 6, 24
EQUIVALENT = 1e-4


class Row(NamedTuple):
    """Largest differences of one case."""

    model: str
    dtype: str
    ranks: int
    zero: int
    against_one_process: float
    against_fp32: float


def losses(config: Path, folder: Path, dtype: str, zero: int | None) -> list[float]:
    """Losses of every step of both stages."""

    def run(work: StageWork) -> None:
        run_stage(work, distributed=zero is not None, report=lambda event: None, device=torch.device("cpu"))

    overrides = [f"dtype={dtype}"] + ([] if zero is None else [f"deepspeed.zero_stage={zero}"])
    done = stages(load_config(config, overrides), folder, run, score=False)
    return [loss for stage in done for loss in stage.result.training["losses"]]


def every_case(config: Path, folder: Path) -> list[list[float]]:
    """Losses of all dtypes and ZeRO stages for one model and one world size, on its ranks."""
    found = []
    for dtype, zero in product(DTYPES, ZERO):
        found.append(losses(config, folder / f"{dtype}-{zero}", dtype, zero))
        if os.environ["RANK"] == "0":
            print(f"  {folder.name}: {dtype}, ZeRO-{zero} done", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a stage")
    parser.add_argument("--json", type=Path, help="write the differences there, too")
    options = parser.parse_args()
    set_up(verbose=False)
    epochs = max(1, options.steps * BATCH // ROWS)
    training = {"epochs": epochs, "batch_size": BATCH, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every": 1000}
    rows: list[Row] = []
    print("| model | dtype | ranks | ZeRO | against one process | against fp32 in one process |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="zero-") as name:
        folder = Path(name)
        for kind in KINDS:
            config = write_config(folder / kind, kind, ("colours", "shapes"), training=training | {"probe_rows": 8})
            alone = {dtype: losses(config, folder / f"{kind}-alone-{dtype}", dtype, None) for dtype in DTYPES}
            for world in WORLDS:
                found = on_ranks(world, every_case, config, folder / f"{kind}-{world}")[0]
                for (dtype, zero), here in zip(product(DTYPES, ZERO), found, strict=True):
                    one, exact = apart(here, alone[dtype]), apart(here, alone["fp32"])
                    rows.append(Row(kind, dtype, world, zero, one, exact))
                    print(f"| {kind} | {dtype} | {world} | {zero} | {one:.1e} | {exact:.1e} |", flush=True)
                if options.json:
                    options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    count, first = len(alone["fp32"]), max(alone["fp32"])
    print(f"\n{count} steps in two stages, global batch {BATCH}; losses start near {first:.2f} nats per token")
    worst = max(row.against_one_process for row in rows if row.dtype == "fp32")
    print(f"largest difference in fp32: {worst:.1e}")
    sys.exit(1 if worst > EQUIVALENT else 0)


def apart(one: list[float], other: list[float]) -> float:
    """Largest absolute difference over the steps."""
    return max(abs(x - y) for x, y in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
