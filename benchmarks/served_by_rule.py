"""What a finished bank's adapters say of labels, for rules that route otherwise than the bank does.

A row is asked behind the prompt of the task that a rule routes it to, under that task's own row of G: hard routing, where a
bank mixes the rows of a text between two tasks. Nothing is asked twice: what was said is kept in a file, if there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from amlora_dist.adapters.keys import RouterKeys, fit_betas
from amlora_dist.adapters.statistics import HeldOut, TaskStatistics
from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError
from amlora_dist.files import write_bytes
from amlora_dist.inference.model import AMLoRAModel

BATCH, KEPT_EVERY = 8, 8


class AskedBank:
    """A bank of the same tasks in the same order, asked for likelihoods of labels.

    Args:
        bank: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a folder.
        tasks: names of the tasks that are expected.
        dtype: of the model.
        file: keeps what the bank said; None: nothing is kept.

    Raises:
        UserError: it has no keys for plain text, or other tasks.
    """

    def __init__(self, bank: str, tasks: Sequence[str], dtype: str, file: Path | None) -> None:
        self.model = AMLoRAModel.from_bank(bank, dtype=dtype, abstain=0.0)
        if self.model.answering is None or self.model.tasks != list(tasks):
            raise UserError(f"--bank: {bank} is of {self.model.tasks}, expected keys for plain text of {list(tasks)}")
        self.answering = self.model.answering
        self.asked = 0
        """Rows that the bank was asked here, not read from the file."""
        manifest = self.model.bank.manifest
        entries = [(one.digest, one.task_spec and asdict(one.task_spec)) for one in manifest.adapters]
        self._of = [manifest.base.digest, manifest.router.digest, entries, dtype]
        self._file = file
        self._known: dict[str, list[float] | str] = {}
        if file is not None and file.exists():
            self._known = json.loads(file.read_text(encoding="utf-8"))

    def likelihoods(self, task: int, texts: Sequence[str], words: Sequence[str]) -> Tensor:
        """Log-likelihood of each label of a task behind its prompt, under its own row, (rows, labels) fp64, nats.

        Args:
            task: by place in the bank.
            texts: of any task.
            words: of the labels, in the order that is wanted.
        """
        name = self.model.tasks[task]

        def ask(part: Sequence[str]) -> list[list[float]]:
            begun = self.answering.begin(self.model.requests(part, task=name))
            found = []
            for weighed in self.answering.weigh(begun, [tuple(words)] * len(part)):
                assert weighed is not None, "labels were given"
                found.append(list(weighed.model))
            return found

        return torch.tensor(self._all([name, *words], texts, ask), dtype=torch.float64)

    def served(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        """Task and label that the bank itself answers, by its own keys and gates."""

        def ask(part: Sequence[str]) -> list[list[str]]:
            begun = self.answering.begin(self.model.requests(part))
            found = []
            for request, weighed in zip(begun.requests, self.answering.weigh(begun), strict=True):
                assert request.task is not None and weighed is not None, "every task has labels"
                found.append([request.task, self.answering.decide(weighed)[0]])
            return found

        return [(task, label) for task, label in self._all(["served"], texts, ask)]

    def _all(self, asked: list[str], texts: Sequence[str], ask: Callable[[Sequence[str]], list]) -> list:  # type: ignore[type-arg]
        keys = [value_digest([*self._of, asked, text]) for text in texts]
        missing = sorted({key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}.items(),
                         key=lambda one: len(one[1]))  # fmt: skip
        for batch, start in enumerate(range(0, len(missing), BATCH), start=1):
            part = missing[start : start + BATCH]
            self._known |= zip([key for key, _ in part], ask([text for _, text in part]), strict=True)
            self.asked += len(part)
            if batch % KEPT_EVERY == 0:
                self._keep()
        if missing:
            self._keep()
            print(f"asked the bank {len(missing)} rows of {asked[0]}", file=sys.stderr, flush=True)
        return [self._known[key] for key in keys]

    def _keep(self) -> None:
        if self._file is not None:
            write_bytes(self._file, json.dumps(self._known).encode())


def count_right(
    task_n: Tensor, wanted: Sequence[str], words: Sequence[Sequence[str]], scores: Callable[[int, Tensor], Tensor]
) -> int:
    """Rows whose best label of their routed task has the right words.

    Args:
        task_n: where each row is routed to.
        wanted: the right words of each.
        words: of each task's labels.
        scores: of the labels of a task, (rows, labels), for the rows at some places.
    """
    right = 0
    for task in task_n.unique().tolist():
        places = (task_n == task).nonzero()[:, 0]
        best = scores(task, places).argmax(dim=1).tolist()
        right += sum(words[task][label] == wanted[row] for row, label in zip(places.tolist(), best, strict=True))
    return right


def betas_of_scores(
    scores: Sequence[Tensor], likelihoods: Sequence[Tensor | None], labels: Sequence[Sequence[int]], counts: Sequence[int]
) -> tuple[float, ...]:
    """The weight of a rule's evidence for each task, fitted as a bank fits it, for rules that are no Gaussian keys.

    Args:
        scores: of all labels of all tasks, (n, J), of each task's held-out rows.
        likelihoods: of its labels, of the same rows.
        labels: of these rows.
        counts: labels of each task.
    """
    owner = [(task, label) for task, count in enumerate(counts) for label in range(count)]
    width = len(owner)
    every = torch.eye(width, dtype=torch.float64)
    task, label = zip(*owner, strict=True)
    keys = RouterKeys(every, every.new_zeros(width), task, label, every.new_zeros(width))
    none = every.new_zeros(width)
    statistics = [
        TaskStatistics(str(place), 1, none, none[None], held=HeldOut(own, torch.tensor(of_rows), said))
        for place, (own, said, of_rows) in enumerate(zip(scores, likelihoods, labels, strict=True))
    ]
    return fit_betas(statistics, keys, 1.0)[1]
