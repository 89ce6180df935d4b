"""The rows of a stage on one rank: read and tokenised once in a process, however many stages and scores use them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from amlora_dist.adapters.adapted_layers import NO_PREFIX, Prefix
from amlora_dist.digests import named_seed, value_digest
from amlora_dist.tasks.batches import Example, encode
from amlora_dist.tasks.prompts import template_for
from amlora_dist.training.batching import all_tokens
from amlora_dist.training.stage_statistics import held_out_places

if TYPE_CHECKING:
    from amlora_dist.base_model import BaseModel
    from amlora_dist.tasks.sources import Row
    from amlora_dist.training.stage_spec import StageWork
    from amlora_dist.training.worker_cache import WorkerCache

CHARACTERS_OF_A_TOKEN = 4
"""About; for how much room rows take."""


@dataclass(frozen=True, slots=True)
class StageRows:
    """Reads what a stage learns from and is scored on.

    Args:
        work: the stage.
        cache: what this process keeps.
        base: whose tokens they become.
        tokenizer: of the base model.
        prefix: what every input has in front.
        memory_rows: of ``Method.recipe``: with some, rows of earlier tasks are that memory, and not trained on.
    """

    work: StageWork
    cache: WorkerCache
    base: BaseModel
    tokenizer: Any
    prefix: Prefix
    memory_rows: int = 0

    def plain(self, task: str, split: str) -> list[Row]:
        """Rows of a task's split, as they are in the data."""
        return self.cache.rows(
            self._key("plain", task, split),
            lambda: self.work.data(task, (split,)).rows[split],
            lambda rows: sum(len(row.text) + len(row.target) for row in rows) // CHARACTERS_OF_A_TOKEN,
        )

    def examples(self, task: str, split: str, *, plain: bool = False) -> list[Example]:
        """The same as the model reads them; ``plain``: without anything in front."""
        prefix = NO_PREFIX if plain else self.prefix
        form = repr(self.work.settings.prompt_format)
        key = self._key("examples", task, split, self.base.digest, str(self.base.path), form, prefix)
        return self.cache.rows(key, partial(self._encoded, task, split, prefix), all_tokens)

    def training(self) -> tuple[list[Example], list[Example]]:
        """The rows that the stage is about, and those of earlier tasks that the method lets it see again.

        Tasks come by name: the fingerprint says whose rows they are, not in which order a sequence has them.
        """
        own: list[Example] = []
        replayed: list[Example] = []
        for task, limit in sorted((self.work.rows or {self.work.task: None}).items()):
            examples = self.examples(task, "train")
            if limit is None:
                own += examples
            elif not self.memory_rows:
                replayed += self._sample(examples, limit, "replay", task)
        for task, count in self.work.mixed.items():
            own += self._sample(self.examples(task, "train"), count, "mixed", f"{self.work.task}/{task}")
        return own, replayed

    @property
    def alone(self) -> bool:
        """Whether all rows that are learned are of the stage's own task, as it was given."""
        named = (self.work.rows or {self.work.task: None}).items()
        learned = {task: limit for task, limit in named if limit is None or not self.memory_rows}
        return learned == {self.work.task: None} and not self.work.mixed

    @property
    def label_count(self) -> int:
        """Labels of the stage's task, where statistics are of its rows alone; else 0."""
        spec = self.work.spec(self.work.task) if self.work.task in self.work.tasks else None
        return len(spec.label_texts) if spec is not None and self.alone else 0

    def memory(self) -> dict[str, list[Example]]:
        """By earlier task, rows that nobody has trained on, at most so many; of all its rows where none were held out."""
        found, settings = {}, self.work.settings
        share = settings.router.holdout if settings.prompt_format.text_alone else 0.0
        for task, limit in sorted((self.work.rows or {}).items()):
            if limit is not None and self.memory_rows:
                examples = self.examples(task, "train")
                unseen = [examples[n] for n in held_out_places(len(examples), share, seed=settings.seed, task=task)]
                found[task] = self._sample(unseen or examples, limit, "memory", task)
        return found

    def _encoded(self, task: str, split: str, prefix: Prefix) -> list[Example]:
        spec = self.work.spec(task)
        examples = encode(
            self.plain(task, split),
            spec,
            template_for(spec, spec.prompt_style),
            self.tokenizer,
            max_length=int(spec.max_length or 512),
            encoder_decoder=self.base.encoder_decoder,
            prompt_format=self.work.settings.prompt_format,
        )
        if not prefix.tokens:
            return examples
        return [replace(example, prompt=prefix.before(example.prompt), span=None) for example in examples]

    def _sample(self, examples: list[Example], count: int, purpose: str, name: str) -> list[Example]:
        return [examples[i] for i in sampled_places(len(examples), count, self.work.settings.seed, purpose, name)]

    def _key(self, kind: str, task: str, split: str, *more: Hashable) -> Hashable | None:
        """All that decides the rows of a split; None where nobody knows what their digest must be."""
        work = self.work
        expected = work.data_digests.get(f"{task}/{split}")
        if expected is None:
            return None
        return (kind, expected, split, value_digest(work.tasks[task]), work.data_seed, work.data_dir, *more)


def sampled_places(of: int, count: int, seed: int, purpose: str, name: str) -> list[int]:
    """Places, rising, of at most ``count`` of so many rows, drawn for a purpose such as ``replay`` of the task ``name``."""
    generator = torch.Generator().manual_seed(named_seed(seed, purpose, name))
    return sorted(torch.randperm(of, generator=generator)[:count].tolist())
