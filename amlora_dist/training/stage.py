"""One stage on one rank: train an adapter on top of frozen ones, then score. Reads from top to bottom as the story.

The same code runs on every worker of a Ray Train group under DeepSpeed, and with ``distributed=False`` in a single
process without either.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter, recipe_summary
from amlora_dist.adapters.boundaries import mixed_shares
from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.adapters.statistics import TaskStatistics
from amlora_dist.adapters.targets import default_depths, default_router_layer
from amlora_dist.base_model import BaseModel
from amlora_dist.crash_points import reach
from amlora_dist.digests import named_seed
from amlora_dist.errors import TrainingError
from amlora_dist.evaluation.decoding import check_room
from amlora_dist.evaluation.scoring import deal
from amlora_dist.methods import excluded, method_for
from amlora_dist.methods.base import Trained
from amlora_dist.methods.kinds import Trains
from amlora_dist.tasks.batches import Example, label_tokens
from amlora_dist.training.batching import Layout, LossComputer
from amlora_dist.training.best_checkpoint import BestKeeper
from amlora_dist.training.checkpoint import StageProgress
from amlora_dist.training.checksum import weights_checksum
from amlora_dist.training.engine import (
    Alone,
    DeepSpeedEngine,
    DistributedRanks,
    PlainEngine,
    Ranks,
    TrainingEngine,
    deepspeed_config,
    inference_model,
    join_process_group,
)
from amlora_dist.training.failures import StoppedError, disk_watched, memory_watched
from amlora_dist.training.held_loss import HeldLoss, pass_rows
from amlora_dist.training.loop import Learner
from amlora_dist.training.optimizer import parameter_groups
from amlora_dist.training.rate_race import Raced, run_rate_race
from amlora_dist.training.recipe_refit import RecipeRefit
from amlora_dist.training.recipe_start import RecipeStart
from amlora_dist.training.result import ADAPTER_OF, Result, is_whole, read_result, write_result
from amlora_dist.training.scoring import Report, Scoring
from amlora_dist.training.stage_facts import trainable_facts, trained_with
from amlora_dist.training.stage_rows import StageRows
from amlora_dist.training.stage_spec import Parent, StageWork
from amlora_dist.training.stage_statistics import StageStatistics
from amlora_dist.training.trunk_cache import TrunkCache
from amlora_dist.training.worker_cache import WorkerCache

__all__ = ["StoppedError", "run_stage"]

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_stage(
    work: StageWork, *, distributed: bool, report: Report, device: torch.device, cache: WorkerCache | None = None
) -> None:
    """Do what ``work`` says and is not done yet; safe to call again after any interruption.

    Args:
        work: the stage.
        distributed: on every rank of a process group, under DeepSpeed.
        report: takes events, on rank 0.
        device: of this rank.
        cache: what this process keeps from stage to stage; default: nothing.

    Raises:
        StoppedError: asked to stop; a checkpoint has been written.
        TrainingError: the loss is not finite.
        UserError: other data than the driver's, no target module, a full disk.
    """
    if distributed:
        join_process_group()
    worker_cache = cache or WorkerCache()

    def begun(one: StageWork, steps: int) -> Raced:
        with worker_cache.stage():
            return _Stage(one, distributed, report, device, worker_cache).begin(steps)

    with disk_watched():
        if work.race is not None:
            ranks: Ranks = DistributedRanks() if distributed else Alone()
            run_rate_race(work, work.race, begun, writes=ranks.rank == 0)
            return
        with contextlib.nullcontext() if cache is None else cache.stage():
            stage = _Stage(work, distributed, report, device, worker_cache)
            with stage.released():
                is_trained = stage.agree()
                if stage.method.trains is Trains.NOTHING:
                    stage.score_base()
                elif is_trained:
                    stage.score(stage.restored())
                else:
                    stage.score(stage.train() if work.taken is None else stage.make_statistics(work.taken))


@dataclass(frozen=True, slots=True)
class _LoadedBank:
    """A bank in its model, with what its router is made of."""

    mixture: Mixture
    adapters: list[Adapter]
    statistics: list[TaskStatistics]


class _Stage:
    def __init__(
        self, work: StageWork, distributed: bool, report: Report, device: torch.device, cache: WorkerCache
    ) -> None:
        self.work, self.distributed, self.device, self.cache = work, distributed, device, cache
        self.settings = work.settings
        self.ranks: Ranks = DistributedRanks() if distributed else Alone()
        self._report = report
        self.base: BaseModel = work.base_model()
        self.tokenizer: Any = cache.tokenizer(self.base)
        self.method = method_for(self.settings)
        self.layout = Layout.of(
            self.settings.training.batch_size, self.ranks.world, self.settings.training.micro_batch_size
        )
        self.layers = self.method.layers.marked(int(self.tokenizer.eos_token_id))
        self.recipe = self.method.recipe(work.index - 1)
        self.rows = StageRows(work, cache, self.base, self.tokenizer, self.layers.prefix, self.recipe.memory_rows)
        self.config = self._deepspeed_config() if distributed else None
        self._release: Callable[[], None] | None = None
        """Lets go of the model that the stage has used, after its last pass."""

    def agree(self) -> bool:
        """Whether the stage is trained, by rank 0's word; and fetch what this node lacks, where nodes share no folder.

        Raises:
            UserError: the store of the copies is away, or what should be there is not.
        """
        work, copies = self.work, self.work.copies
        if copies is None:
            return bool(self.ranks.gather(work.is_trained)[0])
        for one in work.adapters:
            folder = Path(one.folder)
            copies.fetch(folder, partial(is_whole, folder))
        if self.ranks.rank == 0:
            copies.fetch(work.trained, partial(is_whole, work.trained))
            if work.is_trained:
                copies.upload(work.trained)
        trained = bool(self.ranks.gather(work.is_trained)[0])
        if trained:
            copies.fetch(work.trained, partial(is_whole, work.trained))
        return trained

    def restored(self) -> _LoadedBank:
        """The bank of a stage that is trained, from its folders."""
        results = [*self._parents(), read_result(self.work.trained)]
        model = self._load_base()
        adapters = [result.adapter for result in results]
        mixture = self._inject(model, adapters, new=None)
        mixture.model = self._ready(model)
        return _LoadedBank(mixture, adapters, [result.statistics for result in results])

    def score(self, bank: _LoadedBank) -> None:
        """Score the cells, as the finished bank answers."""
        mixture = bank.mixture
        mixture.set_router(self.method.router(bank.statistics))
        self._scoring(mixture.model, mixture, bank.adapters, self._trunk_cache(mixture, decodes=True)).run()

    def score_base(self) -> None:
        """Score the cells of a method that trains nothing."""
        self._scoring(self._ready(self._load_base()), None, [], None).run()

    def _parents(self) -> list[Result]:
        """What the stages below have left."""
        return [self._read(parent) for parent in self.work.parents]

    @staticmethod
    def _read(one: Parent) -> Result:
        """Raises TrainingError where it is not what was meant."""
        result = read_result(Path(one.folder))
        if result.adapter.digest() != one.digest:
            raise TrainingError(f"the adapter {one.task!r} in {one.folder} is not the one that was meant")
        return result

    def _scoring(self, model: Any, mixture: Mixture | None, adapters: list[Adapter], cache: TrunkCache | None) -> Scoring:
        forward = (lambda _: model) if cache is None else partial(cache.forward_for, model)
        return Scoring(
            self.work, self.method, model, mixture, adapters, forward, examples=self.rows.examples,
            plain_rows=self.rows.plain, tokenizer=self.tokenizer, encoder_decoder=self.base.encoder_decoder,
            ranks=self.ranks, device=self.device, report=self.report, prefix=self.layers.prefix,
        )  # fmt: skip

    def _ready(self, model: Any) -> Any:
        """A model that nothing will train, where it runs."""
        if self.config is not None:
            model, self._release = inference_model(model, self.config)
        return model.to(self.device)

    # -- training -----------------------------------------------------------------------------------------------

    def train(self) -> _LoadedBank:
        """Train the new adapter, and leave the stage's result in its folder."""
        work, settings, parents = self.work, self.settings, self._parents()
        model = self._load_base()
        adapters = [parent.adapter for parent in parents]
        mixture = self._inject(model, adapters, new=self._new_adapter(adapters))
        engine = self._engine(mixture)
        self._release = engine.destroy
        self.report(trainable_facts(mixture))
        before = self._checksums(mixture)

        every, replayed = self.rows.training()
        check_room(model.config, max(len(row.prompt) for row in every), max(len(row.target) for row in every))
        cache, makes = self._trunk_cache(mixture), self._statistics()
        make_statistics = partial(self._all_statistics, makes, mixture, every, parents, cache)
        own, unseen = self._divided(makes, every)
        loss = self._loss(mixture, cache)
        # Selectors may have a prior of them; else no step waits for the reading of texts.
        if statistics := make_statistics() if self.layers.has_prior else []:
            mixture.set_router(self.method.router(statistics))
        self.method.prepare(mixture, parents)
        learner, held_loss = self._learner(mixture, engine, loss, own, replayed, unseen)
        self.report({"kind": "rows", "rows": len(own) + len(replayed)})
        progress = learner.resume()
        if progress is None:
            progress = StageProgress(fingerprint=work.fingerprint, step=0)
            if self.recipe.learned:
                start = RecipeStart(settings, adapters, learner, loss, own, held_loss, self.report, cache is None)
                progress = start.begin(progress)
        progress.trained_with = trained_with(settings, self.ranks.world, self.device, self.config)
        learns = self.method.trains is Trains.ADAPTER
        if learns:
            progress = learner.run(progress)
        reach("training_ended")
        if self._checksums(mixture) != before:
            raise TrainingError("the base model or an old adapter changed while training")
        statistics = statistics or make_statistics()
        gate = self.method.training_gate(len(mixture.task_names))
        row_losses = partial(self._row_losses, engine, loss, own, gate)
        made = mixture.extract_new(gather=engine.whole)
        adapter, state = self.method.finished(Trained(made, adapters, mixture, len(own), row_losses, self.ranks.sum))
        if adapter is not made:
            mixture.set_new(adapter)
        if learns and self.rows.label_count:
            split, decoder = self.settings.prompt_format.text_alone, self.base.encoder_decoder
            labels = label_tokens(work.spec(work.task), self.tokenizer, decoder, split=split)
            eos_id = int(self.tokenizer.eos_token_id)
            statistics[-1] = makes.with_likelihoods(statistics[-1], mixture, every, labels, eos_id)
        refit = RecipeRefit(mixture, loss, self.ranks, self.device, settings.training, self.layout.micro)
        refits = refit.earlier([*adapters, adapter], self.rows.memory(), self.report)
        reach("adapter_gathered")
        if self.ranks.rank == 0:
            training = asdict(progress) | refits | {
                "recipe": recipe_summary(adapter, [parent.task for parent in work.parents]),
                "mixed": mixed_shares(statistics),
            }
            write_result(work.trained, Result(adapter, statistics[-1], training, work.index, state))
            if work.copies is not None:
                work.copies.upload(work.trained)
        self.ranks.gather(None)  # nobody goes on before the result is there
        return _LoadedBank(mixture, [*adapters, adapter], statistics)

    def make_statistics(self, taken: Parent) -> _LoadedBank:
        """Leave a result with an adapter that was trained under other settings of the statistics, and those of this stage.

        What the model says of the held-out rows' labels is as it was: the adapter and the rows are the same."""
        work, parents, former = self.work, self._parents(), self._read(taken)
        model, adapters = self._load_base(), [*(parent.adapter for parent in parents), former.adapter]
        mixture = self._inject(model, adapters, new=None)
        mixture.model = self._ready(model)
        statistics = self._all_statistics(self._statistics(), mixture, self.rows.training()[0], parents, None)
        if (held := statistics[-1].held) is not None and former.statistics.held is not None:
            held = replace(held, loglikelihoods=former.statistics.held.loglikelihoods)
            statistics[-1] = replace(statistics[-1], held=held)
        reach("adapter_gathered")
        if self.ranks.rank == 0:
            training = {
                "fingerprint": work.fingerprint, ADAPTER_OF: former.training["fingerprint"], "seconds": 0.0, "tokens": 0,
                "losses": [], "mixed": mixed_shares(statistics),
            }  # fmt: skip
            write_result(work.trained, replace(former, statistics=statistics[-1], training=training))
            if work.copies is not None:
                work.copies.upload(work.trained)
        self.ranks.gather(None)  # nobody goes on before the result is there
        return _LoadedBank(mixture, adapters, statistics)

    def begin(self, steps: int) -> Raced:
        """Take the first steps of a stage without a bank below it, leave a checkpoint, and give the loss on the rows that
        are held out. The model is let go of however it ends."""
        began = time.monotonic()
        with self.released():
            model = self._load_base()
            mixture = self._inject(model, [], new=self._new_adapter([]))
            engine = self._engine(mixture)
            self._release = engine.destroy
            self.report(trainable_facts(mixture))
            every, replayed = self.rows.training()
            check_room(model.config, max(len(row.prompt) for row in every), max(len(row.target) for row in every))
            own, unseen = self._divided(self._statistics(), every)
            loss = self._loss(mixture, self._trunk_cache(mixture))
            self.method.prepare(mixture, [])
            learner, held_loss = self._learner(mixture, engine, loss, own, replayed, unseen)
            if held_loss is None:
                raise TrainingError(f"stage {self.work.task!r}: no rows are held out, so nothing can be raced on them")
            progress = learner.resume() or StageProgress(fingerprint=self.work.fingerprint, step=0)
            before = progress.seconds
            learner.run(progress, until=steps)
            return Raced(held_loss(), before + time.monotonic() - began)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside, the stage uses its model; it lets go of it at the end, of an error too: a process may go on with another
        stage, or with another candidate of a race. An error of letting go does not hide the one that ended the stage."""
        try:
            yield
        except BaseException:
            release, self._release = self._release, None
            if release is not None:
                with contextlib.suppress(Exception):
                    release()
            raise
        if self._release is not None:
            self._release()
        self.ranks.gather(None)  # a stage has ended when it has on every rank

    def _divided(self, makes: StageStatistics, every: list[Example]) -> tuple[list[Example], list[Example]]:
        """The stage's own rows: those that it trains on, and those that nobody sees."""
        if not self.settings.prompt_format.text_alone:
            return every, []  # format 1 trains on all rows
        left_out = set(makes.held_out(len(every)))
        kept = [example for place, example in enumerate(every) if place not in left_out]
        return kept, [example for place, example in enumerate(every) if place in left_out]

    def _loss(self, mixture: Mixture, cache: TrunkCache | None) -> LossComputer:
        """The loss of the model, which begins above the trunk where there is a cache of it."""
        loss = LossComputer(
            mixture.model, pad_id=self.tokenizer.pad_token_id, encoder_decoder=self.base.encoder_decoder,
            device=self.device, packing_width=mixture.packing_width() if self.settings.training.packing else 0,
        )  # fmt: skip
        if cache is not None:
            cache.attach(mixture.model)
        return loss

    def _learner(
        self, mixture: Mixture, engine: TrainingEngine, loss: LossComputer, own: list[Example], replayed: list[Example],
        unseen: list[Example],
    ) -> tuple[Learner, HeldLoss | None]:  # fmt: skip
        """The optimizer loop over the stage's rows, and the loss on those that it does not see."""
        work, settings = self.work, self.settings
        gate = self.method.training_gate(len(mixture.task_names))
        batch = pass_rows(settings.training.micro_batch_size)
        held_loss = HeldLoss(engine, loss, unseen, gate, batch) if unseen else None
        keeps = held_loss is not None and settings.training.keep == "best" and not self.layers.selectors_alone
        learner = Learner(
            engine, loss, [*own, *replayed], settings.training, layout=self.layout, seed=settings.seed, stage=work.task,
            folder=work.path, fingerprint=work.fingerprint, mixture=mixture, objective=self.method.loss,
            dropout=settings.adapters.dropout > 0, two_phases=self.layers.selectors_alone, report=self.report,
            remote=work.remote_checkpoints,
            keeper=partial(BestKeeper, held_loss, settings.training) if held_loss is not None and keeps else None,
            refit=settings.recipe.refit, stop_in=None if work.stop_in is None else Path(work.stop_in),
        )  # fmt: skip
        return learner, held_loss

    def _checksums(self, mixture: Mixture) -> list[tuple[int, int]]:
        """Of the base model, which is what it was when it was loaded, and of all else that must not train."""
        leave_out = self.cache.base_parameters() | {id(p) for p in mixture.trainable().values()}
        others = weights_checksum(p for p in mixture.model.parameters() if id(p) not in leave_out)
        return [self.cache.base_checksum(), others]

    def _row_losses(
        self, engine: TrainingEngine, loss: LossComputer, examples: Sequence[Example], gate: Tensor | None, count: int
    ) -> Iterator[Tensor]:
        for (index,), counts in deal(examples[:count], 1, self.ranks.rank, self.ranks.world):
            one = loss(engine.model, [examples[index]], gate)
            yield one if counts else one * 0.0

    def _new_adapter(self, adapters: list[Adapter]) -> NewAdapter:
        start = self.method.start_from(adapters)
        constant = self.recipe.constant if adapters else None
        return NewAdapter(
            task=self.work.task, rank=self.layers.rank, alpha=self.layers.alpha,
            seed=named_seed(self.settings.seed, "adapter", self.work.task),
            init=None if start is None else {m: (start.a[m], start.b[m]) for m in start.a},
            recipe_init=None if constant is None else dict.fromkeys(adapters[0].a, constant),
            learn_recipe=self.recipe.learned, dropout=self.settings.adapters.dropout,
        )  # fmt: skip

    def _statistics(self) -> StageStatistics:
        settings = self.settings
        return StageStatistics(
            self.work.task, settings.seed, settings.router, self.tokenizer, self.base.encoder_decoder, self.ranks,
            self.device, self._partitioned, settings.prompt_format.text_alone, self.cache,
        )  # fmt: skip

    def _all_statistics(
        self, makes: StageStatistics, mixture: Mixture, every: list[Example], parents: list[Result], cache: TrunkCache | None
    ) -> list[TaskStatistics]:
        """Of the bank's tasks, the newest last, with those of generic texts, by which texts of no task are recognised. They
        are of the plain model, so that training changes nothing about them."""
        router, earlier = self.settings.router, [parent.statistics for parent in parents]
        features_of = None
        if cache is not None and cache.trunk.layer == mixture.router_layer:
            features_of = partial(cache.features, skip_tokens=router.skip_tokens)
        self.report({"kind": "reading", "rows": len(every)})
        with memory_watched(f"reading the texts of task {self.work.task!r}", "lower router.max_text_tokens"):
            newest = makes.of(mixture, every, earlier, features_of, self.rows.label_count)
            wanted = router.background and self.method.routed and newest.held is not None
            if wanted and router.kind in ("posterior", "permuted"):
                read = {"layer": mixture.router_layer, "depths": list(mixture.routing.depths)}
                decided_by = {"base": self.base.identity, "dtype": self.settings.dtype} | read
                newest = replace(newest, background=makes.background(mixture, Path(self.work.cache), decided_by))
        self.report({"kind": "statistics", "rows": newest.count, "held_out": len(makes.held_out(len(every)))})
        return [*earlier, newest]

    def _engine(self, mixture: Mixture) -> TrainingEngine:
        trainable = mixture.trainable()
        groups = parameter_groups(trainable, self.settings.training, selectors_alone=self.layers.selectors_alone)
        betas = self.settings.training.betas
        if self.config is None:
            return PlainEngine(
                mixture.model, trainable, groups, betas=betas, clip=self.settings.training.clip, device=self.device
            )
        return DeepSpeedEngine(mixture.model, trainable, groups, config=self.config, betas=betas)

    # -- what both need -----------------------------------------------------------------------------------------

    def report(self, event: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            self._report(event)

    def _load_base(self) -> Any:
        return self.cache.base_model(
            self.base, config=self.config, dtype=DTYPES[self.settings.dtype], attention=self.settings.attention,
            device=self.device, gradient_checkpointing=self.settings.training.gradient_checkpointing,
        )  # fmt: skip

    def _inject(self, model: Any, adapters: list[Adapter], new: NewAdapter | None) -> Mixture:
        layer = self.settings.router.layer
        layer = default_router_layer(model) if layer is None else layer
        mixture = inject(
            model,
            self.layers.targets(model, self.settings.adapters, layer),
            adapters,
            new=new,
            router=None,
            router_layer=layer,
            depths=self._depths(layer),
            skip_tokens=self.settings.router.skip_tokens,
            layers=self.layers,
        )
        mixture.run_whole_passes(self._partitioned)  # a pass that ends early leaves parameters gathered
        return mixture

    @property
    def _partitioned(self) -> bool:
        """Whether ZeRO-3 shares the parameters out, so that every rank must make equally many whole passes."""
        return self.config is not None and int(self.config["zero_optimization"]["stage"]) == 3

    def _depths(self, layer: int) -> list[int]:
        """Layers below the routing layer that features take in too: of texts that are read alone."""
        if not self.settings.prompt_format.text_alone or not self.layers.several_depths:
            return []
        chosen = self.settings.router.depths
        return default_depths(layer) if chosen is None else chosen

    def _trunk_cache(self, mixture: Mixture, *, decodes: bool = False) -> TrunkCache | None:
        """The cache of what lies below the first adapted layer, where it is wanted and what is read never changes; not under
        ZeRO-3, whose passes gather every layer on every rank, cached or not. For prompts (``decodes``) only if the trunk
        ends at the routing layer, where the features are read."""
        settings = self.settings
        if not settings.training.cache_trunk or "caches" in excluded(settings.method) or self._partitioned:
            return None
        trunk = mixture.trunk()
        if decodes and (trunk.layer != mixture.router_layer or self.layers.selects):
            return None
        decided_by = {"base": self.base.identity, "attention": settings.attention, "device": self.device.type}
        return TrunkCache(
            trunk, Path(self.work.cache) / "trunk", limit=int(settings.training.cache_trunk_gb * 1e9),
            dtype=DTYPES[settings.dtype], decided_by=decided_by, decodes=decodes,
        )  # fmt: skip

    def _deepspeed_config(self) -> dict[str, Any]:
        return deepspeed_config(
            self.work.deepspeed, dtype=DTYPES[self.settings.dtype], micro=self.layout.micro,
            accumulation=self.layout.accumulation, world=self.ranks.world, clip=self.settings.training.clip,
        )  # fmt: skip
