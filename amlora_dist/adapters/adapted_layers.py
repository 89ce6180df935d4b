"""The layers that an adapter acts in: which, how wide, and of what class.

Most methods have plain mixture layers over a model's linear ones. One that brings modules of its own subclasses
``AdaptedLayers`` next to them; whoever injects, reads rows, scores or loads a bank asks the object, and knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from amlora_dist.adapters.mixture import MixtureLinear, NewWeights
from amlora_dist.adapters.targets import Target, bank_targets, find_targets

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.router import Router
    from amlora_dist.adapters.settings import AdapterSettings


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens in front of every input, ``tokens`` times ``marker``: the places of what layers have learned to put there."""

    tokens: int = 0
    marker: int = 0

    def before(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt's token ids behind the places."""
        return (self.marker,) * self.tokens + prompt


NO_PREFIX = Prefix()


@dataclass(frozen=True, kw_only=True)
class AdaptedLayers:
    """Plain mixture layers over linear ones, weighed by the gate of a call."""

    rank: int = 0
    """Of the adapter that a stage trains; 0 where none is."""
    alpha: float = 0.0
    """Its scale is alpha / rank."""
    prefix: Prefix = NO_PREFIX
    """What every input has in front."""

    selects: ClassVar[bool] = False
    """Whether they weigh the adapters by selectors of their own, where a call says so (``Mixture.use_selectors``)."""
    reads_features: ClassVar[bool] = False
    """Whether they read an input's features themselves, whatever gives the gate."""
    several_depths: ClassVar[bool] = True
    """Whether features may be of several depths."""

    @property
    def selectors_alone(self) -> bool:
        """Whether their selectors learn after the adapter, each for half of the steps: the adapter under
        ``Method.training_gate``, then the selectors, which weigh it as it is."""
        return False

    @property
    def has_prior(self) -> bool:
        """Whether the router's weights are a prior of theirs, in training too."""
        return False

    def marked(self, marker: int) -> AdaptedLayers:
        """The same with the tokenizer's token that is at the places in front."""
        return replace(self, prefix=replace(self.prefix, marker=marker)) if self.prefix.tokens else self

    def targets(self, model: PreTrainedModel, settings: AdapterSettings, router_layer: int) -> list[Target]:
        """The layers that a stage adapts."""
        return find_targets(model, settings, router_layer)

    def bank_targets(self, model: PreTrainedModel, paths: Sequence[str]) -> list[Target]:
        """Those that a bank adapts, by the paths that it names; errors as in ``targets.bank_targets``."""
        return bank_targets(model, paths)

    def make(
        self, model: PreTrainedModel, target: Target, adapters: list[Adapter], new: NewWeights | None, seed: int
    ) -> MixtureLinear:
        """The layer that takes the place of ``target``; ``seed`` draws what it begins with besides ``new``."""
        return MixtureLinear(self._base(model, target), target.path, adapters, new)

    def described(self, router: Router | None) -> tuple[str, dict[str, Any]]:
        """Kind and settings of who weighs the adapters, as a bank records them, the ``router`` of the bank given."""
        assert router is not None, "without selectors something else weighs the adapters"
        return router.kind, router.settings()

    @staticmethod
    def _base(model: PreTrainedModel, target: Target) -> nn.Module:
        base: nn.Module = model.get_submodule(target.path)
        return base
