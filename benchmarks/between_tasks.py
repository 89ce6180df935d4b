"""A text between two tasks: one task's row, a mixture of both rows, or the average of what both rows answer?

Dev rows are asked of a finished bank as plain text, three ways:

- ``mixture``: the sparse gate, as served: both rows are mixed where the second task's posterior is above the threshold, and
  the larger one's prompt is asked;
- ``hard``: the likeliest task alone;
- ``average``: the likeliest task alone, but where the second task's posterior is above ``--above`` (default: what a tenth of
  the rows exceed, as ``mixed`` shows) both tasks are asked, each by its own prompt, and the shares of their labels are
  averaged by their posteriors, those of equal words added.

    python benchmarks/between_tasks.py --bank models:/demo@champion
    python benchmarks/between_tasks.py --bank models:/BANK/4 --tasks dbpedia amazon yahoo agnews --data-dir ROWS
    python benchmarks/between_tasks.py --quick             # a tiny random bank: shows that it runs, no figure
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from finished_bank import asked_of, bank_parser, rows_of
from sweeps import show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.errors import UserError
from amlora_dist.inference.model import AMLoRAModel
from pipelines.cluster.library_output import set_up

WAYS = ("mixture", "hard", "average")
SHARE = 0.9
"""Of rows that are asked of one task alone, at least."""


def main() -> None:
    parser = bank_parser(__doc__, rows=200)
    parser.add_argument("--seed", type=int, default=0, help="that drew the rows of the run")
    parser.add_argument("--above", type=float, help="posterior of the second task from which on both are asked")
    args = asked_of(parser.parse_args())
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            from tests.bank_with_base import TASKS, texts_of, write_keyed_bank

            write_keyed_bank(Path(folder) / "bank", Path(folder) / "base")
            args.bank, args.tasks = str(Path(folder) / "bank"), list(TASKS)
            asked = [(place, text, text.split()[-1]) for place, task in enumerate(TASKS) for text in texts_of(task, 20, "x")]
        else:
            asked = rows_of(args.tasks, args.data_dir, args.split, most=args.rows, seed=args.seed)
        table = measure(AMLoRAModel.from_bank(args.bank, dtype=args.dtype, abstain=0.0), asked, args.above)
    columns = ("way", "accuracy", "routed right", "mixed", "changed", "better", "worse")
    show(f"{len(asked)} {args.split} rows of {len(args.tasks)} tasks", table, columns)
    write_json(args.json, {"bank": args.bank, "split": args.split, "rows": len(asked), "table": table})


def measure(model: AMLoRAModel, asked: list[tuple[int, str, str]], above: float | None) -> list[dict[str, Any]]:
    """A line for each way."""
    if model.answering is None:
        raise UserError("this bank has no keys for plain text: `amlora rekey` gives it some")
    texts = [text for _, text, _ in asked]
    posterior_BT = torch.cat([
        model.answering.evidence(model.answering.read(model.requests(texts[start : start + 16]))).posterior_BT
        for start in range(0, len(texts), 16)
    ])  # fmt: skip
    first, second = posterior_BT.topk(2, dim=1).indices.T.tolist()
    unsure = posterior_BT.topk(2, dim=1).values[:, 1]
    above = float(torch.quantile(unsure, SHARE)) if above is None else above
    between = [place for place, share in enumerate(unsure.tolist()) if share > above]
    mixture = model.classify(texts)
    hard = model.classify(texts, task=[model.tasks[place] for place in first])
    other = model.classify([texts[row] for row in between], task=[model.tasks[second[row]] for row in between])
    labels = {"mixture": [one.label for one in mixture], "hard": [one.label for one in hard]}
    labels["average"] = list(labels["hard"])
    for row, also in zip(between, other, strict=True):
        shares: Counter[str] = Counter()
        for task, one in ((first[row], hard[row]), (second[row], also)):
            for label, share in one.scores.items():
                shares[label] += share * float(posterior_BT[row, task])
        labels["average"][row] = max(shares, key=shares.__getitem__)
    several = sum(sum(share > 0 for share in one.route.tasks.values()) > 1 for one in mixture)
    mixed = {"mixture": several, "hard": 0, "average": len(between)}
    right = {way: [label == target for label, (_, _, target) in zip(labels[way], asked, strict=True)] for way in WAYS}
    served = right["mixture"]
    return [
        {
            "way": way,
            "accuracy": round(sum(right[way]) / len(asked), 4),
            "routed right": round(sum(task == own for task, (own, _, _) in zip(first, asked, strict=True)) / len(asked), 4),
            "mixed": mixed[way],
            "changed": sum(a != b for a, b in zip(labels[way], labels["mixture"], strict=True)),
            "better": sum(a > b for a, b in zip(right[way], served, strict=True)),
            "worse": sum(a < b for a, b in zip(right[way], served, strict=True)),
        }
        for way in WAYS
    ]


if __name__ == "__main__":
    main()
