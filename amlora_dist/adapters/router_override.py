"""Routing over some tasks of a bank only, chosen for one caller: others that share the model are not touched.

Shapes: B inputs, T tasks of the bank, d features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amlora_dist.adapters.router import PosteriorRouter

if TYPE_CHECKING:
    from amlora_dist.adapters.router import Router

_CHOSEN: ContextVar[Router | None] = ContextVar("amlora_router", default=None)


class _Wrapping:
    """Another router, of which only the gates differ: what they were given is not stored."""

    def __init__(self, inner: Router) -> None:
        self.inner = inner
        self.kind, self.tasks, self.needs_features = inner.kind, inner.tasks, inner.needs_features

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner router."""
        return self.inner.tensors()

    def settings(self) -> dict[str, Any]:
        """Those of the inner router."""
        return self.inner.settings()


class SubsetRouter(_Wrapping):
    """Another router's gates, as if the bank held the chosen tasks alone; the other columns are exactly 0.

    The posterior is taken over the chosen tasks, before threshold and abstention. Routers without a posterior keep the
    mass they give a row and spread it over the chosen tasks in proportion.

    Args:
        inner: the bank's router.
        chosen: indices of the tasks, at least one.
    """

    def __init__(self, inner: Router, chosen: Sequence[int]) -> None:
        super().__init__(inner)
        self.chosen = tuple(chosen)
        self._few = inner.only(self.chosen) if isinstance(inner, PosteriorRouter) else None
        device = inner.weights.device if isinstance(inner, PosteriorRouter) else None
        self._place_KT = torch.eye(len(inner.tasks), device=device)[list(self.chosen)]

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``."""
        if self._few is not None:
            return self._few.gates(features_BD, batch) @ self._place_KT
        gates_BT = self.inner.gates(features_BD, batch)
        kept_BT = gates_BT * self._place_KT.sum(dim=0).to(gates_BT)
        share_B1 = gates_BT.sum(dim=1, keepdim=True) / kept_BT.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return kept_BT * share_B1

    def to(self, device: torch.device | str) -> SubsetRouter:
        """See ``Router``."""
        return SubsetRouter(self.inner.to(device), self.chosen)


class PartlyGivenRouter(_Wrapping):
    """Another router's gates, but for the inputs that bring their own, so that both kinds share a pass.

    Args:
        inner: weighs the others.
        given: for each input of the pass its gate (T,) fp32, or None.
    """

    def __init__(self, inner: Router, given: Sequence[Tensor | None]) -> None:
        super().__init__(inner)
        self.given = tuple(given)

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``."""
        routed_BT = self.inner.gates(features_BD, batch)
        pairs = zip(routed_BT, self.given, strict=True)
        return torch.stack([routed if given is None else given.to(routed) for routed, given in pairs])

    def to(self, device: torch.device | str) -> PartlyGivenRouter:
        """See ``Router``."""
        return PartlyGivenRouter(self.inner.to(device), self.given)


class OverridableRouter(_Wrapping):
    """The bank's router, unless the current context (``routed_by``) names another one.

    It lets callers in several threads route over different tasks through one model.
    """

    def gates(self, features_BD: Tensor | None, batch: int) -> Tensor:
        """See ``Router``."""
        return (_CHOSEN.get() or self.inner).gates(features_BD, batch)

    def to(self, device: torch.device | str) -> OverridableRouter:
        """See ``Router``."""
        return OverridableRouter(self.inner.to(device))


@contextlib.contextmanager
def routed_by(router: Router | None) -> Iterator[None]:
    """Inside, calls of models with a ``OverridableRouter`` are routed by ``router``; None: by the bank's own."""
    token = _CHOSEN.set(router)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
