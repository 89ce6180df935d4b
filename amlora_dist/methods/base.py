"""What a continual-learning method decides, as a few hooks around the one durable stage.

A method never trains by itself. The stage asks it, in this order: which rows it learns from, what a new adapter starts
from, how the adapters are weighed while it learns, what the loss is, what is kept for later stages, and who
weighs the adapters afterwards. The defaults are those of AM-LoRA with the posterior router; a method overrides what it
does differently. ``docs/methods.md`` shows how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from amlora_dist.config.former_values import unlike_former
from amlora_dist.methods.kinds import Stages, Trains

if TYPE_CHECKING:
    from amlora_dist.adapters.adapted_layers import AdaptedLayers
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.statistics import TaskStatistics
    from amlora_dist.training.micro_batch import MicroBatch
    from amlora_dist.training.result import Result
    from amlora_dist.training.settings import StageSettings


OF_STATISTICS = ("depths", "skip_tokens")
"""What of ``router`` only the statistics read: where in the model, and over which tokens, features are taken."""


@dataclass(frozen=True, slots=True)
class StageRecipe:
    """How the new task's row weighs the earlier adapters, and what becomes of the rows before it."""

    learned: bool = False
    """Whether the new adapter learns weights on the earlier ones, too."""
    constant: Tensor | None = None
    """Weights of the earlier adapters, (earlier,), where none are learned; None: 0."""
    memory_rows: int = 0
    """Rows of each earlier task that ``Method.rows`` names for its row's refit after the stage, and for no training; 0:
    none, what ``rows`` names is trained on."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A stage whose training has ended, as ``Method.finished`` sees it; the same calls must be made on every rank."""

    adapter: Adapter
    """A copy of what was trained, on the CPU."""
    earlier: Sequence[Adapter]
    """Those that it was trained on top of."""
    mixture: Mixture
    rows: int
    """Training rows of the stage's own."""
    row_losses: Callable[[int], Iterator[Tensor]]
    """Loss (nats, with gradient) of the first so many of them, one row at a time.

    Each rank sees its share; where shares are uneven, losses times 0 fill up."""
    add_up: Callable[[Tensor], Tensor]
    """Sum over ranks, in place."""


class Method:
    """Base of all methods; one instance serves one stage."""

    trains: ClassVar[Trains] = Trains.ADAPTER
    """What a stage makes that is published."""
    stages: ClassVar[Stages] = Stages.CHAINED
    """What stages a sequence has, and what each sees of those before."""
    routed: ClassVar[bool] = True
    """Whether scores depend on the settings of ``router.gate``."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Keys of ``method_settings`` that decide what stages from the second on train."""

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings

    # -- what decides the result --------------------------------------------------------------------------------

    def reads(self, stage: int) -> dict[str, Any]:
        """Configuration values that decide what stage ``stage`` (1-based) trains, for its training fingerprint.

        Whatever is not named here must not change the adapter by a bit; a test changes every such key.
        """
        s = self.settings
        values: dict[str, Any] = {
            "dtype": s.dtype,
            "attention": s.attention,
            "adapters": unlike_former("adapters", asdict(s.adapters)),
            "router": self._read_of_router(),
            "training": {
                key: getattr(s.training, key)
                for key in ("epochs", "batch_size", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip")
            }
            | {"betas": list(s.training.betas)}
            | unlike_former(
                "training", {key: getattr(s.training, key) for key in ("lora_plus", "label_smoothing", "packing")}
            ),
        }
        if s.training.keep == "best":
            keys = ("keep", "check_every", "patience", "near_tie")
            values["training"] |= {key: getattr(s.training, key) for key in keys}
        if stage > 1 and self.recipe(stage - 1).learned:
            values["recipe"] = {
                key: getattr(s.training, key) for key in ("l1", "recipe_learning_rate", "probe_rows")
            } | unlike_former("recipe", {"start": s.recipe.start, "refit": s.recipe.refit})
            if s.recipe.start == "race":
                values["recipe"] |= {"race_steps": s.recipe.race_steps, "near_tie": s.training.near_tie}
        if stage > 1 and self.uses:
            values["method_settings"] = {key: getattr(s.method_settings, key) for key in self.uses}
        return values

    def _read_of_router(self) -> dict[str, Any]:
        router = self.settings.router
        read = {"layer": router.layer, "skip_tokens": router.skip_tokens, "holdout": router.holdout}
        if self.settings.prompt_format.text_alone:  # the texts that are left out of training, and what is read of the rest
            return read | {"depths": router.depths}
        return read | {"shrinkage": router.fixed_shrinkage}

    # -- what a stage learns from, and what its adapter is --------------------------------------------------------

    def rows(self, stage: str, earlier: Sequence[str], sequence: Sequence[str]) -> dict[str, int | None]:
        """Tasks whose training rows a stage learns from, and how many of each at most; None for all of them.

        The router's statistics are taken over the tasks without a limit. The rows are part of the fingerprint; the order of
        the mapping is not, and means nothing.

        Args:
            stage: its name.
            earlier: tasks of the bank below, in order.
            sequence: all tasks of the run.
        """
        return dict.fromkeys(sequence) if self.stages is Stages.ONE else {stage: None}

    @property
    def layers(self) -> AdaptedLayers:
        """The layers that are adapted, and how wide; a method that brings modules of its own gives them here."""
        from amlora_dist.adapters.adapted_layers import AdaptedLayers

        rank, alpha = self.settings.adapters.rank, self.settings.adapters.alpha
        # Scales are alpha / r everywhere, as in a PEFT folder without ``use_rslora``: rsLoRA's is written into alpha.
        return AdaptedLayers(rank=rank, alpha=alpha * math.sqrt(rank) if self.settings.adapters.use_rslora else alpha)

    def recipe(self, earlier: int) -> StageRecipe:
        """How the new task's row weighs the ``earlier`` adapters."""
        return StageRecipe()

    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        """Adapter whose values the new one starts from; None for a fresh one (A random, B zero)."""
        return None

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, mixture: Mixture, parents: Sequence[Result]) -> None:
        """Called once before the first step, with what the earlier stages left."""

    def training_gate(self, tasks: int) -> Tensor | None:
        """Task gate while the last of ``tasks`` is learned, shape (tasks,); None leaves it to the layers."""
        gate = torch.zeros(tasks)
        gate[-1] = 1.0
        return gate

    def loss(self, batch: MicroBatch) -> Tensor:
        """The loss of some rows, on the scale of the step's, a scalar with gradient: the answers' cross-entropy under
        ``training_gate``. A method adds terms to it, each through ``batch``, which knows how it is to be scaled."""
        return batch.cross_entropy(batch.answers(self._gate(batch)))

    def _gate(self, batch: MicroBatch) -> Tensor | None:
        return self.training_gate(batch.tasks) if batch.phase == 1 else None

    def finished(self, trained: Trained) -> tuple[Adapter, dict[str, Tensor]]:
        """The adapter that the bank gets, which serves from then on, and tensors that later stages need besides it: they are
        published with the stage's statistics (``Result.method_state``)."""
        return trained.adapter, {}

    # -- serving --------------------------------------------------------------------------------------------------

    def router(self, statistics: Sequence[TaskStatistics]) -> Router | None:
        """Who weighs the adapters of the finished bank; None leaves it to the layers' own selectors."""
        from amlora_dist.adapters.router import build_router
        from amlora_dist.adapters.statistics import background_of

        text_alone, seed = self.settings.prompt_format.text_alone, self.settings.seed
        background = background_of(statistics)
        return build_router(self.settings.router, statistics, seed=seed, text_alone=text_alone, background=background)


class Baseline(Method):
    """A method without a router: the newest row of the bank answers every input."""

    routed = False

    def router(self, statistics: Sequence[TaskStatistics]) -> Router:
        from amlora_dist.adapters.router import FixedRouter

        return FixedRouter.newest([s.task for s in statistics])


def adapter_reads(method: Method, stage: int) -> dict[str, Any] | None:
    """``method.reads(stage)`` without what only the statistics read: stages that agree in the rest have the same adapter.

    That can be said where a fixed gate weighs the adapters while one is learned, so that no feature takes part; a method
    that reads features otherwise names what it reads of them in ``reads``, under a key of its own.

    Returns:
        None where it cannot be said, where the stage trains no adapter, and in prompt format 1.
    """
    layers, settings = method.layers, method.settings
    reads_features = layers.selects or layers.reads_features or method.training_gate(stage) is None
    if method.trains is not Trains.ADAPTER or not settings.prompt_format.text_alone or reads_features:
        return None
    values = method.reads(stage)
    return values | {"router": {key: value for key, value in values["router"].items() if key not in OF_STATISTICS}}
