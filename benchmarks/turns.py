"""What should route a turn of a conversation: the user's last turn, or all of their turns?

Test rows of a bank's tasks are put together to conversations of two and three turns, the earlier turns of another task or of
the same one, with their right answers between them. Each conversation's last turn belongs to a known task; it is routed by

- ``last``: the user's last turn, as ``route_by: turn`` does;
- ``first``: the user's first, as ``route_by: conversation`` does, which keeps a route;
- ``all``: all turns of the user's, one below the other.

The share that is routed to the last turn's task, with its 95% bootstrap interval over conversations. Nothing is trained.

    python benchmarks/turns.py --bank models:/chat@champion --json turns.json
    python benchmarks/turns.py --quick                     # a tiny random bank: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from sweeps import show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from pipelines.cluster.library_output import set_up

DEMO = ["helpdesk/policy_answer", "helpdesk/polite_reply", "helpdesk/order_note"]
WAYS = ("last", "first", "all")
DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    parser.add_argument("--tasks", nargs="+", default=DEMO, help="the bank's, in its order, as a run names them")
    parser.add_argument("--rows", type=int, default=60, help="of a task's dev rows at most")
    parser.add_argument("--seed", type=int, default=0, help="of rows and of what is put together")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny random bank: ends within a minute, shows nothing")
    args = parser.parse_args()
    if args.bank is None and not args.quick:
        parser.error("--bank: which bank? `amlora run configs/demo_chat.yaml --run-id chat` leaves models:/chat@champion")
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            from tests.bank_with_base import TASKS, texts_of, write_keyed_bank

            args.bank = str(Path(folder) / "bank")
            write_keyed_bank(Path(folder) / "bank", Path(folder) / "base")
            texts = [texts_of(task, 10, "dev") for task in TASKS]
        else:
            texts = [dev_texts(task, args) for task in args.tasks]
        table = measure(AMLoRAModel.from_bank(args.bank, abstain=0.0), texts, args.seed)
    show(f"routed to the last turn's task, {len(texts)} tasks", table, ("conversation", "rows", *WAYS))
    write_json(args.json, {"bank": args.bank, "table": table})


def dev_texts(task: str, args: argparse.Namespace) -> list[str]:
    """What the user says last in each dev row of a task."""
    limit: Any = {"max_dev": args.rows}
    spec = resolve_task(task, data_dir=None, base_dir=Path(), defaults=TaskDefaults(**limit))
    rows = load_task(spec, data_dir=None, splits=("dev",), seed=args.seed).rows["dev"]
    return [row.text for row in rows]


def measure(model: AMLoRAModel, texts: list[list[str]], seed: int) -> list[dict[str, Any]]:
    """A line for each kind of conversation."""
    draw = random.Random(seed)
    kinds = {
        "one turn": lambda task: [],
        "two turns of one task": lambda task: [task],
        "another task, then this": lambda task: [draw.choice([t for t in range(len(texts)) if t != task])],
        "two of another task, then this": lambda task: [draw.choice([t for t in range(len(texts)) if t != task])] * 2,
    }
    table = []
    for kind, earlier in kinds.items():
        conversations = [
            (task, [draw.choice(texts[before]) for before in earlier(task)] + [last])
            for task, own in enumerate(texts)
            for last in own
        ]
        read = {
            "last": [turns[-1] for _, turns in conversations],
            "first": [turns[0] for _, turns in conversations],
            "all": ["\n".join(turns) for _, turns in conversations],
        }
        line: dict[str, Any] = {"conversation": kind, "rows": len(conversations)}
        for way in WAYS:
            found = model.route(read[way])
            right = [one.task == model.tasks[task] for one, (task, _) in zip(found, conversations, strict=True)]
            line[way] = share(right, draw)
        table.append(line)
    return table


def share(right: list[bool], draw: random.Random) -> str:
    """Mean and bootstrap interval."""
    means = sorted(sum(draw.choices(right, k=len(right))) / len(right) for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    return f"{sum(right) / len(right):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
