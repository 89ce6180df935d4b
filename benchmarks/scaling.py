"""How the cost of a stage grows with the number of tasks before it: step time, scoring, publication, memory.

One run of N tasks on a tiny random model in this process. Expected: a step costs the same at every stage (within 10%),
publication too (a version refers to adapters that are stored already), scoring grows by one task a stage where every row
goes through the model, and what is held in memory while a stage trains grows by one adapter and its statistics. With
``--reuse``, as runs are by default, rows whose gate has not changed keep their prediction; ``scored_rows`` are the others.

    python benchmarks/scaling.py --json scaling.json     # 30 tasks
    python benchmarks/scaling.py --reuse --json reuse.json
    python benchmarks/scaling.py --quick                 # 4 tasks
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.runs.progress import Silent

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 tasks")
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--reuse", action="store_true", help="rows may keep their prediction")
    parser.add_argument("--json", type=Path, help="write what is printed there, too")
    arguments = parser.parse_args()
    count = 4 if arguments.quick else arguments.tasks
    with tempfile.TemporaryDirectory() as place:
        lines = run(Path(place), count, reuse=arguments.reuse)
    laws = {name: law(lines, key) for name, key in LAWS.items()}
    laws["memory"]["adapter_bytes"] = statistics.median(line["adapter_bytes"] for line in lines)
    for line in lines:
        print(
            f"stage {line['stage']:2}: step {line['step_ms']:6.1f} ms, scoring {line['scoring_seconds']:6.2f} s for"
            f" {line['scored_rows']:3} rows of {line['scored_tasks']:2} tasks,"
            f" publishing {line['publishing_seconds']:5.2f} s and {line['published_bytes']:,} bytes,"
            f" {line['held_bytes']:,} bytes held, {line['adapter_bytes']:,} in files"
        )
    for name, found in laws.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in found.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"stages": lines, "laws": laws}, indent=2) + "\n")


LAWS = {
    "step (ms, flat: ratio within 1.1)": "step_ms",
    "publishing (s, flat)": "publishing_seconds",
    "published (bytes, flat)": "published_bytes",
    "scoring (s for each task, flat)": "scoring_seconds_per_task",
    "scoring (s, a straight line)": "scoring_seconds",
    "scoring (rows through the model)": "scored_rows",
    "memory": "held_bytes",
}


def law(lines: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Medians of the first and the second half of the stages (the first stage warms up) and their ratio; the straight line
    of least squares through all of them, and the share of the variance that it explains."""
    values = [float(line[key]) for line in lines[1:]]
    places = [float(line["stage"]) for line in lines[1:]]
    half = max(1, len(values) // 2)
    first, second = statistics.median(values[:half]), statistics.median(values[-half:])
    slope, start = statistics.linear_regression(places, values)
    flat = len(set(values)) == 1
    explained = 1.0 if flat else statistics.correlation(places, values) ** 2
    return {
        "first_half": first, "second_half": second, "ratio": second / first, "each_stage_adds": slope, "starts_at": start,
        "explained": explained,
    }  # fmt: skip


class Watch(Silent):
    """What a run tells while it goes on: when steps end, and what is held after the last one of each stage."""

    def __init__(self, artifacts: Path) -> None:
        self._artifacts, self._stored = artifacts, 0
        self.ended: list[list[float]] = []
        self.held: list[int] = []
        self.published: list[int] = []

    def stage(self, name: str, index: int, total: int) -> None:
        self.ended.append([])

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.ended[-1].append(time.perf_counter())
        if done == total:
            self.held.append(held_bytes())

    def note(self, text: str) -> None:
        if ", version " in text:
            stored = sum(file.stat().st_size for file in self._artifacts.rglob("*") if file.is_file())
            self.published.append(stored - self._stored)
            self._stored = stored


def held_bytes() -> int:
    """Bytes of all tensors that are alive in this process, each storage counted once."""
    import torch

    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run(folder: Path, count: int, *, reuse: bool) -> list[dict[str, Any]]:
    home = folder / "home"
    os.environ["AMLORA_HOME"] = str(home)
    sys.path.insert(0, str(REPOSITORY))
    from amlora_dist.config.loading import load_config
    from pipelines.runs.journal import RunJournal
    from pipelines.runs.sequence import run_sequence
    from tests import tiny_config

    draw = random.Random(0)
    names = [f"task{number:02d}" for number in range(count)]
    for name in names:
        words = ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(6)]
        tiny_config.TOPICS[name] = (tiny_config.COLOURS, words)
    tiny_config.WORDS.extend(sorted({w for name in names for w in tiny_config.TOPICS[name][1]} - set(tiny_config.WORDS)))
    config = tiny_config.write_config(
        folder, tasks=tuple(names),
        training={"epochs": 4, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "probe_rows": 8},
    )  # fmt: skip
    settings = load_config(config, ["evaluation.untrained=false", "evaluation.oracle=false", f"evaluation.reuse={reuse}"])
    publishing: list[float] = []
    scored_rows: list[int] = []
    write, register = RunJournal._written, RunJournal._registered

    def written(self: RunJournal, folder: Path, bank: Any, record: Any, *given: Any) -> Any:
        began = time.perf_counter()
        manifest = write(self, folder, bank, record, *given)
        publishing.append(time.perf_counter() - began)
        scored_rows.append(sum(score["rows"] - score["kept"] for score in record.scores))
        return manifest

    def registered(self: RunJournal, *given: Any) -> Any:
        began = time.perf_counter()
        version = register(self, *given)
        publishing[-1] += time.perf_counter() - began
        return version

    RunJournal._written, RunJournal._registered = written, registered  # type: ignore[method-assign]
    watch = Watch(home / "artifacts")
    result = run_sequence(settings, run_id="scaling", progress=watch)
    lines: list[dict[str, Any]] = []
    for index, stage in enumerate(result["stages"], start=1):
        trained = home / "storage" / "stages" / stage["fingerprint"] / "trained"
        scored = sum(cell is not None for cell in result["accuracy_matrix"][index - 1])
        ends = watch.ended[index - 1]
        lines.append(
            {
                "stage": index,
                "step_ms": 1000 * statistics.median(b - a for a, b in itertools.pairwise(ends)),
                "train_seconds": stage["train_seconds"],
                "scoring_seconds": stage["score_seconds"],
                "scored_tasks": scored,
                "scored_rows": scored_rows[index - 1],
                "scoring_seconds_per_task": stage["score_seconds"] / scored,
                "publishing_seconds": publishing[index - 1],
                "published_bytes": watch.published[index - 1],
                "other_seconds": stage["other_seconds"],
                "held_bytes": watch.held[index - 1],
                "adapter_bytes": sum(file.stat().st_size for file in trained.glob("*.safetensors")),
            }
        )
    return lines


if __name__ == "__main__":
    main()
