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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.statistics import TaskStatistics
    from amlora_dist.adapters.targets import Target
    from amlora_dist.training.micro_batch import MicroBatch
    from amlora_dist.training.result import Result
    from amlora_dist.training.settings import StageSettings


@dataclass(frozen=True, slots=True)
class Trained:
    """A stage whose training has ended, as ``Method.method_state`` sees it; the same calls must be made on every rank."""

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

    name: ClassVar[str]
    inherits: ClassVar[bool] = True
    """Whether a stage sees the adapters of earlier stages."""
    trains: ClassVar[bool] = True
    """Whether there is anything to train and to publish."""
    learns: ClassVar[bool] = True
    """Whether a stage takes optimizer steps; otherwise its adapter stays zero, and ``answer.evidence`` is ``keys``."""
    routed: ClassVar[bool] = True
    """Whether scores depend on the settings of ``router.gate``."""
    told_task: ClassVar[bool] = False
    """Whether every row is scored by the adapter of its own task: an upper bound, not a method to serve."""
    alters_inputs: ClassVar[bool] = False
    """Whether rows reach the model changed (prompts in front, other embeddings): then no trunk is cached for it."""
    reads_parameters: ClassVar[bool] = False
    """Whether the loss reads the new adapter's parameters outside of a pass of the model, or makes a second pass inside
    of one: ZeRO-3, which partitions parameters, is refused."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Keys of ``method_settings`` that decide what stages from the second on train."""

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings

    @property
    def answers_plain_text(self) -> bool:
        """Whether its bank finds the task of a plain text by itself, and answers by that task's prompt and labels."""
        plain = self.settings.prompt_format.text_alone and self.settings.router.kind == "posterior"
        return plain and self.routed and not self.uses_selectors

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
        if stage > 1 and self.learns_recipe(stage):
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

    # -- which stages there are, and what they learn from ---------------------------------------------------------

    def stages(self, tasks: Sequence[str]) -> list[str]:
        """Names of the stages of a sequence, in order: one for each task."""
        return list(tasks)

    def rows(self, stage: str, earlier: Sequence[str], sequence: Sequence[str]) -> dict[str, int | None]:
        """Tasks whose training rows a stage learns from, and how many of each at most; None for all of them.

        The router's statistics are taken over the tasks without a limit. The rows are part of the fingerprint; the order of
        the mapping is not, and means nothing.

        Args:
            stage: its name.
            earlier: tasks of the bank below, in order.
            sequence: all tasks of the run.
        """
        return {stage: None}

    @property
    def memory_rows(self) -> int:
        """Rows of each earlier task that ``rows`` names for its row's refit after the stage, and for no training; 0: none,
        what ``rows`` names is trained on."""
        return 0

    # -- the adapter ----------------------------------------------------------------------------------------------

    def targets(self, model: PreTrainedModel, router_layer: int) -> list[Target]:
        """The layers that are adapted."""
        from amlora_dist.adapters.targets import find_targets

        return find_targets(model, self.settings.adapters, router_layer)

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        """Of the adapter that a stage trains; its scale is alpha / r."""
        rank, alpha = self.settings.adapters.rank, self.settings.adapters.alpha
        # Scales are alpha / r everywhere, as in a PEFT folder without ``use_rslora``: rsLoRA's is written into alpha.
        return rank, alpha * math.sqrt(rank) if self.settings.adapters.use_rslora else alpha

    @property
    def prompt_slots(self) -> int:
        """Tokens in front of every input where learned prompts are (``adapters.prompts``)."""
        return 0

    @property
    def uses_selectors(self) -> bool:
        """Whether the layers weigh the adapters by dense layers of their own (the literal router)."""
        return False

    def learns_recipe(self, stage: int) -> bool:
        """Whether the new adapter learns weights on the earlier ones, too."""
        return False

    def constant_recipe(self, earlier: int) -> Tensor | None:
        """Weights of the ``earlier`` adapters in the new task's row, (earlier,), where none are learned; None: 0."""
        return None

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

    @property
    def selectors_alone(self) -> bool:
        """Whether the layers' selectors learn after the adapter, each for half of the steps: the adapter under
        ``Method.training_gate``, then the selectors, which weigh it as it is."""
        return False

    def finished(self, adapter: Adapter, earlier: Sequence[Adapter]) -> Adapter:
        """The adapter that the bank gets, from the one that was trained on top of ``earlier``; it serves from then on."""
        return adapter

    def method_state(self, trained: Trained) -> dict[str, Tensor]:
        """Tensors that later stages need besides the adapter; they are published with the stage's statistics."""
        return {}

    # -- serving --------------------------------------------------------------------------------------------------

    def router(self, statistics: Sequence[TaskStatistics]) -> Router | None:
        """Who weighs the adapters of the finished bank; None leaves it to the layers' own selectors."""
        from amlora_dist.adapters.router import build_router

        text_alone = self.settings.prompt_format.text_alone
        background = next((one.background for one in reversed(statistics) if one.background), None)
        return build_router(
            self.settings.router, statistics, seed=self.settings.seed, text_alone=text_alone, background=background
        )


class Baseline(Method):
    """A method without a router: the newest row of the bank answers every input."""

    routed = False

    def router(self, statistics: Sequence[TaskStatistics]) -> Router:
        from amlora_dist.adapters.router import FixedRouter

        return FixedRouter.newest([s.task for s in statistics])
