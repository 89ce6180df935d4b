"""Whether tasks of a finished bank could share more than their recipes do.

Dev rows are asked of a bank of labelled tasks as plain text, told their task and as served, while the rows of G are changed:

- ``own``: as the bank has them;
- ``shared``: plus mu times a merge of all other adapters, their mean or a running merge whose nth part counts 1/sqrt(n)
  (after SLAO, arXiv 2512.23017);
- ``mixed``: told, the rows of all tasks by the mean posterior of the task's held-out rows at a temperature (after LoRAuter,
  arXiv 2601.21795); as served, each text's own posterior at that temperature in place of the sparse gate;
- ``refit``: weights of every other adapter refitted on N rows a task (``training.recipe_refit``): of every task, or only
  where the refit itself says that it wins. The rows are held-out ones, which no adapter has trained on, at most as many as
  there are; ``of training rows`` takes rows that the adapters know.

``loss`` is nats of the right label's words behind the prompt, told the task, the model alone. Differences are against
``own``, means over all rows with a bootstrap interval (95%) over the rows.

With ``--starts`` the last task is learned again, on ``--few`` of its rows, from four starts of its recipe: none, the best
old row by a probe, and the running merge of all earlier adapters at two strengths; scored told, on its dev rows, by the
model alone.

    python benchmarks/shared_knowledge.py --bank models:/demo@champion --json shared.json
    python benchmarks/shared_knowledge.py --bank models:/relatives/4 --tasks imdb sst2 yelp amazon --data-dir ROWS --starts
    python benchmarks/shared_knowledge.py --quick          # a tiny random bank: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from finished_bank import asked_of, bank_parser
from sweeps import show, write_json
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.adapters.adapter import rows as rows_of_module
from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.config.former_values import completed
from amlora_dist.digests import named_seed
from amlora_dist.errors import UserError
from amlora_dist.evaluation.answering import Weighed
from amlora_dist.evaluation.decoding import Decoder
from amlora_dist.evaluation.intervals import percentiles, resampled
from amlora_dist.evaluation.label_plan import plan_labels
from amlora_dist.evaluation.ranking import Room, label_scores
from amlora_dist.evaluation.requests import Request
from amlora_dist.inference.loading import bank_format, sharing_copy
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.tasks.batches import Example, answer_tokens, collate_prompts, encode
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.sources import Row, load_task
from amlora_dist.tasks.task import TaskDefaults, TaskSpec, resolve_task
from amlora_dist.training.batching import Layout, LossComputer
from amlora_dist.training.checkpoint import StageProgress
from amlora_dist.training.engine import Alone, PlainEngine
from amlora_dist.training.loop import Learner
from amlora_dist.training.optimizer import parameter_groups
from amlora_dist.training.recipe_refit import RecipeRefit
from amlora_dist.training.settings import TrainingSettings
from amlora_dist.training.stage_statistics import held_out_places
from amlora_dist.training.trunk_cache import TrunkCache
from pipelines.cluster.library_output import set_up

BATCH = 16
COLUMNS = ("rows of G", "told", "difference", "loss", "loss difference", "model alone", "served", "served difference",
           "changed", "seconds")  # fmt: skip
G = dict[str, Tensor]
"""(T, N) by module path."""


def main() -> None:
    parser = bank_parser(__doc__, rows=100)
    parser.add_argument("--memory", type=int, nargs="+", default=[8, 16, 32], help="rows of a task that a refit sees")
    parser.add_argument("--trained-rows", action="store_true", help="refit on rows that the adapters know, too")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.1, 0.3, 1.0], help="mu of the merge")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 3.0, 10.0], help="of mixed rows")
    parser.add_argument("--l1", type=float, nargs="+", default=[0.1], help="on refitted weights")
    parser.add_argument("--steps", type=int, default=10, help="of a refit")
    parser.add_argument("--starts", action="store_true", help="learn the last task again, from several starts")
    parser.add_argument("--only-starts", action="store_true", help="and nothing else")
    parser.add_argument("--few", type=int, default=64, help="rows of the last task, with --starts")
    args = asked_of(parser.parse_args())
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            from tests.bank_with_base import TASKS, texts_of, write_keyed_bank

            write_keyed_bank(Path(folder) / "bank", Path(folder) / "base")
            args.bank, args.tasks, args.memory, args.steps = str(Path(folder) / "bank"), list(TASKS), [8], 2
        model = AMLoRAModel.from_bank(args.bank, dtype=args.dtype, abstain=0.0)
        if model.answering is None:
            raise UserError("this bank has no keys for plain text: `amlora rekey` gives it some")
        if args.quick:
            data = {
                task: Data(None, list(model.labels_of(task)), *(plain(texts_of(task, 12, part)) for part in "ab"))
                for task in TASKS
            }
        else:
            data = read(args, model)
        bench = Bench(model, data, args, Path(folder))
        table = [] if args.only_starts else bench.table()
        starts = bench.starts(Path(folder)) if args.starts or args.only_starts else []
    count = sum(len(one.asked) for one in data.values())
    if table:
        show(f"{count} {args.split} rows of {len(data)} tasks", table, COLUMNS)
    if starts:
        columns = ("start", "told", "difference", "loss", "loss difference", "seconds")
        show(f"{args.tasks[-1]} learned again on {args.few} rows", starts, columns)
    write_json(args.json, {"bank": str(args.bank), "split": args.split, "rows": count, "table": table, "starts": starts,
                           "memory": args.memory, "steps": args.steps, "l1": args.l1})  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Of one task."""

    spec: TaskSpec | None
    labels: list[str]
    asked: list[Row]
    train: list[Row]


def plain(texts: Sequence[str]) -> list[Row]:
    """Rows of made-up texts that end with their label."""
    return [Row(n, {}, text, None, text.split()[-1]) for n, text in enumerate(texts)]


def read(args: argparse.Namespace, model: AMLoRAModel) -> dict[str, Data]:
    """Rows of the bank's tasks, the training rows as its run drew them."""
    config = completed(model.bank.manifest.training_configuration)
    found = {}
    for task in args.tasks:
        limits: dict[str, Any] = {**config.get("task_defaults", {}), f"max_{args.split}": args.rows}
        spec = resolve_task(task, data_dir=args.data_dir, base_dir=Path(), defaults=TaskDefaults(**limits))
        got = load_task(spec, data_dir=args.data_dir, splits=("train", args.split), seed=config["seed"]).rows
        found[task] = Data(spec, list(spec.label_texts), got[args.split], got["train"])
    return found


@dataclass
class Scores:
    """Of each dev row, in their order."""

    told: list[float]
    model: list[float]
    loss: list[float]
    served: list[float]


class Bench:
    """One bank under changed rows of G."""

    def __init__(self, model: AMLoRAModel, data: Mapping[str, Data], args: argparse.Namespace, folder: Path) -> None:
        self.model, self.data, self.args = model, data, args
        assert model.answering is not None
        self.answering, self.mixture, self.bank = model.answering, model.mixture, model.bank
        self.config = completed(self.bank.manifest.training_configuration)
        self.training = TrainingSettings(**self.config.get("training", {}))
        if self.training.learning_rate == "auto":  # of a bank that no run has made
            self.training.learning_rate = 3e-3
        self.own: G = {path: rows_of_module(self.bank.adapters, path) for path in self.mixture.modules}
        self.texts = [(place, row.text, row.target) for place, task in enumerate(data) for row in data[task].asked]
        order = sorted(range(len(self.texts)), key=lambda n: len(self.texts[n][1]))
        self.batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        pad = int(model.tokenizer.pad_token_id)
        cache = TrunkCache(
            self.mixture.trunk(), folder / "trunk", limit=1 << 32, dtype=next(model.transformer.parameters()).dtype,
            decided_by={},
        )  # fmt: skip
        cache.attach(model.transformer)
        self.loss = LossComputer(model.transformer, pad_id=pad, encoder_decoder=False, device=model.device)
        self.tasks = len(data)
        self.readings: dict[tuple[int, ...], Any] = {}

    # -- rows of the finished bank ------------------------------------------------------------------------------------

    def table(self) -> list[dict[str, Any]]:
        """A line for each way to share."""
        base = self.scores(self.own)
        lines = [self.line("own", base, base, 0.0)]

        def add(name: str, rows: G, **gates: Any) -> None:
            began = time.monotonic()
            lines.append(self.line(name, self.scores(rows, **gates), base, time.monotonic() - began))
            show("so far", lines[-1:], COLUMNS)

        for merge in ("mean", "running"):
            for strength in self.args.strengths:
                add(f"shared {merge} {strength:g}", self.shared(merge, strength))
        means = self.mean_posteriors()
        for temperature in self.args.temperatures:
            told = self.soften(means, temperature)
            add(f"mixed T={temperature:g}", self.own, told=told, temperature=temperature)
        for count in self.args.memory:
            for l1 in self.args.l1:
                for known in (False, True) if self.args.trained_rows else (False,):
                    refits, won, seconds = self.refits(count, l1, known)
                    name = f"refit {count}" + (f" l1={l1:g}" if len(self.args.l1) > 1 else "")
                    name += " of training rows" if known else ""
                    lines.append(self.line(f"{name}, all", self.scores(refits), base, seconds))
                    some = {path: self.own[path].clone() for path in self.own}
                    for task in won:
                        for path in some:
                            some[path][task] = refits[path][task]
                    scores = self.scores(some) if won else base
                    lines.append(self.line(f"{name}, {len(won)} that won", scores, base, seconds))
                    show("so far", lines[-2:], COLUMNS)
        self.mixture.set_rows(self.own)
        return lines

    def shared(self, merge: str, strength: float) -> G:
        """Every row plus so much of a merge of all other adapters."""
        weights = torch.zeros(self.tasks, self.tasks)
        for task in range(self.tasks):
            others = [other for other in range(self.tasks) if other != task]
            weights[task, others] = running(len(others)) if merge == "running" else torch.tensor(1 / len(others))
        return {path: rows + strength * weights for path, rows in self.own.items()}

    def mean_posteriors(self) -> Tensor:
        """(T, T): of the held-out rows of each task the mean log posterior of every task."""
        found = []
        for task in self.data:
            texts = [row.text for row in self.memory(task, 32)]
            reading = self.answering.read(self.model.requests(texts))
            found.append(self.answering.evidence(reading).posterior_BT.clamp(min=1e-12).log().mean(dim=0))
        return torch.stack(found)

    @staticmethod
    def soften(logs_BT: Tensor, temperature: float) -> Tensor:
        """Shares at a temperature."""
        return torch.softmax(logs_BT / temperature, dim=-1).float()

    def memory(self, task: str, count: int, known: bool = False) -> list[Row]:
        """Held-out rows of a task, or rows that its adapter has trained on."""
        rows = self.data[task].train
        share, seed = float(self.config["router"].get("holdout", 0.1)), int(self.config.get("seed", 0))
        held = held_out_places(len(rows), share, seed=seed, task=task)
        places = [place for place in range(len(rows)) if place not in set(held)] if known else held
        return [rows[place] for place in places[:count]]

    def examples(self, task: str, rows: Sequence[Row]) -> list[Example]:
        """As the model trains on them."""
        spec, tokenizer = self.data[task].spec, self.model.tokenizer
        if spec is not None:
            return encode(
                rows, spec, template_for(spec, spec.prompt_style), tokenizer, max_length=int(spec.max_length or 512),
                encoder_decoder=False, prompt_format=bank_format(self.bank.manifest),
            )  # fmt: skip
        requests = self.model.requests([row.text for row in rows], task=[task] * len(rows))
        self.model.prompter.read(requests)
        found = []
        for request, row in zip(requests, rows, strict=True):
            self.model.prompter.ask(request, new_tokens=4)
            target = (*answer_tokens(row.target, tokenizer, False), int(tokenizer.eos_token_id))
            found.append(Example(row.number, request.tokens, target, None, row.target))
        return found

    def refits(self, count: int, l1: float, known: bool) -> tuple[G, list[int], float]:
        """All rows refitted on so many rows a task, the tasks that won, and seconds."""
        settings = replace(self.training, l1=l1)
        refit = RecipeRefit(self.mixture, self.loss, Alone(), self.model.device, settings, steps=self.args.steps)
        rows, won, began = {path: self.own[path].clone() for path in self.own}, [], time.monotonic()
        for place, task in enumerate(self.data):
            start = {path: own[place] for path, own in self.own.items()}
            found = refit.row(place, start, self.examples(task, self.memory(task, count, known)))
            print(f"  {task}, {count} rows: loss {found.before:.3f} -> {found.after:.3f}, wins: {found.wins}", flush=True)
            won += [place] if found.wins else []
            for path, row in zip(start, found.rows_MN.cpu(), strict=True):
                rows[path][place] = row
        return rows, won, time.monotonic() - began

    def scores(self, rows: G, told: Tensor | None = None, temperature: float | None = None) -> Scores:
        """All dev rows under these rows of G; ``told`` (T, T) weighs them for texts whose task is told."""
        self.mixture.set_rows(rows)
        told = torch.eye(self.tasks) if told is None else told
        out = Scores(*([0.0] * len(self.texts) for _ in range(4)))
        for batch in self.batches:
            texts, places = [self.texts[n][1] for n in batch], [self.texts[n][0] for n in batch]
            requests = self.model.requests(texts, task=[list(self.data)[place] for place in places])
            for request, place in zip(requests, places, strict=True):
                request.gate = told[place]
            reading = self.reading(batch, requests)
            weighed = self.weighed(requests, reading)
            evidence = self.answering.evidence(reading)
            gates = evidence.gates_BT
            if temperature is not None:
                gates = self.soften(evidence.posterior_BT.clamp(min=1e-12).log(), temperature)
            again = []
            for n, place, one, gate in zip(batch, places, weighed, gates, strict=True):
                target = self.texts[n][2]
                out.told[n] = float(one.labels[one.best("both")] == target)
                out.model[n] = float(one.labels[one.best("model")] == target)
                out.loss[n] = -one.model[one.labels.index(target)]
                out.served[n] = out.told[n]
                if not torch.equal(gate.cpu(), told[place]):
                    again.append((n, gate))
            if again:
                requests = self.model.requests([self.texts[n][1] for n, _ in again])
                for request, (_, gate) in zip(requests, again, strict=True):
                    request.gate, request.task = gate, list(self.data)[int(gate.argmax())]
                reading = self.reading([n for n, _ in again], requests)
                for (n, _), one in zip(again, self.weighed(requests, reading), strict=True):
                    out.served[n] = float(one.labels[one.best("both")] == self.texts[n][2])
        return out

    def reading(self, rows: Sequence[int], requests: Sequence[Request]) -> Any:
        """What the layers below the adapters make of dev rows: the same whatever G is, so that they run once."""
        key = tuple(rows)
        if key not in self.readings:
            self.readings[key] = self.answering.read(requests)
        self.model.prompter.read(requests)
        return copy.deepcopy(self.readings[key])  # prompts are appended to it

    def weighed(self, requests: list[Request], reading: Any) -> list[Weighed]:
        """What is known of each one's labels."""
        found = self.answering.weigh(self.answering.begin(requests, reading=reading))
        return [one for one in found if one is not None]

    def line(self, name: str, scores: Scores, base: Scores, seconds: float) -> dict[str, Any]:
        """One way in figures, all tasks and each."""
        row = {
            "rows of G": name,
            "told": statistics.fmean(scores.told), "difference": apart(scores.told, base.told),
            "loss": statistics.fmean(scores.loss), "loss difference": apart(scores.loss, base.loss),
            "model alone": statistics.fmean(scores.model),
            "served": statistics.fmean(scores.served), "served difference": apart(scores.served, base.served),
            "changed": sum(a != b for a, b in zip(scores.told, base.told, strict=True)),
            "seconds": round(seconds, 1), "tasks": {},
        }  # fmt: skip
        for place, task in enumerate(self.data):
            own = [n for n, text in enumerate(self.texts) if text[0] == place]
            row["tasks"][task] = {
                key: statistics.fmean(getattr(scores, key)[n] for n in own) for key in ("told", "model", "loss", "served")
            } | {
                f"{key} difference": apart([getattr(scores, key)[n] for n in own], [getattr(base, key)[n] for n in own])
                for key in ("told", "loss", "served")
            }
        return row

    # -- the last task, learned again ---------------------------------------------------------------------------------

    def starts(self, folder: Path) -> list[dict[str, Any]]:
        """A line for each start of the last task's recipe."""
        task, earlier = list(self.data)[-1], self.bank.adapters[:-1]
        count = len(earlier)
        asked = self.examples(task, self.data[task].asked)
        known = self.examples(task, self.memory(task, self.args.few, known=True))
        merged = running(count)
        begins: dict[str, Any] = {"none": None} | {f"shared {strength:g}": merged * strength for strength in (1.0, 0.3)}
        begins["best row"] = self.best_row(known[:16])
        lines: list[dict[str, Any]] = []
        first: tuple[list[float], list[float]] | None = None
        for name, start in begins.items():
            began = time.monotonic()
            recipe = None if start is None else {p: start[p] if isinstance(start, dict) else start for p in self.own}
            mixture, pad = self.learned(known, recipe, folder / name.replace(" ", "-"))
            seconds = time.monotonic() - began
            right, lost = self.label_rows(mixture, task, asked, pad)
            first = first or (right, lost)
            lines.append({
                "start": name, "told": statistics.fmean(right), "difference": apart(right, first[0]),
                "loss": statistics.fmean(lost), "loss difference": apart(lost, first[1]), "seconds": round(seconds, 1),
            })  # fmt: skip
            show("so far", lines[-1:], ("start", "told", "difference", "loss", "loss difference", "seconds"))
        return lines

    def best_row(self, probe: Sequence[Example]) -> G:
        """The old row under which some training rows lose least."""
        self.mixture.set_rows(self.own)
        with torch.no_grad():
            lost = [float(self.loss(self.model.transformer, probe, gate)) for gate in torch.eye(self.tasks)[:-1]]
        best = min(range(len(lost)), key=lost.__getitem__)
        print(f"  probe: {dict(zip(list(self.data)[:-1], lost, strict=True))}", flush=True)
        return {path: own[best, :-1] for path, own in self.own.items()}

    def learned(self, rows: Sequence[Example], recipe: G | None, folder: Path) -> tuple[Mixture, int]:
        """The last adapter learned again by the run's own settings on top of the others."""
        last, settings = self.bank.adapters[-1], self.training
        seed, pad = int(self.config.get("seed", 0)), int(self.model.tokenizer.pad_token_id)
        new = NewAdapter(
            task=last.task, rank=last.rank, alpha=last.alpha, seed=named_seed(seed, "adapter", last.task), recipe_init=recipe
        )
        plain_model = sharing_copy(self.model._plain)
        router = self.config["router"]
        mixture = inject(
            plain_model, self.mixture.targets, self.bank.adapters[:-1], new=new, router_layer=router["layer"],
            skip_tokens=router["skip_tokens"],
        )  # fmt: skip
        groups = parameter_groups(mixture.trainable(), settings)
        engine = PlainEngine(
            mixture.model, mixture.trainable(), groups, betas=settings.betas, clip=settings.clip, device=self.model.device
        )
        loss = LossComputer(mixture.model, pad_id=pad, encoder_decoder=False, device=self.model.device)
        gate = torch.eye(self.tasks)[-1]
        learner = Learner(
            engine, loss, rows, settings, layout=Layout.of(settings.batch_size, 1, None), seed=seed, stage=last.task,
            folder=folder, fingerprint=folder.name, mixture=mixture,
            objective=lambda batch: batch.cross_entropy(batch.answers(gate)), report=lambda event: None,
        )  # fmt: skip
        mixture.model.train()
        learner.run(StageProgress(fingerprint=folder.name, step=0))
        mixture.model.eval()
        return mixture, pad

    def label_rows(
        self, mixture: Mixture, task: str, examples: Sequence[Example], pad: int
    ) -> tuple[list[float], list[float]]:
        """Of each row whether its right label is the likeliest of the task's, and nats of the right one."""
        eos_id, labels = int(self.model.tokenizer.eos_token_id), self.data[task].labels
        decoder = Decoder(mixture.model, pad_id=pad, eos_id=eos_id, encoder_decoder=False)
        plan = plan_labels([answer_tokens(label, self.model.tokenizer, False) for label in labels], eos_id)
        room = Room(max(len(example.prompt) for example in examples), BATCH)
        right, lost = [], []
        for start in range(0, len(examples), BATCH):
            batch = list(examples[start : start + BATCH])
            inputs = collate_prompts(batch, pad_id=pad, side="left")
            with torch.no_grad():
                gate = mixture.one_hot(self.tasks - 1, len(batch))
                state = decoder.prefill(inputs["input_ids"], inputs["attention_mask"], task_gate=gate)
                scores = label_scores(decoder, state, plan, room).tolist()
            for example, row in zip(batch, scores, strict=True):
                place = labels.index(example.answer)
                right.append(float(row.index(max(row)) == place))
                lost.append(-row[place])
        return right, lost


def running(count: int) -> Tensor:
    """Weights of so many adapters in their running merge: each new one counts 1/sqrt(its number)."""
    weights = torch.zeros(count)
    for place in range(count):
        share = (place + 1) ** -0.5
        weights *= 1 - share
        weights[place] = share
    return weights


def apart(first: list[float], second: list[float]) -> list[float]:
    """Mean difference and its interval over rows."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    draws = [matrix[0][0] or 0.0 for matrix in resampled([[differences]], seed=0)]
    found = percentiles(statistics.fmean(differences), draws)
    return [found.value, found.low, found.high]


if __name__ == "__main__":
    main()
