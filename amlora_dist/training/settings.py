"""Settings of one training stage. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.config.schema import CHANGES_NO_RESULT
from amlora_dist.errors import TrainingError
from amlora_dist.evaluation.settings import AnswerSettings
from amlora_dist.methods.settings import MethodSettings
from amlora_dist.tasks.prompt_format import PromptFormat

STRICT_KEYS = ConfigDict(extra="forbid")


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class TrainingSettings:
    """How one stage learns its adapter. Batch sizes are global: they do not depend on the number of workers."""

    epochs: int = Field(default=2, ge=1)
    """How often a stage sees each training row; under ``keep: best`` at most."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per optimizer step over all workers."""
    micro_batch_size: Annotated[int | None, CHANGES_NO_RESULT] = Field(default=None, ge=1)
    """Examples per forward pass of one worker; default: the whole share of the worker."""
    packing: bool = False
    """Rows of a forward pass share sequences: those that fit within the longest row's length, or 256 tokens, lie one behind
    the other, each blind to the others and with positions of its own. Saves padding; changes losses by rounding alone."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """``auto``: a race on the first stage's held-out rows (``training.rate_race``) finds it, once for all runs that begin
    with that stage; a run on a published bank keeps the bank's. Stages, their fingerprints and banks hold the number."""
    recipe_learning_rate: float = Field(default=3e-2, gt=0)
    """Learning rate of the weights on earlier adapters."""
    l1: float = Field(default=0.1, ge=0)
    """lambda: the L1 coefficient on the recipe, a proximal step inside the optimizer's own."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes down to 0 after the warm-up, within each stage; ``constant``: it does not."""
    warmup_steps: int = Field(default=10, ge=0)
    """Optimizer steps over which the learning rate rises; at most half of a stage."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, of the adapter; weights on earlier adapters have none."""
    lora_plus: float = Field(default=1.0, ge=1)
    """Learning rate of B as a multiple of A's (LoRA+, Hayou et al. 2024, who take 16)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of an answer token's target that is spread over the vocabulary, for rows with a label; free text is learned
    as it is."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all trainable parameters; 0 turns clipping off."""
    keep: Literal["last", "best"] = "last"
    """Which step's adapter is the stage's result: the last, or the one that loses least on the rows that ``router.holdout``
    keeps out, where a later one has to be better by more than ``near_tie``. ``epochs`` is then an upper bound."""
    check_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two looks at the held-out rows; default: eight looks, fewer where they would cost much."""
    patience: int = Field(default=3, ge=0)
    """Looks in a row without anything better after which the stage ends; 0: it goes on to its end."""
    near_tie: float = Field(default=0.01, ge=0, lt=1)
    """Share of a held-out loss below which two of them count as equal: then the earlier step, or the plainer start, wins."""
    checkpoint_every: Annotated[int, CHANGES_NO_RESULT] = Field(default=50, ge=1)
    """Optimizer steps between checkpoints."""
    gradient_checkpointing: Annotated[bool, CHANGES_NO_RESULT] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    cache_trunk: Annotated[bool, CHANGES_NO_RESULT] = False
    """Keep what the layers below the first adapted one make of each row in files, and compute it once. Changes losses
    by rounding alone (rows are computed unpadded), so it is in no fingerprint. Without effect under ZeRO-3."""
    cache_trunk_gb: Annotated[float, CHANGES_NO_RESULT] = Field(default=8.0, gt=0)
    """Limit of those files, 1e9 bytes; those used longest ago go first."""
    probe_rows: int = Field(default=32, ge=1)
    """Training rows on which a stage probes the earlier tasks' rows for the start of its recipe."""

    @property
    def rate(self) -> float:
        """The learning rate, once it is a number.

        Raises:
            TrainingError: it is still ``auto``, which runs replace before their first stage.
        """
        if self.learning_rate == "auto":
            raise TrainingError("training.learning_rate is still auto: no stage can train before a number has been found")
        return self.learning_rate


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class RecipeSettings:
    """How the weights on earlier adapters begin."""

    start: Literal["race", "always", "never", "probe"] = "probe"
    """``race``: at zero, at the best old row or at the runner-up, whichever loses least on held-out rows after some steps
    (where a stage is too short for it, as ``probe``); ``always``: at the best old row; ``never``: at zero; ``probe``: at the
    best old row if it explains the new task better than the base model does."""
    race_steps: int = Field(default=20, ge=8)
    """Steps that each start takes at most; the losers' are at most 15% of the stage's (50% below 100 steps)."""
    refit: float = Field(default=0.0, ge=0, lt=1)
    """Share of a stage's steps, the last ones, in which the weights that ``training.l1`` has left go on without it and those
    at 0 stay there: the penalty chooses, and no longer shrinks what it has chosen."""


DeepSpeedSection = dict[str, Any]
"""DeepSpeed's own JSON schema passed through, with ``zero_stage`` as a short form."""


@plain_dataclass(frozen=True, slots=True)
class StageSettings:
    """The part of a run's configuration that a stage may read."""

    method: str
    seed: int
    dtype: Literal["fp32", "bf16"]
    attention: str
    adapters: AdapterSettings
    router: RouterSettings
    training: TrainingSettings
    method_settings: MethodSettings = field(default_factory=MethodSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    prompt_format: PromptFormat = field(default_factory=lambda: PromptFormat(1))
    answer: AnswerSettings = field(default_factory=AnswerSettings)
