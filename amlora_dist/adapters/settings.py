"""Settings of the mixture: which layers, which rank, which router, which gate. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT_KEYS = ConfigDict(extra="forbid")


LabelKeys = Literal["stage", "bank"]


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class AdapterSettings:
    """The LoRA that each stage trains."""

    rank: int = Field(default=8, ge=1, le=1024)
    """r: rows of A, columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """LoRA's scale is alpha / r, as in Hu et al. 2021."""
    targets: Literal["auto", "all-linear", "attention", "mlp"] | list[str] = "mlp"
    """Linear layers by what they do: ``mlp``, ``attention``, ``all-linear`` (but the output head); by their names (last
    part of the module path); or both in a list. ``auto`` takes PEFT's default for the architecture, mostly q and v."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023), so that higher ranks are not scaled down to nothing."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the new adapter's input that is dropped while it learns."""
    layers: str = Field(default="above_router", pattern=r"^(above_router|all|last:[1-9][0-9]*)$")
    """Which decoder layers are adapted: ``above_router``, ``last:K`` or ``all`` (then routing needs a partial pass)."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class GateSettings:
    """How the router's scores become gates. Read by scoring and serving only, never by training."""

    threshold: float = Field(default=0.1, ge=0, lt=1)
    """lambda_g: scores below ``threshold`` x the largest (``relative``) or below ``threshold`` (``absolute``) are 0."""
    form: Literal["relative", "absolute"] = "relative"
    """``relative``: relu(p - lambda_g max p), rescaled to sum 1. ``absolute``: max(p - lambda_g, 0), not rescaled."""
    temperature: Literal["calibrated"] | Annotated[float, Field(gt=0)] = "calibrated"
    """T of softmax(scores / T); ``calibrated`` takes the one that the held-out training rows prefer.
    A number is for routes: what tells labels apart keeps the temperature of its own stage (``router.label_keys``)."""
    abstention: bool = False
    """Give texts that belong to no task to the base model: by background keys (banks of prompt format 2), or a share of
    them by relative Mahalanobis distance (banks before)."""
    lost: float = Field(default=0.03, gt=0, lt=0.5)
    """Share of the tasks' own rows that abstention by background keys may lose."""


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class LiteralSettings:
    """What the paper leaves open in its selector (docs/method.md, section 1); used by ``router.kind: literal``."""

    activation: Literal["tanh", "relu", "identity"] = "tanh"
    """What a selector's scores go through before ``map``."""
    map: Literal["softmax", "entmax15", "sparsemax", "relu", "abs_sigmoid", "top_k"] = "softmax"
    """From scores to gates; ``relu`` and ``abs_sigmoid`` (|2 sigmoid - 1|) do not make them sum to 1."""
    top_k: int = Field(default=1, ge=1)
    """Adapters with a weight under ``map: top_k``."""
    granularity: Literal["token", "sequence"] = "token"
    """A gate for each token, or one from the mean over the prompt."""
    residual: bool = False
    """Give the current adapter weight 1 while it is learned, next to its gate."""
    freeze_old: bool = False
    """Keep the dense layers of earlier tasks as they were; otherwise they are retrained."""
    training: Literal["joint", "two_stage"] = "joint"
    """``two_stage``: the adapter first, at weight 1; then the selector alone."""
    penalty: Literal["none", "literal", "non_zero_slot", "old_only", "logits", "unnormalised"] = "literal"
    """Reading of the L1 term. ``literal`` is what the paper writes and is without effect: softmax sums to 1."""
    prior: bool = False
    """Add the log posterior of the closed-form router to the scores (``literal + prior``)."""

    def __post_init__(self) -> None:
        if self.penalty == "unnormalised" and self.map not in ("relu", "abs_sigmoid"):
            raise ValueError(
                "penalty 'unnormalised' needs a map that does not sum to 1 ('relu' or 'abs_sigmoid'),"
                f" not {self.map!r}: otherwise it is 'non_zero_slot'"
            )


@dataclass(config=STRICT_KEYS, kw_only=True, slots=True)
class RouterSettings:
    """What weighs the adapters for an input."""

    kind: Literal["posterior", "literal", "uniform", "permuted"] = "posterior"
    """``posterior``: closed-form statistics of each label's texts; ``literal``: the paper's learned selectors. Controls for
    comparisons: ``uniform`` weighs all adapters alike, ``permuted`` gives each task another one's gate."""
    keys: Literal["label", "task"] = "label"
    """A key for every label, or one for every task, as 0.1 had it."""
    label_keys: LabelKeys = "stage"
    """Whose keys tell a task's labels apart: those that the bank had after the task's own stage, so that no later task
    changes what they say of its labels (``stage``), or the bank's, which every stage makes again (``bank``)."""
    layer: int | None = Field(default=None, ge=0)
    """k: hidden states after this many layers are features; default: the middle of the depth."""
    depths: list[Annotated[int, Field(ge=0)]] | None = None
    """Further layers below k whose hidden states are features too; default: at each quarter of k."""
    max_text_tokens: int | None = Field(default=None, ge=8)
    """Tokens of a text that are read, whatever the task; default: the largest ``max_length`` of the run's tasks."""
    shrinkage: Literal["held_out"] | Annotated[float, Field(ge=0, le=1)] = "held_out"
    """Sigma = (1 - shrinkage) S/N + shrinkage mean(diag(S/N)) I; ``held_out``: the one that held-out rows prefer."""
    skip_tokens: int = Field(default=2, ge=0)
    """First prompt tokens left out of the mean (attention sink); a prompt no longer than this pools all."""
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows that neither the adapter nor the statistics see, at least 24 where a task has 96: they
    calibrate temperature, evidence and thresholds. Their features are stored with the bank, and those of at most 64 other
    training rows a task, for thresholds; texts are not. 0 turns both off. (In prompt format 1 the adapter learns from the
    held-out rows all the same, and no other row's features are stored.)"""
    background: bool = True
    """Keep, with the statistics, what the router reads of generic texts that ship with the package: abstention needs it, and
    can then be turned on for a finished bank. Costs a pass of half the depth over some hundred texts, once a base model."""
    recipes: bool = True
    """Learn weights of the earlier adapters for a new task (forward transfer)."""
    gate: GateSettings = Field(default_factory=GateSettings)
    literal: LiteralSettings = Field(default_factory=LiteralSettings)

    @property
    def fixed_shrinkage(self) -> float:
        """The shrinkage where nothing is held out to choose it by: prompt format 1."""
        return 0.1 if self.shrinkage == "held_out" else self.shrinkage
