"""The router's statistics of one stage: features of its rows, reduced over ranks, and the rows that are held out.

In prompt format 2 the held-out rows are seen by nobody: the adapter does not train on them, the statistics do not count
them, and what the finished model says of their labels is kept next to their features. Features of a sample of the rows that
are counted are kept too: each is left out of the keys in closed form where thresholds are set. In format 1 held-out rows are
kept out of the statistics alone.

Shapes in names: B rows, L tokens, D features, T tasks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from amlora_dist.adapters.reading import read_texts
from amlora_dist.adapters.statistics import HeldOut, Sample, TaskStatistics, merge, merge_holdouts
from amlora_dist.digests import named_seed, value_digest
from amlora_dist.evaluation.decoding import Decoder
from amlora_dist.evaluation.label_plan import plan_labels
from amlora_dist.evaluation.ranking import Room, label_scores
from amlora_dist.evaluation.scoring import deal
from amlora_dist.files import write_bytes
from amlora_dist.tasks import background
from amlora_dist.tasks.batches import Example, collate_prompts, padded
from amlora_dist.tasks.prompt_format import special_ends, text_ids
from amlora_dist.training.batching import prompt_positions

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.settings import RouterSettings
    from amlora_dist.training.engine import Ranks
    from amlora_dist.training.worker_cache import WorkerCache

log = logging.getLogger(__name__)

BATCH = 16
PART_TEXTS = 24
"""Texts of each part of the background that are read."""
BACKGROUND_TOKENS = 96
WAIT_S = 300.0
"""For another process that reads the background; afterwards it is read here too."""
FEWEST_HELD = 24
"""Rows that are held out at least, where that is no more than a quarter of them."""
SMALLEST_SHARE = 4
SAMPLED = 64
"""Rows of a task, of those that its statistics count, whose features are stored at most."""


@dataclass
class StageStatistics:
    """Makes them on one rank; every rank makes the same calls.

    Args:
        task: the stage's.
        seed: of the run.
        router: settings.
        tokenizer, encoder_decoder: of the model.
        ranks: all of the stage's.
        device: where the model is.
        whole: never end a pass early (ZeRO-3).
        text_alone: prompt format 2.
        cache: what this process keeps of texts that it has read.
    """

    task: str
    seed: int
    router: RouterSettings
    tokenizer: Any
    encoder_decoder: bool
    ranks: Ranks
    device: torch.device
    whole: bool
    text_alone: bool
    cache: WorkerCache

    def held_out(self, count: int) -> list[int]:
        """Places of the rows that are held out, rising; never all."""
        share = self.router.holdout
        if self.text_alone:
            return held_out_places(count, share, seed=self.seed, task=self.task)
        return _drawn(count, min(round(count * share), count - 1), self.seed, self.task)

    def of(
        self,
        mixture: Mixture,
        examples: Sequence[Example],
        earlier: Sequence[TaskStatistics],
        prompt_features: Callable[[Sequence[Example]], Tensor] | None,
        label_count: int,
    ) -> TaskStatistics:
        """Statistics of all rows but the held-out ones, which go next to them.

        Args:
            mixture: of the model.
            examples: the stage's own rows, the held-out ones among them.
            earlier: statistics of the tasks before (format 1).
            prompt_features: of whole prompts (format 1), (rows, D) fp32; None: by a pass of the model.
            label_count: labels of the task; 0 where rows have none or are of several tasks.
        """
        held = self.held_out(len(examples))
        left_out = set(held)
        kept = [example for place, example in enumerate(examples) if place not in left_out]
        chosen = [examples[place] for place in held]
        if not self.text_alone:
            features_of = prompt_features or partial(self._prompt_features, mixture)
            own = merge(self.ranks.gather(TaskStatistics.from_features(self.task, self._prompts(features_of, kept))))
            if held:
                features = self._prompts(features_of, chosen)
                parts = own.with_holdout(features, earlier, self.router.fixed_shrinkage)
                own = merge_holdouts(self.ranks.gather(parts))
            return own
        features, mine = self._texts(mixture, kept)
        labels = [label if (label := kept[place].label) is not None else 0 for place in mine]
        own = merge(self.ranks.gather(TaskStatistics.from_features(self.task, features, labels, label_count)))
        if not held:
            return own
        sampled = sampled_places(len(kept), seed=self.seed, task=self.task)
        order = {place: number for number, place in enumerate(sampled)}
        own_share = [number for number, place in enumerate(mine) if place in order]
        sample = Sample(
            self._whole(features[own_share], [order[mine[number]] for number in own_share], len(sampled)),
            torch.tensor([(kept[place].label or 0) if label_count else -1 for place in sampled]),
        )
        unseen = self._whole(*self._texts(mixture, chosen), len(chosen))
        places = [-1 if example.label is None or not label_count else example.label for example in chosen]
        return replace(own, held=HeldOut(unseen, torch.tensor(places)), sample=sample)

    def _whole(self, features: Tensor, places: list[int], count: int) -> Tensor:
        """Features of all of ``count`` rows, (count, F), of this rank's share of them and their places."""
        whole = torch.empty(count, features.shape[1])
        for rows, where in self.ranks.gather((features, places)):
            whole[where] = rows
        return whole

    def with_likelihoods(
        self,
        statistics: TaskStatistics,
        mixture: Mixture,
        examples: Sequence[Example],
        labels: Sequence[Sequence[int]],
        eos_id: int,
    ) -> TaskStatistics:
        """The same with what the trained model says of each label of the held-out rows, under the new task's row.

        Args:
            statistics: of ``of``.
            mixture: with the adapter that was trained.
            examples: the stage's own rows, the held-out ones among them.
            labels: token ids of the task's labels.
            eos_id: ends an answer.
        """
        if statistics.held is None:
            return statistics
        chosen = [examples[place] for place in self.held_out(len(examples))]
        pad_id = int(self.tokenizer.pad_token_id)
        decoder = Decoder(mixture.model, pad_id=pad_id, eos_id=eos_id, encoder_decoder=self.encoder_decoder)
        plan = plan_labels(labels, eos_id)
        room = Room(max(len(example.prompt) for example in chosen), BATCH)
        found: dict[int, list[float]] = {}
        was_training = mixture.model.training
        mixture.model.eval()
        with torch.no_grad():
            for indices, counts in deal(chosen, BATCH, self.ranks.rank, self.ranks.world):
                batch = collate_prompts([chosen[i] for i in indices], pad_id=pad_id, side=self._side)
                ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
                gate = mixture.one_hot(len(mixture.task_names) - 1, len(indices))
                state = decoder.prefill(ids, mask, task_gate=gate)
                scores = label_scores(decoder, state, plan, room).tolist()
                if counts:
                    found |= dict(zip(indices, scores, strict=True))
        mixture.model.train(was_training)
        every = {place: row for share in self.ranks.gather(found) for place, row in share.items()}
        likelihoods = torch.tensor([every[place] for place in range(len(chosen))])
        return replace(statistics, held=replace(statistics.held, loglikelihoods=likelihoods))

    def background(self, mixture: Mixture, cache: Path, decided_by: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean features (F,) of each part of the background, computed once for a base model and kept in ``cache``.

        Args:
            mixture: of the model.
            cache: folder of files that may be deleted at any time.
            decided_by: what besides the texts decides them: base model, dtype, layers.
        """
        own = {"texts": background.digest(), "limit": PART_TEXTS, "skip": self.router.skip_tokens}
        key = value_digest({**decided_by, **own})
        file = cache / "background" / f"{key}.safetensors"
        if (known := self._known(file)) is not None:
            return known
        with _alone_with(file) if self.ranks.rank == 0 else contextlib.nullcontext():
            if (known := self._known(file)) is not None:  # by who had the lock
                return known
            means = self._background_means(mixture)
            if self.ranks.rank == 0:
                _write_means(file, means)
        return means

    def _known(self, file: Path) -> dict[str, Tensor] | None:
        """What rank 0 finds in a file, on all ranks."""
        known = self.ranks.gather(_read_means(file) if self.ranks.rank == 0 else None)[0]
        return None if known is None else dict(known)

    def _background_means(self, mixture: Mixture) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for part in background.parts():
            rows = text_ids(background.texts(part)[:PART_TEXTS], self.tokenizer, BACKGROUND_TOKENS)
            examples = [Example(place, (), (), None, "", ids) for place, ids in enumerate(rows) if ids]
            features, _ = self._texts(mixture, examples)
            sums = self.ranks.gather((features.double().sum(dim=0), len(features)))
            means[part] = torch.stack([total for total, _ in sums]).sum(dim=0) / sum(count for _, count in sums)
        return means

    @property
    def _side(self) -> Any:
        return "right" if self.encoder_decoder else "left"

    def _texts(self, mixture: Mixture, examples: Sequence[Example]) -> tuple[Tensor, list[int]]:
        """Features of this rank's share of texts, (rows, F) fp32 on the CPU, and the places of the rows."""
        texts = [replace(example, prompt=example.text, target=()) for example in examples]
        dealt = deal(texts, BATCH, self.ranks.rank, self.ranks.world)
        mine = [index for indices, counts in dealt if counts for index in indices]
        key = (
            value_digest([text.text for text in texts]), self.ranks.rank, self.ranks.world, mixture.router_layer,
            tuple(mixture.routing.depths), self.router.skip_tokens, self.whole,
        )  # fmt: skip
        return self.cache.features(key, len(texts), partial(self._read, mixture, texts, dealt)), mine

    def _read(
        self, mixture: Mixture, texts: Sequence[Example], dealt: Sequence[tuple[list[int], bool]]
    ) -> Tensor:
        """What the router reads of this rank's share, as it was dealt: of the plain model, whatever adapters are in it."""
        ends = special_ends(self.tokenizer, self.encoder_decoder)
        out: list[Tensor] = []
        pad_id = int(self.tokenizer.pad_token_id)
        for indices, counts in dealt:
            own = [texts[i].text for i in indices]
            whole = [(*ends.before, *ids, *ends.after) for ids in own]
            seen = [(0,) * len(ends.before) + (1,) * len(ids) + (0,) * len(ends.after) for ids in own]
            ids_BL = padded(whole, pad_id, self._side).to(self.device)
            mask_BL = padded([(1,) * len(ids) for ids in whole], 0, self._side).to(self.device)
            text_BL = padded(seen, 0, self._side).to(self.device)
            positions = prompt_positions(mixture.model, mask_BL, encoder_decoder=self.encoder_decoder)
            with torch.no_grad():
                reading = read_texts(mixture, None, ids_BL, mask_BL, text_BL, positions, full_forward=self.whole)
            out.append(reading.features_BF.cpu() if counts else reading.features_BF[:0].cpu())
        return torch.cat(out)

    def _prompts(self, features_of: Callable[[Sequence[Example]], Tensor], examples: Sequence[Example]) -> Tensor:
        """Features of this rank's share of whole prompts, (rows, D) fp32 on the CPU (format 1)."""
        out: list[Tensor] = []
        with torch.no_grad():
            for indices, counts in deal(examples, BATCH, self.ranks.rank, self.ranks.world):
                features = features_of([examples[i] for i in indices])
                out.append(features.cpu() if counts else features[:0].cpu())
        return torch.cat(out)

    def _prompt_features(self, mixture: Mixture, examples: Sequence[Example]) -> Tensor:
        """Of the plain model, (rows, D)."""
        batch = collate_prompts(examples, pad_id=int(self.tokenizer.pad_token_id), side=self._side)
        batch |= prompt_positions(mixture.model, batch["attention_mask"], encoder_decoder=self.encoder_decoder)
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return mixture.routing_features(full_forward=self.whole, **inputs)


def held_out_places(count: int, share: float, *, seed: int, task: str) -> list[int]:
    """Places of the rows of a task that are held out in prompt format 2, rising: a share of them, at least
    ``FEWEST_HELD``, but no more than a quarter; none of share 0."""
    size = min(round(count * share), count - 1)
    return _drawn(count, min(max(size, FEWEST_HELD), count // SMALLEST_SHARE) if share > 0 else 0, seed, task)


def sampled_places(count: int, *, seed: int, task: str) -> list[int]:
    """Places, among the ``count`` rows that a task's statistics count, of those whose features are stored, rising: all of
    few, ``SAMPLED`` of many."""
    return _drawn(count, min(count, SAMPLED), seed, task, "sample")


def _drawn(count: int, size: int, seed: int, task: str, what: str = "holdout") -> list[int]:
    generator = torch.Generator().manual_seed(named_seed(seed, what, task))
    return sorted(torch.randperm(count, generator=generator)[: max(size, 0)].tolist())


@contextlib.contextmanager
def _alone_with(file: Path) -> Iterator[None]:
    """Inside, no other process of this node makes ``file``, which trials that start together would all make; one that
    takes too long is not waited for."""
    lock = FileLock(f"{file}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=WAIT_S)
    except (Timeout, OSError) as error:
        log.debug("%s: not waited for any longer: %s", file, error)
    try:
        yield
    finally:
        lock.release()


def _read_means(file: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _write_means(file: Path, means: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    try:
        write_bytes(file, save(means))
    except OSError as error:
        log.warning("%s: the background's features cannot be kept (%s); they are computed again next time", file, error)
