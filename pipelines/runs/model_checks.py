"""Whether a base model and its tokenizer fit the run, before anything starts: layers, weights, tokens, labels, prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from amlora_dist.base_model import BaseModel, check_tokenizer, check_weights, load_tokenizer, meta_model
from amlora_dist.errors import UserError
from amlora_dist.model_folder import unpackable
from amlora_dist.tasks.prompts import template_for
from amlora_dist.tasks.task import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from amlora_dist.methods.base import Method
    from amlora_dist.tasks.sources import Row
    from amlora_dist.training.settings import StageSettings


def check_model(
    method: Method, base: BaseModel, tasks: Iterable[tuple[TaskSpec, list[Row]]]
) -> tuple[int, int, list[int]]:
    """See that the adapters have layers to adapt, on a model without weights, that the weights and the tokenizer are its
    own, and that the tokenizer can tell every task's labels apart.

    Args:
        method: with the settings of the run.
        base: whose files are read, without the weights.
        tasks: with some rows of each, whose prompts must fit.

    Returns:
        Parameters of the model, and of an adapter; and the layers below the routing layer that features take in by
        default.

    Raises:
        UserError: the first thing that does not fit; lists what could.
    """
    model = meta_model(base)
    sizes = check_targets(method, model)
    check_weights(base, model)
    tokenizer = load_tokenizer(base.path)
    embedding = model.get_input_embeddings()
    check_tokenizer(base, tokenizer, int(embedding.weight.shape[0]))
    for spec, rows in tasks:
        check_task(spec, rows, tokenizer, base.encoder_decoder)
    return sizes


def check_packing(base: BaseModel) -> None:
    """See that rows may share a sequence of this model, by its whole configuration.

    Raises:
        UserError: they may not.
    """
    from amlora_dist.config.checks import packing_fault

    if (reason := unpackable(meta_model(base).config.to_dict())) is not None:
        raise UserError(str(packing_fault(reason)))


def checked_router_layer(settings: StageSettings, model: PreTrainedModel) -> int:
    """The routing layer that the settings ask for, or the model's default.

    Raises:
        UserError: the model has no such layer.
    """
    from amlora_dist.adapters.targets import check_router_layer, default_router_layer

    asked = settings.router.layer
    layer = default_router_layer(model) if asked is None else asked
    check_router_layer(model, layer)
    return layer


def check_targets(method: Method, model: PreTrainedModel) -> tuple[int, int, list[int]]:
    """Parameters of the model, and of an adapter, and the default depths; errors as ``check_model``."""
    from amlora_dist.adapters.targets import default_depths

    layer = checked_router_layer(method.settings, model)
    layers = method.layers
    targets = layers.targets(model, method.settings.adapters, layer)
    trainable = sum(layers.rank * (target.in_features + target.out_features) for target in targets)
    depths = method.settings.router.depths or []
    if any(depth >= layer for depth in depths):
        raise UserError(f"router.depths: found {depths}, expected layers below the routing layer {layer}")
    return sum(parameter.numel() for parameter in model.parameters()), trainable, default_depths(layer)


def check_task(spec: TaskSpec, rows: list[Row], tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> None:
    """Labels that differ for the model, and prompts that leave room for a text."""
    from amlora_dist.tasks.batches import encode, prompt_tokens
    from amlora_dist.tasks.label_checks import check_labels

    where = f"{spec.origin}: labels"
    check_labels(
        spec.label_texts, tokenizer, encoder_decoder=encoder_decoder, where=where, task=spec.name, chat=spec.chat
    )
    bare = [replace(row, text="") for row in rows]
    template = template_for(spec, spec.prompt_style)
    try:
        if spec.chat:
            limit = int(spec.max_length or 0)
            encode(rows, spec, template, tokenizer, max_length=limit, encoder_decoder=False)
            return
        prompt_tokens(bare, template, tokenizer, int(spec.max_length or 0), encoder_decoder, spec.name)
    except UserError as error:
        raise UserError(f"{spec.origin}: {error}") from error
