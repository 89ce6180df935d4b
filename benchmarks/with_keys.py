"""Is it the keys? Every method's adapters with the same keys next to them.

A plain text is routed by the keys of one bank (of ``method: keys``, or of any other), and that task's prompt and labels
are asked of each method's adapters in turn: the newest one (methods with one adapter), or each task's own row. Labels are
scored by the adapters alone, by the keys alone, and by both; the weight of the keys, beta, is fitted for each method on
the same dev rows, as a bank fits it on held-out rows. So all methods get the same route and the same second opinion,
and what is left between them is what their adapters know.

    python benchmarks/with_keys.py --keys models:/KEYS/4 --rows am_lora=models:/A/4 \\
        per_task=models:/P/1+models:/P/2+models:/P/3+models:/P/4 \\
        --newest joint=models:/J/1 replay=models:/R/4 --tasks dbpedia amazon yahoo agnews --data-dir ROWS
    python benchmarks/with_keys.py --quick                 # tiny random banks: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from finished_bank import rows_of
from sweeps import show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.adapters.keys import BETAS, SCALES
from amlora_dist.errors import UserError
from amlora_dist.evaluation.answering import Weighed
from amlora_dist.evaluation.intervals import percentiles, resampled
from amlora_dist.inference.loading import inject_bank, pulled
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import Bank, read_bank
from pipelines.cluster.library_output import set_up

BATCH = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """A row, and what is known of its answer."""

    task: int
    target: str
    routed: int
    weighed: Weighed

    def right(self, beta: float | None) -> bool:
        """Whether the label that wins is right: by the adapters and beta times the keys, or (None) by the keys alone."""
        if beta is None:
            return self.weighed.labels[self.weighed.best("keys")] == self.target
        one = replace(self.weighed, beta=beta)
        return one.labels[one.best("both")] == self.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", help="bank whose keys route and weigh, of labelled tasks")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="NAME=BANK", help="methods with a row for each task; BANK+BANK: of several"
    )
    parser.add_argument("--newest", nargs="+", default=[], metavar="NAME=BANK", help="methods whose newest adapter answers")
    parser.add_argument("--tasks", nargs="+", default=[], help="the bank's, in its order, as a run names them")
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: packaged tasks and the Hub")
    parser.add_argument("--dev", type=int, default=100, help="dev rows of a task at most, for beta")
    parser.add_argument("--test", type=int, default=200, help="test rows of a task at most")
    parser.add_argument("--seed", type=int, default=0, help="that drew the rows of the runs")
    parser.add_argument("--dtype", default="bf16", help="of the model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="tiny random banks: ends within a minute, shows nothing")
    args = parser.parse_args()
    if not args.quick and not (args.keys and args.tasks and (args.rows or args.newest)):
        parser.error("--keys, --tasks, and one of --rows and --newest: which banks, and of which tasks?")
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            dev, test = _quick(args, Path(folder))
        else:
            wanted = (("dev", args.dev), ("test", args.test))
            dev, test = (rows_of(args.tasks, args.data_dir, split, most=most, seed=args.seed) for split, most in wanted)
        table, right = measure(args, dev, test)
    show(f"{len(test)} test rows of {len(args.tasks)} tasks, beta by {len(dev)} dev rows", table, tuple(table[0]))
    write_json(args.json, {"keys": args.keys, "seed": args.seed, "table": table, "right": right})


def _quick(args: argparse.Namespace, folder: Path) -> tuple[list[tuple[int, str, str]], list[tuple[int, str, str]]]:
    from tests.bank_with_base import TASKS, texts_of, write_keyed_bank

    write_keyed_bank(folder / "bank", folder / "base")
    args.keys, args.tasks, args.dtype = str(folder / "bank"), list(TASKS), "fp32"
    args.rows, args.newest = [f"rows={args.keys}"], [f"newest={args.keys}"]

    def rows(salt: str) -> list[tuple[int, str, str]]:
        return [(place, text, text.split()[-1]) for place, task in enumerate(TASKS) for text in texts_of(task, 10, salt)]

    return rows("x"), rows("y")


def _bank(uris: str) -> Bank:
    """A bank, or the adapters of several with a plus between, one for each task, as ``per_task`` leaves them."""
    folders = [pulled(uri, None)[1] if uri.startswith("models:") else Path(uri).expanduser() for uri in uris.split("+")]
    banks = [read_bank(folder, statistics=False) for folder in folders]
    return replace(banks[0], adapters=[adapter for bank in banks for adapter in bank.adapters])


def measure(
    args: argparse.Namespace, dev: list[tuple[int, str, str]], test: list[tuple[int, str, str]]
) -> tuple[list[dict[str, Any]], dict[str, list[bool]]]:
    """A line for each method, and of each the rows that both kinds of evidence answer right."""
    keyed = AMLoRAModel.from_bank(args.keys, dtype=args.dtype, abstain=0.0)
    if keyed.answering is None or len(keyed.tasks) != len(args.tasks):
        raise UserError(f"--keys: {args.keys} has no keys for plain text of {len(args.tasks)} tasks")
    methods = [(one, False) for one in args.rows] + [(one, True) for one in args.newest]
    found: dict[str, tuple[float, list[Asked]]] = {}
    for method, newest in methods:
        name, _, uri = method.partition("=")
        model = _with_adapters(keyed, _bank(uri), newest=newest)
        beta = _beta(_ask(model, dev))
        found[name] = beta, _ask(model, test)
        print(f"{name}: beta {beta:g}", file=sys.stderr)
    right = {name: [row.right(beta) for row in rows] for name, (beta, rows) in found.items()}
    first = next(iter(found))
    keys = _share([row.right(None) for row in found[first][1]])
    table = []
    for name, (beta, rows) in found.items():
        gap = _gap(right[first], right[name], [row.task for row in rows])
        table.append({
            "method": name, "beta": beta, "both": _share(right[name]),
            "adapters alone": _share([row.right(0.0) for row in rows]), "keys alone": keys,
            "routed right": _share([row.routed == row.task for row in rows]),
            f"{first} minus it": gap,
        })  # fmt: skip
    return table, right


def _with_adapters(keyed: AMLoRAModel, bank: Bank, *, newest: bool) -> AMLoRAModel:
    """The keys' bank with the adapters of another one: each task's row, or the newest adapter in every task's place."""
    tasks = keyed.tasks
    if newest:
        adapters = [replace(bank.adapters[-1], task=task, recipe={}) for task in tasks]
    elif [adapter.task for adapter in bank.adapters] != tasks:
        raise UserError(f"--rows: found a bank of {[a.task for a in bank.adapters]}, expected one of {tasks}")
    else:
        adapters = list(bank.adapters)
    if bank.manifest.targets != keyed.bank.manifest.targets:
        raise UserError("--keys: its bank adapts other layers than one of the methods' banks")
    mixed = replace(keyed.bank, adapters=adapters)
    transformer = copy.deepcopy(keyed._plain)
    mixture = inject_bank(transformer, mixed, eos_id=int(keyed.tokenizer.eos_token_id), abstain=0.0)
    return AMLoRAModel(mixed, keyed.base, transformer, keyed.tokenizer, mixture)


def _ask(model: AMLoRAModel, rows: list[tuple[int, str, str]]) -> list[Asked]:
    """Plain texts, routed; their labels scored behind the prompt of the routed task."""
    assert model.answering is not None
    found: list[Asked] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        begun = model.answering.begin(model.requests([text for _, text, _ in part]))
        for (task, _, target), request, weighed in zip(part, begun.requests, model.answering.weigh(begun), strict=True):
            assert weighed is not None and request.task is not None, "every task of the bank has labels"
            found.append(Asked(task, target, model.tasks.index(request.task), weighed))
    return found


def _beta(rows: list[Asked]) -> float:
    """The weight of the grid at which the right labels of rows that are routed right are likeliest, at the best scale."""
    losses = torch.zeros(len(BETAS), len(SCALES), dtype=torch.float64)
    for row in rows:
        if row.routed != row.task or row.weighed.keys is None or row.target not in row.weighed.labels:
            continue
        model_L, keys_L = torch.tensor(row.weighed.model).double(), torch.tensor(row.weighed.keys).double()
        at = row.weighed.labels.index(row.target)
        for i, beta in enumerate(BETAS):
            for j, scale in enumerate(SCALES):
                losses[i, j] -= torch.log_softmax((model_L + beta * keys_L) / scale, dim=0)[at]
    return BETAS[int(losses.amin(dim=1).argmin())]


def _gap(one: list[bool], other: list[bool], tasks: list[int]) -> str:
    """Mean over tasks of what ``one`` is right in more, with its 95% interval over resampled rows."""
    gaps: list[list[float]] = [[] for _ in range(max(tasks) + 1)]
    for task, a, b in zip(tasks, one, other, strict=True):
        gaps[task].append(float(a) - float(b))
    drawn = [sum(filter(None, line[0])) / len(gaps) for line in resampled([gaps], seed=0)]
    found = percentiles(sum(sum(own) / len(own) for own in gaps) / len(gaps), drawn)
    assert found is not None, "every task has rows"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _share(right: list[bool]) -> float:
    return round(sum(right) / len(right), 4)


if __name__ == "__main__":
    main()
