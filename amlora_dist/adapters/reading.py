"""Reading a text before anybody knows the question: its features, and what of the pass an answer can go on from.

In a causal model a text's states do not depend on what follows it. So one pass over the text alone, through the layers
below the first adapted one, gives the router its features; the keys, values and states of that pass are reused, the routed
task's question is appended, and no token goes through those layers twice.

Where that cannot be (encoder-decoders look both ways; ZeRO-3 cannot end a pass early; adapters that begin below the
routing layer; caches that do not simply grow), the text is read for its features alone, and its prompt is read again.

Shapes in names: B texts, L their tokens, D hidden size, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from amlora_dist.adapters.inject import Mixture
    from amlora_dist.adapters.trunk import Trunk


@dataclass(slots=True)
class TextPass:
    """What a pass over texts leaves for their prompts: states and cache of the layers below the adapters."""

    trunk: Trunk
    states_BLD: Tensor
    cache: DynamicCache


@dataclass(slots=True)
class Reading:
    """Texts that were read."""

    features_BF: Tensor
    """fp32"""
    ids_BL: Tensor
    """Padded on the left (of an encoder-decoder: on the right)."""
    mask_BL: Tensor
    cached: TextPass | None
    """None where the prompt must be read again."""


def reusable_trunk(mixture: Mixture) -> Trunk | None:
    """The layers whose pass over a text can be reused for its prompt, made ready; None where there are none."""
    model = mixture.model
    if model.config.is_encoder_decoder or mixture.routing.whole_passes or mixture.routing.partial_pass:
        return None
    layers = DynamicCache(config=model.config).layers
    if layers and not all(type(layer) is DynamicLayer for layer in layers):
        return None  # sliding windows and recurrent states
    try:
        return mixture.trunk()
    except UserError:
        return None


def read_texts(
    mixture: Mixture,
    trunk: Trunk | None,
    ids_BL: Tensor,
    mask_BL: Tensor,
    text_mask_BL: Tensor,
    positions: dict[str, Tensor],
    *,
    full_forward: bool = False,
) -> Reading:
    """One pass over texts.

    Args:
        mixture: of the model.
        trunk: of ``reusable_trunk``; None to reuse nothing.
        ids_BL: texts behind the tokenizer's special tokens.
        mask_BL: 1 but for padding.
        text_mask_BL: 1 on the texts' own tokens.
        positions: ``position_ids``, if the model takes them.
        full_forward: run the pass to its end (ZeRO-3).
    """
    if trunk is not None:
        features, states, cache = trunk.read(ids_BL, mask_BL, positions, text_mask_BL)
        return Reading(features, ids_BL, mask_BL, TextPass(trunk, states, cache))
    features = mixture.routing_features(
        prompt_mask=text_mask_BL, full_forward=full_forward, input_ids=ids_BL, attention_mask=mask_BL, **positions
    )
    return Reading(features, ids_BL, mask_BL, None)
