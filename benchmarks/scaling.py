"""How the cost of a stage grows with the number of tasks before it: step time, scoring, publication, bytes.

One run of N tasks on a tiny random model in this process. Expected: a step costs the same at every stage, publication too
(a version refers to adapters that are stored already), scoring grows by one task a stage, weights by one adapter.

    python benchmarks/scaling.py             # 30 tasks
    python benchmarks/scaling.py --quick     # 4 tasks
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 tasks")
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    count = 4 if arguments.quick else arguments.tasks
    with tempfile.TemporaryDirectory() as place:
        lines = run(Path(place), count)
    out = {"stages": lines, "fit": {key: growth(lines, key) for key in COSTS}}
    if arguments.json:
        print(json.dumps(out, indent=2))
        return
    for line in lines:
        print(
            f"stage {line['stage']:2}: step {line['step_ms']:6.1f} ms, scoring {line['scoring_seconds']:6.2f} s for"
            f" {line['scored_tasks']:2} tasks, other {line['other_seconds']:5.2f} s, {line['adapter_bytes']:,} bytes"
        )
    for key, fit in out["fit"].items():
        print(f"{key}: first half {fit['first_half']:.2f}, second half {fit['second_half']:.2f}, ratio {fit['ratio']:.2f}")


COSTS = ("step_ms", "scoring_seconds_per_task", "other_seconds")


def growth(lines: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Median of the first and of the second half of the stages (the first stage warms up), and their ratio."""
    values = [line[key] for line in lines[1:]]
    half = max(1, len(values) // 2)
    first, second = (sorted(part)[len(part) // 2] for part in (values[:half], values[-half:]))
    return {"first_half": first, "second_half": second, "ratio": second / first}


def run(folder: Path, count: int) -> list[dict[str, Any]]:
    os.environ["AMLORA_HOME"] = str(folder / "home")
    sys.path.insert(0, str(REPOSITORY))
    from amlora_dist.config import load_config
    from pipelines.progress import Silent
    from pipelines.sequence import run_sequence
    from tests import tiny_folder

    draw = random.Random(0)
    names = [f"task{number:02d}" for number in range(count)]
    for name in names:
        words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(6)]
        tiny_folder.TOPICS[name] = (tiny_folder.COLOURS, words)
    tiny_folder.WORDS.extend(sorted({w for name in names for w in tiny_folder.TOPICS[name][1]} - set(tiny_folder.WORDS)))
    config = tiny_folder.write_config(
        folder, tasks=tuple(names),
        training={"epochs": 4, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "probe_rows": 8},
    )  # fmt: skip
    settings = load_config(config, ["evaluation.untrained=false", "evaluation.oracle=false"])
    result = run_sequence(settings, run_id="scaling", progress=Silent())
    lines: list[dict[str, Any]] = []
    for index, stage in enumerate(result["stages"], start=1):
        trained = folder / "home" / "storage" / "stages" / stage["fingerprint"] / "trained"
        scored = sum(cell is not None for cell in result["accuracy_matrix"][index - 1])
        steps = 4 * 4  # 24 rows in batches of 6, four times
        lines.append(
            {
                "stage": index,
                "step_ms": 1000 * stage["train_seconds"] / steps,
                "scoring_seconds": stage["score_seconds"],
                "scored_tasks": scored,
                "scoring_seconds_per_task": stage["score_seconds"] / scored,
                "other_seconds": stage["other_seconds"],
                "adapter_bytes": sum(file.stat().st_size for file in trained.glob("*.safetensors")),
            }
        )
    return lines


if __name__ == "__main__":
    main()
