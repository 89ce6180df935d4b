"""A pool of prompts, of which every input takes those whose keys match it: Learning to Prompt, and the layer that it brings.

A prompt is one learned vector with one key. Every input has ``Prefix.tokens`` tokens in front that mean nothing (the
tokenizer's end token): the positions where its chosen prompts are. So lengths, positions, attention masks and the KV
cache need to know nothing of prompts. In a bank the pool is the adapter of one layer, the embedding, in the shapes of
any adapter: the keys are A (M, D), the prompts are the columns of B (D, M), M the size of the pool.

Shapes in names: B inputs, L tokens, D hidden size, M prompts of a pool, R prompts of all stages' pools side by side,
N prompts of an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amlora_dist.adapters.adapted_layers import AdaptedLayers, Prefix
from amlora_dist.adapters.gate_context import Selection, active_call
from amlora_dist.adapters.gated_linear import concat
from amlora_dist.adapters.mixture import MixtureLinear, NewWeights
from amlora_dist.adapters.targets import Target, routing_stack
from amlora_dist.errors import BankError, UserError
from amlora_dist.methods.base import Baseline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.adapters.settings import AdapterSettings
    from amlora_dist.training.micro_batch import MicroBatch


class L2P(Baseline):
    """One pool of ``prompt_pool`` prompts, trained on, task after task; an input has ``prompt_tokens`` of them::

        loss = CE + mean over the chosen prompts j of (1 - cos(q(x), k_j))

    The query q(x) is what the posterior router reads too: the mean hidden state of the plain model over the prompt.
    Keys k_j have no other gradient than from the second term, so Adam's steps do not depend on its weight. Each stage
    keeps the pool as it was after it.

    Stages take prompts that no earlier one has had while there are some, which is what the paper's penalty on often
    chosen prompts comes to (its section 4.2, with task boundaries known in training); at test time nothing but the
    keys decides. The paper's prompts of several vectors with one key are prompts of one vector with a key each here.

    Source: Wang et al. 2022 (L2P, arXiv 2112.08654), equations 3 to 5.
    """

    uses = ("prompt_pool", "prompt_tokens")

    def reads(self, stage: int) -> dict[str, Any]:
        values = super().reads(stage)
        adapters, s = self.settings.adapters, self.settings.method_settings
        values["adapters"] = {"scale": adapters.alpha / adapters.rank}
        values["method_settings"] = {key: getattr(s, key) for key in self.uses}
        return values

    @property
    def layers(self) -> PromptPool:
        s, adapters = self.settings.method_settings, self.settings.adapters
        alpha = s.prompt_pool * adapters.alpha / adapters.rank
        return PromptPool(rank=s.prompt_pool, alpha=alpha, prefix=Prefix(s.prompt_tokens))

    def start_from(self, parents: Sequence[Adapter]) -> Adapter | None:
        layers = self.layers
        if parents and (parents[-1].rank, parents[-1].alpha) != (layers.rank, layers.alpha):
            raise UserError(
                f"method_settings.prompt_pool: found {layers.rank} prompts at alpha {layers.alpha:g},"
                f" but the pool of {parents[-1].task!r}, which is trained on, has {parents[-1].rank} at"
                f" {parents[-1].alpha:g}"
            )
        return parents[-1] if parents else None

    def loss(self, batch: MicroBatch) -> Tensor:
        chosen: list[tuple[Selection, Tensor | None]] = []
        loss = batch.cross_entropy(batch.answers(self._gate(batch), chosen))
        pulls = [(1 - one.scores).mean() for one, _ in chosen]
        return loss + batch.mean_over_rows(torch.stack(pulls).mean()) if pulls else loss


class PromptEmbedding(MixtureLinear):
    """The input embedding with the pools of a bank::

        y = E[marker] + scale b_j      at the n-th leading position, j the n-th chosen prompt

    Chosen are the N prompts whose keys have the largest cosine with the input's features, in the order of the pool,
    among those of the row that the gate weighs. While stage t learns, they are its own: the prompts (t-1) N to t N of
    the pool, as long as there are any left that no stage has had, and then those of the whole pool that match best.
    """

    def __init__(
        self,
        base: nn.Module,
        path: str,
        adapters: list[Adapter],
        new: NewWeights | None = None,
        *,
        prefix: Prefix,
    ) -> None:
        super().__init__(base, path, adapters, new)
        self.prefix = prefix

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int] | None:
        """A key and a prompt are as wide as a hidden state."""
        return (base.embedding_dim, base.embedding_dim) if isinstance(base, nn.Embedding) else None

    def forward(self, x: Tensor, task_gate: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, D) of token ids ``x`` (B, L), with prompts at the leading positions.

        Only in a call that has features: not in the pass that makes them, and not behind a KV cache, which holds the
        prompts already.
        """
        y_BLD = self._base(x)
        call = active_call()
        if call is None or call.options.bypass or call.features is None:
            return y_BLD
        gate_BR = self.rank_gates(call.gate() if task_gate is None else task_gate)
        keys_RD = concat(self.old_a, self.new_a, 0).float()
        match_BR = F.normalize(call.features, dim=1) @ F.normalize(keys_RD, dim=1).T
        chosen_BN = self._chosen(match_BR.detach(), gate_BR)
        if call.options.on_select is not None:
            match_B1N = match_BR.gather(1, chosen_BN)[:, None]
            pooled = match_B1N[:, 0].detach()  # one choice for the whole row: there are no positions to weigh
            call.options.on_select(self.path, Selection(match_B1N, torch.ones_like(match_B1N), match_B1N, pooled))
        prompts_RD = concat(self.old_b, self.new_b, 1).float().T
        added_BND = prompts_RD[chosen_BN] * gate_BR.gather(1, chosen_BN)[..., None]
        mask_BL = call.pooling_mask(x, start=False)
        place_BL = mask_BL.cumsum(dim=1) - 1
        slots_BL = mask_BL & (place_BL < self.prefix.tokens) & (x == self.prefix.marker)
        place_BL = place_BL.clamp(0, self.prefix.tokens - 1)
        added_BLD = added_BND.gather(1, place_BL[..., None].expand(-1, -1, y_BLD.shape[-1]))
        return y_BLD + (added_BLD * slots_BL[..., None]).to(y_BLD.dtype)

    def _chosen(self, match_BR: Tensor, gate_BR: Tensor) -> Tensor:
        """Which prompts each input has, (B, N), in the order of the pool."""
        count = self.prefix.tokens
        open_BR = gate_BR != 0
        if self.new_a is not None and torch.is_grad_enabled():
            earlier, size = self.spread_bits.shape[0] - 1, self.new_a.shape[0]
            if (earlier + 1) * count <= size:
                first = match_BR.shape[1] - size + earlier * count
                place_R = torch.arange(match_BR.shape[1], device=match_BR.device)
                open_BR = open_BR & (place_R >= first) & (place_R < first + count)
        best_BN = match_BR.masked_fill(~open_BR, -torch.inf).topk(count, dim=1).indices
        return best_BN.sort(dim=1).values

@dataclass(frozen=True, kw_only=True)
class PromptPool(AdaptedLayers):
    """The input embedding alone, as a ``PromptEmbedding``; ``rank`` is the size of the pool."""

    reads_features: ClassVar[bool] = True
    several_depths: ClassVar[bool] = False

    def targets(self, model: PreTrainedModel, settings: AdapterSettings, router_layer: int) -> list[Target]:
        return [embedding_target(model)]

    def bank_targets(self, model: PreTrainedModel, paths: Sequence[str]) -> list[Target]:
        return [embedding_target(model)]

    def make(
        self, model: PreTrainedModel, target: Target, adapters: list[Adapter], new: NewWeights | None, seed: int
    ) -> MixtureLinear:
        smallest = min((adapter.rank for adapter in adapters), default=self.rank)
        if self.prefix.tokens > smallest:
            found = self.prefix.tokens
            raise BankError(f"method_settings.prompt_tokens: found {found}, expected 1 to the pool's size, {smallest}")
        return PromptEmbedding(self._base(model, target), target.path, adapters, new, prefix=self.prefix)


def embedding_target(model: PreTrainedModel) -> Target:
    """The input embedding, of an encoder-decoder its encoder's, as what a stage adapts; it lies below every layer.

    Raises:
        UserError: it is no plain embedding.
    """
    owner = model.get_encoder() if model.config.is_encoder_decoder else model
    # A decoder may share the encoder's embedding, but has a name of its own for it.
    inside = next(path for path, module in model.named_modules() if module is owner)
    embedding = owner.get_input_embeddings()
    sizes = PromptEmbedding.sizes(embedding)
    path = next(
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if module is embedding and (not inside or path.startswith(f"{inside}."))
    )
    if sizes is None:
        raise UserError(f"method: prompts need a plain input embedding; {path} is a {type(embedding).__name__}")
    return Target(path, *sizes, layer=-1, part=routing_stack(model).part)
